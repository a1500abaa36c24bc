"""The sub-formats of compressed-tensors, one per file."""
