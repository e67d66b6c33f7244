"""Knows the load of every expert, and where experts should lie."""
