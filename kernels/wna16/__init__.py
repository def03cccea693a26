"""Products of half-precision inputs and integer weights."""
