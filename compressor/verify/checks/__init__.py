"""Checks of written files, one a file; `verify.CHECKS` lists them."""
