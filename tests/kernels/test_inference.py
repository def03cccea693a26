from dataclasses import replace

import pytest
import torch
from packed_weights import codebook_weight, int_weight
from torch import nn

from compress.errors import InputError
from compress.kernels.correction import Correction
from compress.kernels.dense import Dense
from compress.kernels.dispatch import Choice, Preferences
from compress.kernels.gemm.launch import Epilogue
from compress.kernels.gemm.reference import linear64
from compress.kernels.inference import CompressedLinear, LayerParts, PackedEmbedding
from compress.kernels.inputs import InputQuantizer
from compress.kernels.w8a8.reference import fake_linear

CPU = torch.device("cpu")
UNMEASURED = Preferences(measuring=False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer(parts, dtype=torch.bfloat16, preferences=UNMEASURED):
    return CompressedLinear(parts, dtype, CPU, preferences)


def relative(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("prompts", ["dense", "decode", "packed"])
def test_few_and_many_tokens_agree(tokens, prompts):
    weight, bias = int_weight((48, 128), 4, 64), torch.randn(48).bfloat16()
    x = torch.randn(2, tokens, 128).bfloat16()
    y = layer(LayerParts(weight, bias), preferences=Preferences(prompts, None, False))(x)
    assert y.shape == (2, tokens, 48) and y.dtype == torch.bfloat16
    assert relative(y, x.double() @ weight.dequantize().double().T + bias.double()) < 4e-3


@pytest.mark.parametrize("single", [False, True])
def test_a_correction_is_added(single):
    weight = int_weight((48, 128), 4, 64)
    index = torch.tensor([0, 3, 130, 6143], dtype=torch.int32) if single else None
    value = torch.tensor([1.0, -2.0, 3.0, 4.0]) if single else None
    correction = Correction(torch.randn(4, 128), torch.randn(48, 4), index, value)
    x = torch.randn(5, 128)
    y = layer(LayerParts(weight, correction=correction), torch.float32)(x)
    assert relative(y, x.double() @ (weight.dequantize() + correction.delta()).double().T) < 1e-6


def test_a_correction_of_single_weights_alone():
    weight = int_weight((48, 128), 4, 64)
    correction = Correction(torch.empty(0, 128), torch.empty(48, 0), torch.tensor([7]), torch.tensor([5.0]))
    x = torch.randn(5, 128)
    y = layer(LayerParts(weight, correction=correction), torch.float32)(x)
    assert relative(y, x.double() @ (weight.dequantize() + correction.delta()).double().T) < 1e-6


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("static", [False, True])
def test_quantized_inputs(static, bits, group_size):
    weight, bias = int_weight((48, 128), 8, group_size), torch.randn(48)
    shift = torch.randn(128) if static else None
    quantizer = InputQuantizer(bits, static, shift)
    x = torch.randn(7, 128) * (3 if static else 1)
    y = layer(LayerParts(weight, bias, inputs=quantizer), torch.float32)(x)
    assert relative(y, fake_linear(x, quantizer, weight, bias)) < 1e-6
    assert not static or relative(y, fake_linear(x, replace(quantizer, shift=None), weight, bias)) > 1e-2


def test_forcing_what_cannot_serve_fails_at_load():
    with pytest.raises(InputError, match="cpu-int4 cannot serve"):
        layer(LayerParts(int_weight((48, 128), 8, 128)), preferences=Preferences(forced="cpu-int4"))


def test_nothing_learns_and_nothing_is_saved():
    made = layer(LayerParts(int_weight((48, 128), 4, 64)))
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert [name for name, tensor in made.state_dict().items() if tensor.numel()] == []


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


@pytest.mark.parametrize(
    "weight", [int_weight((32, 64), 8, 64), int_weight((32, 64), 4, 32), codebook_weight((32, 64))]
)
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_an_embedding_looks_up_decoded_rows(kind, weight):
    module = kind(32, 64)
    PackedEmbedding.take_over(module, weight, torch.float32, CPU)
    ids = torch.tensor([[0, 5, 31], [5, 5, 1]])
    expected = weight.dequantize()[ids] * (3 if kind is Scaled else 1)
    assert torch.equal(module(ids), expected) and isinstance(module, kind)
    assert module.weight.dtype == torch.float32 and module.weight.numel() == 0


class Added(Dense):
    EPILOGUE = True

    def forward(self, x, epilogue=Epilogue()):
        return linear64(x, self.held, epilogue).to(x.dtype)


@pytest.mark.parametrize("single", [False, True])
def test_what_is_added_goes_to_an_implementation_that_takes_it(single, monkeypatch):
    weight, bias = int_weight((48, 128), 4, 64), torch.randn(48)
    index, value = (torch.tensor([3]), torch.tensor([5.0])) if single else (None, None)
    correction = Correction(torch.randn(4, 128), torch.randn(48, 4), index, value)
    monkeypatch.setattr(Added, "held", weight, raising=False)
    made = layer(LayerParts(weight, bias, correction), torch.float32, Choice(Added, None, 0, "given"))
    x = torch.randn(5, 128)
    expected = x.double() @ (weight.dequantize() + correction.delta()).double().T + bias.double()
    assert relative(made(x), expected) < 1e-6
