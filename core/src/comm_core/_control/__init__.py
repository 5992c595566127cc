"""How the ranks of a group talk around the hot path, and what bounds every wait."""
