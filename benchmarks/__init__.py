"""Benchmarks: each prints a table and writes JSON; the last figures stand in RESULTS.md."""
