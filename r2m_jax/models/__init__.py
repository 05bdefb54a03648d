"""Transformer, reward model and critic, and what runs them: generation and log-probabilities."""
