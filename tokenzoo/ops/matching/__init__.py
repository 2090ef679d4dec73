"""Which token merges into which."""
