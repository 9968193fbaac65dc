"""Text that models generate, and how good and how likely it is.

Knows models, but no training."""
