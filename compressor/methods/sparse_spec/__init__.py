"""SparseSpec (arXiv 2512.01278): drafts over the keys that matter."""
