"""A run's folder: its files, its lock, and the stamps that say what each step was made from. Knows no model."""
