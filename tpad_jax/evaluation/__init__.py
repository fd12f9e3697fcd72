"""Exact ranks and metrics, slices, statistics and comparisons."""
