"""Scripts that run a model in a process of their own, each in its runtime's environment: they import `turns` beside them."""
