"""The gold-reward task: prompts, preferences, the stages before RL, and RL."""
