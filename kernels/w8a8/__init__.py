"""Products of integer inputs and integer weights."""
