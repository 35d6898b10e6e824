"""Games on small boards."""
