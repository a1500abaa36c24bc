"""The format dense."""
