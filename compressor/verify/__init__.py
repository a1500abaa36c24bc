"""Proves written files."""
