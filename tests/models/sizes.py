"""Layers that have a name and a shape, and nothing else, to try allocations on."""

from compress.allocate.spread import LayerSize


def layer_sizes(n_blocks=4):
    """Attention and MLP of unequal size, the first block's MLP larger."""
    layers = []
    for block in range(n_blocks):
        layers.append(LayerSize(f"model.layers.{block}.attn.q", block, (48, 64)))
        layers.append(LayerSize(f"model.layers.{block}.mlp.up", block, (192 if block == 0 else 96, 64)))
    return layers
