"""A student as a model that others can load."""
