"""Judges, their questions and answers, and statistics of the answers. No model."""
