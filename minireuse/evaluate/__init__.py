"""Measuring policies against the full sampler: `python -m minireuse.evaluate`."""
