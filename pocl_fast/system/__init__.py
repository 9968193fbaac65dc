"""Files, processes and the console.

Knows no model and no sample."""
