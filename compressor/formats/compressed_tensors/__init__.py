"""The format compressed-tensors."""
