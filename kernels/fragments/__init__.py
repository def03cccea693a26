"""Products of few tokens on NVIDIA GPUs, with weights in the order in which tensor cores take them."""
