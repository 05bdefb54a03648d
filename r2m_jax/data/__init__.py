"""From rows of text to tokens to batches; no model."""
