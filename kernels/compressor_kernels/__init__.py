"""Triton kernels: each file is a public wrapper, a plain reference, and the Triton code."""
