"""The tasks of an evaluation: each is a file here and a line in ``table.py``."""
