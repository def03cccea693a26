"""`compress bench peers`: other libraries beside ours, each in an environment of its own."""
