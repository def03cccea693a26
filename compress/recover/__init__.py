"""Methods that win back what compression lost: a file each."""
