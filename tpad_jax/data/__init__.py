"""Raw files to batches: numpy and polars, never jax."""
