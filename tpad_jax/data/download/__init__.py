"""Pictures of a raw category from the web: `python -m tpad_jax.data.download`."""
