"""Measurements of speed, memory and quality: every figure the documentation claims comes from here."""
