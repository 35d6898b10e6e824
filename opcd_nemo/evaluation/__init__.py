"""Scores, their intervals, and the files that show them."""
