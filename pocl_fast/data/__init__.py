"""From a sample to tokens to a packed row.

Knows tokenizers, but no model."""
