"""task=analyse: evidence on the method from a run's arrays."""
