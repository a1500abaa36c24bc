"""SparseSpec (arXiv 2512.01278): drafts over the keys that matter."""

from compressor.methods.sparse_spec.method import PASS

__all__ = ["PASS"]
