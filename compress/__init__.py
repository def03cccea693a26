"""Compress causal language models: calibrate, prune, quantize, recover, and write a checkpoint others load."""

__version__ = "0.1.0"
