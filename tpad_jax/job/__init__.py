"""The whole experiment, from raw files to results.json."""
