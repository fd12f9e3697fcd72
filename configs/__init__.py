"""Configs for `launch.py --config=FILE`: Python files that return an ml_collections ConfigDict."""
