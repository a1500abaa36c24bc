"""Architectures as data: a family's map, bound to one checkpoint."""
