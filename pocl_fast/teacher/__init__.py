"""A frozen model, and what of it is kept on disk.

Knows the losses' teacher outputs, but no curriculum."""
