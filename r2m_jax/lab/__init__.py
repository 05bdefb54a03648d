"""The laboratory: many arms and seeds, with their statistics and reports."""
