"""Session encoders: item vectors of a prefix to one vector."""
