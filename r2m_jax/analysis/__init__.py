"""task=analyse: what a run's arrays say of the method."""
