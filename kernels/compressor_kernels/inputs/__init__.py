"""Quantizers of a linear's inputs, and sums over them."""
