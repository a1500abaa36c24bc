"""A transformers model of which one block is in memory."""
