"""A block whose codes ranks have a share of each, and what every rank checks of it in a process of its own."""

import os

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from compress.calib.ranks import joined
from compress.kernels.correction import Correction
from compress.kernels.linear import PackedLinear
from compress.kernels.weights import Grid, IntWeight
from compress.sharing import share_codes

IN, OUT = 64, 48


def a_block():
    """Two packed layers and one that is not, and what learns beside them."""
    generator = torch.Generator().manual_seed(0)

    def packed(out, inputs):
        weight = torch.randn(out, inputs, generator=generator)
        groups = weight.unflatten(1, (-1, 16))
        grid = Grid.fit(groups, 3, False, torch.float16)
        weight = IntWeight.from_codes(grid.encode_groups(groups).flatten(1), grid, 16, False, torch.float16)
        return PackedLinear(weight, None, torch.float32)

    dense = nn.Linear(OUT, OUT, bias=False).requires_grad_(False)
    dense.weight.normal_(generator=generator)
    block = nn.Sequential(packed(OUT, IN), nn.ReLU(), dense, packed(IN, OUT))
    block[0].correction = Correction(torch.ones(2, IN), torch.full((OUT, 2), 0.01))
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    return block


def learned(block):
    """The loss, and the gradient of what comes before the block."""
    before = nn.Parameter(torch.linspace(-1, 1, 5 * IN).view(5, IN))
    loss = block(before).square().sum()
    loss.backward()
    return loss.detach(), before.grad


def held(block):
    """Bytes of codes that this rank has."""
    codes = [code for module in block.modules() if isinstance(module, PackedLinear) for code in module.as_parameters()]
    own = [code.to_local() if hasattr(code, "to_local") else code for code in codes]
    return sum(each.numel() * each.element_size() for each in own)


def a_rank(number, port):
    """What each process checks of its own share."""
    told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    block, whole = a_block(), a_block()
    loss, gradient = learned(whole)
    with joined("cpu") as ranks:
        share_codes(block, ranks)
        assert held(block) == held(whole) / 2
        for _ in range(2):
            found = learned(block)
            assert torch.equal(found[0], loss) and torch.equal(found[1], gradient)
            assert held(block) == held(whole) / 2, "what is others' was let go of"
        with torch.no_grad():
            assert torch.equal(block(torch.ones(2, IN)), whole(torch.ones(2, IN)))
        for own, theirs in ((block[0], whole[0]), (block[3], whole[3])):
            assert torch.equal(own.packed.dequantize(), theirs.packed.dequantize())
        assert held(block) == held(whole) / 2
