"""How much each layer is asked to give: one file per rule."""
