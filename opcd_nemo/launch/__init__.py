"""How a command starts: its configuration, its ranks, its output and its exit code."""
