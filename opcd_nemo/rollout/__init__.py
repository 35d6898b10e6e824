"""Sampling answers: tokens, conversations, episodes."""
