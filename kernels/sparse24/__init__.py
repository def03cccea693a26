"""Products with integer weights of which two in four are kept."""
