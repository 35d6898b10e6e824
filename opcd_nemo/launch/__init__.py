"""How a program starts: its configuration, its ranks, its exit code."""
