"""Measured figures, printed as a table; nothing here asserts a time."""
