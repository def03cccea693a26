"""What the matrix products over packed weights share: launches, split-K, the end of a tile."""
