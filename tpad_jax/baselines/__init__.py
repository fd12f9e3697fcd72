"""Baselines that every model is compared with, and the search that tunes them."""
