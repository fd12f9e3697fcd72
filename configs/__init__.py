"""Configs: what `launch.py --config=` reads. Plain ml_collections, no framework."""
