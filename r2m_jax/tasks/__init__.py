"""One file for each config.task."""
