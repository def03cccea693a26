"""All implementations for processors at once: they say what they serve, and what they serve is right."""

import itertools
from dataclasses import replace
from functools import partial

import packed_weights
import pytest
import torch

from compress.kernels.dispatch import implementations, refusals
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded
from compress.kernels.implementation import Case
from compress.kernels.inputs import InputQuantizer

CPU = torch.device("cpu")
int_weight = partial(packed_weights.int_weight, dtype=torch.bfloat16)  # scales
sparse_weight = partial(packed_weights.sparse_weight, dtype=torch.bfloat16)
codebook_weight = partial(packed_weights.codebook_weight, dtype=torch.bfloat16)
WEIGHTS = {
    **{f"W{bits} g{size}": int_weight((48, 256), bits, size) for bits, size in ((2, 64), (3, 128), (4, 32), (8, 128))},
    **{f"W{bits} g256": int_weight((48, 256), bits, 256) for bits in (4, 8)},
    **{f"W{bits} g64 asym": int_weight((48, 256), bits, 64, False) for bits in (2, 3, 4, 8)},
    "W4 g256 asym": int_weight((48, 256), 4, 256, False),
    "W5 g64": int_weight((48, 256), 5, 64),
    "W4 g96": int_weight((48, 192), 4, 96),
    "W4 g16": int_weight((48, 256), 4, 16),
    "W4, ragged": int_weight((37, 100), 4, 100),
    "W8, ragged": int_weight((37, 100), 8, 100),
    "W4, one group": int_weight((5, 32), 4, 32),
    "2:4 W4": sparse_weight((48, 256), 4, 64),
    "2:4 W4 asym": sparse_weight((48, 256), 4, 64, False),
    "2:4 W8": sparse_weight((48, 256), 8, 256),
    "codebooks": codebook_weight((48, 256)),
    "one codebook": codebook_weight((48, 64), 1, 4, 4),
}
SERVES = [
    (name, layout, dtype)
    for layout, weight in WEIGHTS.items()
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name, reason in refusals(Case(weight, CPU, dtype)).items()
    if reason is None
]
ROUNDED_TWICE = [
    *(("cpu-int4", layout) for layout in ("W4 g64 asym", "W4 g256 asym", "2:4 W4 asym")),
    ("cpu-int4x2", "W8 g64 asym"),
]
TOKENS = (1, 3, 17, 65)


def product(name, case):
    return implementations()[name](case)


def inputs(kind, tokens, features):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, features, generator=generator)
    if kind == "constant rows":
        return x[:, :1].expand(tokens, features).contiguous()
    if kind == "one huge channel":
        x[:, features // 3] = 1000.0
    return x


@pytest.mark.parametrize(("name", "layout", "dtype"), SERVES)
def test_the_identity_gives_the_weight(name, layout, dtype):
    weight = WEIGHTS[layout]
    y = product(name, Case(weight, CPU, dtype))(torch.eye(weight.shape[1], dtype=dtype))
    expected = weight.dequantize().T
    if name == "cpu-lookup" or (name, layout) in ROUNDED_TWICE:
        torch.testing.assert_close(y.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)  # rounded twice
    else:
        torch.testing.assert_close(y, expected.to(dtype), rtol=3e-7 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize(("name", "layout", "dtype"), [each for each in SERVES if each[2] != torch.float32])
def test_as_exact_as_the_dtype(name, layout, dtype):
    weight = WEIGHTS[layout]
    implementation = product(name, Case(weight, CPU, dtype))
    for kind, tokens in itertools.product(("normal", "constant rows", "one huge channel"), TOKENS):
        x = inputs(kind, tokens, weight.shape[1]).to(dtype)
        found = excess_error(implementation(x), linear_rounded(x, weight), linear64(x, weight))
        twice = (name, layout) in ROUNDED_TWICE
        assert found <= (2 if twice and kind != "normal" else 1.25), (kind, tokens, found)


def test_each_serves_something_and_says_why_not_elsewhere():
    served = {name for name, *_ in SERVES}
    assert served == {name for name in implementations() if not name.startswith(("triton", "gluon"))} - {"cpu-w8a8"}
    for weight in WEIGHTS.values():
        reasons = refusals(Case(weight, CPU, torch.bfloat16))
        assert all(reason is None or len(reason.split()) > 3 for reason in reasons.values())
        assert reasons["reference"] is reasons["dense"] is None
    on_gpu = refusals(Case(WEIGHTS["W4 g32"], torch.device("cuda"), torch.bfloat16))
    assert "not on cuda" in on_gpu["cpu-int4"]


def test_weights_without_values_are_judged_alike():
    for weight in WEIGHTS.values():
        empty = weight.without_values(weight.shape[0], weight.description())
        assert refusals(Case(empty, CPU, torch.bfloat16)) == refusals(Case(weight, CPU, torch.bfloat16))


def test_bytes_times_bytes_are_exact():
    weight = int_weight((48, 256), 8, 256)
    case = Case(weight, CPU, torch.bfloat16, InputQuantizer(8))
    assert refusals(case)["cpu-w8a8"] is None
    assert "not quantized" in refusals(replace(case, inputs=None))["cpu-w8a8"]
    for tokens in TOKENS:
        x = torch.randint(-128, 128, (tokens, 256), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        y = product("cpu-w8a8", case)(x)
        torch.testing.assert_close(y.double(), linear64(x, weight), rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("group_size", [64, 256])
def test_zeros_stay_zeros(group_size):
    weight = int_weight((32, 256), 8, group_size)
    for name, reason in refusals(Case(weight, CPU, torch.bfloat16)).items():
        if reason is None:
            y = product(name, Case(weight, CPU, torch.bfloat16))(torch.zeros(2, 256, dtype=torch.bfloat16))
            assert not y.any()
