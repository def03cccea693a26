"""How the weights that stay are rounded: one file per method."""
