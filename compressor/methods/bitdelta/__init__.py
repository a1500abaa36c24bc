"""BitDelta (arXiv 2402.10193): a fine-tune as signs on its base."""
