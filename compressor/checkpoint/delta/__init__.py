"""A fine-tune stored as its difference to a base."""
