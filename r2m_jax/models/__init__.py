"""Transformer, reward model and critic, with sampling and log-probabilities."""
