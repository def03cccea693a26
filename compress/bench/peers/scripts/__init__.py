"""Scripts that run inside a peer's environment, which does not have this package: they import `protocol` beside them."""
