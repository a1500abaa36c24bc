"""Units through methods to disk, and what becomes of the files."""
