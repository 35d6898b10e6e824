"""Finds what would go wrong in a training run, in seconds and without training."""
