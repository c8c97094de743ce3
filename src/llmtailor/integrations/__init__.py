"""Training frameworks; each module imports its framework and is imported only by name."""
