"""Files that survive a crash, folders with an owner, archives from anywhere."""
