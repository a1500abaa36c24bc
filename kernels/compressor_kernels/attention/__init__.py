"""Attention: heads, chosen blocks, quantized and paged caches."""
