"""The cases, one file an area; each has a list `CASES`."""
