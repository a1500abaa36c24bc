"""One file for each sub-command; its `command` is what `compress NAME` runs."""
