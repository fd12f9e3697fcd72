"""The planted catalogue: items and sessions whose true transitions are known."""
