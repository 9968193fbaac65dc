"""A run directory and the steps that fill it.

Knows every other room, and computes nothing itself."""
