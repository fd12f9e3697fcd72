"""TPAD in JAX: transitional patterns distilled into multimodal item representations."""
