"""A run's checkpoints: saving, loading, shards of the optimizer."""
