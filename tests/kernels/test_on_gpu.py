"""What runs on a GPU, on one: `pytest -m gpu`. The interpreter and the emulator stand in for it elsewhere."""

from functools import partial

import packed_weights
import pytest
import torch

from compress.kernels.dispatch import Preferences, implementations, refusals
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded
from compress.kernels.implementation import Case
from compress.kernels.inference import CompressedLinear, LayerParts
from compress.kernels.inputs import InputQuantizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
GPU = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)
SHAPE = (256, 512)
WEIGHTS = {
    **{f"W{bits} g64": partial(packed_weights.int_weight, SHAPE, bits, 64) for bits in (2, 3, 4, 8)},
    **{f"W{bits} asym": partial(packed_weights.int_weight, SHAPE, bits, 128, False) for bits in (2, 3, 4, 8)},
    "W4, a scale a row": partial(packed_weights.int_weight, SHAPE, 4, 512),
    **{f"2:4 W{bits}": partial(packed_weights.sparse_weight, SHAPE, bits, 128) for bits in (2, 4, 8)},
    "codebooks": partial(packed_weights.codebook_weight, SHAPE),
}
TOKENS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 257)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_all_that_serve_are_as_exact_as_the_dtype(name, dtype):
    weight = WEIGHTS[name](dtype=dtype)
    case = Case(weight, GPU, dtype)
    served = [kind for kind, reason in refusals(case).items() if reason is None and not implementations()[kind].CODES]
    assert any(kind.startswith(("triton", "gluon")) for kind in served)
    for kind in served:
        made = implementations()[kind](case).to(GPU)
        for tokens in TOKENS:
            x = torch.randn(tokens, SHAPE[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
            for tilings in [(), *([each] for each in made.candidates(tokens))]:
                made.tilings = tilings
                error = excess_error(made(x.to(GPU)).cpu(), linear_rounded(x, weight), linear64(x, weight))
                assert error <= 1.25, (kind, tokens, tilings, error)


@pytest.mark.parametrize("static", [False, True])
def test_products_of_bytes_are_those_of_the_codes(static):
    weight = packed_weights.int_weight(SHAPE, 8, SHAPE[1])
    inputs = InputQuantizer(8, static)
    parts = LayerParts(weight, torch.ones(SHAPE[0]), inputs=inputs)
    forced = Preferences(forced="triton-w8a8")
    x = torch.randn(33, SHAPE[1], generator=torch.Generator().manual_seed(0)).mul(20 if static else 1).half()
    there = CompressedLinear(parts, torch.float16, GPU, forced)(x.to(GPU)).cpu()
    here = CompressedLinear(parts, torch.float16, torch.device("cpu"), Preferences(measuring=False))(x)
    torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-3)
