"""A frozen model, and the cache on disk of what it computes.

Knows the losses' teacher outputs, but no curriculum."""
