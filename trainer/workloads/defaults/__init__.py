"""What frameworks do to replicas by default, counted as it comes; and beside it, by the same body, what cures it."""
