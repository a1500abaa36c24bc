"""Compression methods: one published method per file, the file name is the recipe key."""
