"""The format autoawq."""
