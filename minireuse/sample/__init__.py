"""Painting from the command line: `python -m minireuse.sample`."""
