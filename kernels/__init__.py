"""Packed weights and the arithmetic on them."""
