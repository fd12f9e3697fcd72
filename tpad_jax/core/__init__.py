"""Parts without knowledge of this project: commands, start-up, logs, console, files."""
