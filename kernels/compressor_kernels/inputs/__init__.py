"""Quantizers of a linear's inputs."""
