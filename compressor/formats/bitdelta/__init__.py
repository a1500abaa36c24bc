"""The format bitdelta."""
