"""One file a kind of base."""
