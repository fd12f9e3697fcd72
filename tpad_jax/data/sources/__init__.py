"""One reader per source of items and sessions."""
