"""What knows nothing of this project: start-up, logs, console, files."""
