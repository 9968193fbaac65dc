"""The optimisation: `PoclTrainer` and its parts.

Knows a folder for its checkpoints, but no run directory."""
