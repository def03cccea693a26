import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.inputs import InputQuantizer


def inputs(seed=0, shape=(7, 32), dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 40).to(dtype)


@given(
    bits=st.sampled_from([4, 6, 8]),
    static=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.floats(1e-3, 300),
    seed=st.integers(0, 99),
)
def test_codes_stay_in_range_and_stand_for_the_nearest_value(bits, static, dtype, size, seed):
    x = (inputs(seed) * size).to(dtype)
    quantizer = InputQuantizer(bits, static)
    codes, scale = quantizer.codes(x), quantizer.token_scale(x)
    assert codes.dtype == torch.int8
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    step = torch.ones(len(x), 1) if scale is None else scale
    inside = x.float().abs() <= quantizer.highest * step
    assert ((codes * step - x.float()).abs() <= step / 2 * (1 + 1e-5))[inside].all()
    decoded = quantizer.fake(x)
    assert decoded.dtype == dtype and torch.equal(decoded, (codes * step).to(dtype))


def test_a_token_uses_all_codes_whatever_its_size_and_zeros_stay_zeros():
    x = torch.cat([inputs() * 1e-6, inputs() * 1e6, torch.zeros(1, 32)])
    codes = InputQuantizer(8).codes(x)
    assert (codes[:-1].abs().amax(1) == 127).all() and not codes[-1].any()
    assert torch.equal(InputQuantizer(8).fake(x)[-1], torch.zeros(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shift_is_taken_off_before_rounding_and_put_back_after(dtype):
    x, shift = inputs(dtype=dtype), torch.linspace(-30, 30, 32)
    quantizer = InputQuantizer(8, True, shift)
    codes = (x.float() - shift).round().clamp(-128, 127)
    assert torch.equal(quantizer.codes(x).float(), codes)
    assert torch.equal(quantizer.fake(x), (codes + shift).to(dtype))


def test_saturation_counts_what_the_codes_cannot_hold():
    x = torch.tensor([[127.4, 127.6, 300.0, -128.4, -128.6, 0.0]])
    assert InputQuantizer(8, True).saturated(x) == 3
    assert InputQuantizer(8, True, torch.full((6,), -1.0)).saturated(x) == 3
    assert InputQuantizer(8).saturated(x) == 0
