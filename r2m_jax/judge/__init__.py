"""Who wins: judges, their questions and answers, and the numbers made of them. No model."""
