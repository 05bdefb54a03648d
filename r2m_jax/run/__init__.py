"""A run and its workdir: build, fit, loop, checkpoints, metrics."""
