"""From a record to tokens to a packed row.

Knows tokenizers, but no model."""
