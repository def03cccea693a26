"""Products with weights that are sums of codebook vectors."""
