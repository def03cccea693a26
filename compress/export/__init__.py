"""Checkpoints as other runtimes store them: one file a runtime, named after it."""
