"""Diagnostics of a run's features: effective ranks, probes, mutual information."""
