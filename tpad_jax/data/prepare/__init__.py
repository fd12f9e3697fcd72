"""Raw files to tables, before a run: on this machine or on many."""
