"""Which weights go: one file per method."""
