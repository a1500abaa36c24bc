"""AWQ (arXiv 2306.00978): inputs that see large activations are scaled up before rounding."""
