"""Which norms emit the inputs of linear layers, found by watching, and what dividing one does."""

import pytest
import torch
from tiny import save_tiny
from torch import nn

from compress.calib.norms import Norm, emitting_norms
from compress.calib.observe import shared_inputs
from compress.pipeline import open_model

QKV, MLP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
FOUND = {  # the layers that read each norm alone
    "llama": [QKV, MLP],
    "gemma3_text": [QKV, MLP],
    "phi": [QKV | {"fc1"}],
    "cohere": [QKV | MLP],
    "opt": [QKV, {"fc1"}],
    "gpt2": [{"c_attn"}, {"c_fc"}],
    "olmo2": [],  # norms come after the layers
    "mixtral": [QKV],  # a router reads the other norm too
    "deepseek_v3": [{"q_a_proj", "kv_a_proj_with_mqa"}, {"q_b_proj"}],
    "mamba": [{"in_proj"}],
}


def found_in(folder):
    model = open_model(folder)
    hidden = model.embed(torch.arange(3, 30))
    block = model.load_block(1)
    shared = shared_inputs(block, hidden)
    return emitting_norms(block, shared, hidden), shared


@pytest.mark.parametrize("architecture", FOUND)
def test_norms_that_only_linear_layers_read_are_found(tmp_path, architecture):
    norms, shared = found_in(save_tiny(tmp_path, architecture))
    readers = [{name.rpartition(".")[2] for name in shared if shared[name] == first} for first in norms]
    assert readers == FOUND[architecture]
    offset = 1.0 if architecture.startswith("gemma") else 0.0
    assert all(norm.offset == offset for norm in norms.values())
    assert all(norm.has_bias == (architecture in ("phi", "opt", "gpt2")) for norm in norms.values())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("opt", {"do_layer_norm_before": False}), ("bloom", {"apply_residual_connection_post_layernorm": True})],
)
def test_a_norm_that_the_residual_stream_reads_as_well_is_left_alone(tmp_path, architecture, changes):
    assert found_in(save_tiny(tmp_path, architecture, **changes))[0] == {}


class OffsetNorm(nn.RMSNorm):
    def forward(self, x):
        return (1 + self.weight) * nn.functional.rms_norm(x, self.normalized_shape)


def norm_of(kind, dtype=torch.float32, features=64):
    module = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "offset": OffsetNorm}[kind](features)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = (torch.randn(features, generator=generator) * 2).to(dtype)
    return Norm(module, 1.0 if kind == "offset" else 0.0)


def emitted(norm, x):
    """In float64, so that only the parameters are rounded."""
    with torch.no_grad():
        return norm.module.double()(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms", "offset"])
@pytest.mark.parametrize("shifts", [False, True])
def test_a_divided_norm_emits_what_it_says_however_its_parameters_are_rounded(kind, shifts, dtype):
    norm, x = norm_of(kind, dtype), torch.randn(9, 64, dtype=torch.float64)
    before = emitted(norm_of(kind, dtype), x)
    asked, shift = torch.logspace(-2, 1, 64), torch.linspace(-3, 3, 64) if shifts and norm.has_bias else None
    scale, moved = norm.divide(asked, shift)
    assert (moved is None) == (shift is None)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    exact = emitted(norm, x) * scale + (0 if moved is None else moved)
    first = norm_of(kind, dtype)
    of_bias = first.module.bias.detach().abs() * rounding if norm.has_bias and shift is None else 0.0
    assert ((exact - before).abs() <= 1e-5 * (1 + before.abs()) + of_bias).all()
    gain = ((first.offset + first.module.weight.detach().float()) / asked).abs()
    assert ((scale / asked - 1).abs() <= rounding * (1 + 2 * first.offset / gain)).all()


@pytest.mark.parametrize("kind", ["rms", "offset"])
def test_a_channel_without_gain_stays_so_and_takes_the_scale_it_is_given(kind):
    norm = norm_of(kind, torch.bfloat16)
    norm.module.weight.data[3] = -norm.offset
    scale, _ = norm.divide(torch.full((64,), 0.3))
    assert scale[3] == torch.tensor(0.3) and not emitted(norm, torch.randn(2, 64, dtype=torch.float64))[:, 3].any()


def test_a_gain_too_small_to_be_divided_keeps_its_scale():
    norm = norm_of("offset", torch.bfloat16)
    norm.module.weight.data[3] = 2**-8 - 1
    scale, _ = norm.divide(torch.full((64,), 1e6))
    assert scale[3] == 1 and norm.module.weight[3] == 2**-8 - 1
