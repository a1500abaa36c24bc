"""Bundled public-domain texts."""
