"""The laboratory: many arms and seeds, and what they show."""
