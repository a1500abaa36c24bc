"""Recipes that ship with the program (data only)."""
