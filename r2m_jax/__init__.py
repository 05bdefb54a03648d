"""R2M: a reward model that reads the policy, in JAX (arXiv 2601.22664)."""

__version__ = "0.2.0"
