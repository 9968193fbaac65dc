"""The text that a template writes of a conversation, and where in it the answers are.

Knows jinja and what templates do. Knows no token ids."""
