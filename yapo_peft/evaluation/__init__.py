"""Measures of a steered model, one file each, and their pictures."""
