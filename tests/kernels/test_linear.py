"""Linear layers that make their weight when they need it: the numbers of a dense one, and less kept for backward."""

import copy

import pytest
import torch
from torch import nn

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.linear import PackedLinear, recomputed_linear
from compress.kernels.packing import pack
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight

OUT, IN, TOKENS = 48, 64, 10
LAYOUTS = ("int", "int-2:4", "codebook")


def random_weight(layout, seed=0):
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(OUT, 2, generator=random).half() * 0.1 + 0.01
    if layout == "codebook":
        codes = torch.randint(0, 16, (OUT, IN // 8, 2), generator=random)
        codebooks = torch.randn(2, 16, 8, generator=random).half()
        return CodebookWeight.from_codes(codes, codebooks, scale[:, :1].contiguous())
    codes = torch.randint(0, 16, (OUT, IN), generator=random)
    keep = torch.rand(OUT, IN // 4, 4, generator=random).argsort(-1).flatten(1) < 2
    if layout == "int":
        zero_point = torch.randint(0, 16, (OUT, 2), generator=random).to(torch.uint8)
        return IntWeight(pack(codes, 4), scale, zero_point, 4, 32, IN)
    codes = codes.masked_fill(~keep, 8)
    return Sparse24IntWeight.from_int(IntWeight(pack(codes, 4), scale, None, 4, 32, IN), keep)


def inputs(dtype=torch.float32, *shape):
    return torch.randn(*(shape or (2, TOKENS, IN)), generator=torch.Generator().manual_seed(1)).to(dtype)


def kept_by(forward):
    """What autograd keeps of a forward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    return out, kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_the_gradient_of_the_input_are_those_of_the_dense_layer(layout, dtype):
    packed, bias = random_weight(layout), inputs(dtype, OUT)
    layer, x = PackedLinear(packed, bias, dtype), inputs(dtype).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    out, wanted = layer(x), nn.functional.linear(reference, packed.dequantize().to(dtype)) + bias
    assert torch.equal(out, wanted) and out.dtype == dtype
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, reference.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_the_input_nor_a_dense_weight_is_kept(layout):
    layer, x = PackedLinear(random_weight(layout), None, torch.float32), inputs().requires_grad_()
    out, kept = kept_by(lambda: layer(x * 1.0))
    assert out.requires_grad
    assert all(tensor.numel() not in (OUT * IN, x.numel()) for tensor in kept)
    _, dense = kept_by(lambda: nn.functional.linear(x * 1.0, torch.randn(OUT, IN)))
    assert any(tensor.numel() == OUT * IN for tensor in dense), "or else nothing was measured"


@pytest.mark.parametrize("shape", [(IN,), (TOKENS, IN), (2, TOKENS, IN)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_what_makes_the_weight_are_those_of_autograd(shape, dtype):
    def make(base, scale, offset):
        return base * scale.repeat_interleave(IN // 4, dim=1) + offset

    def parameters():
        random = torch.Generator().manual_seed(2)
        shapes, learns = ((OUT, IN), (OUT, 4), (OUT, 1)), (False, True, True)
        return [
            torch.randn(s, generator=random, dtype=dtype).requires_grad_(each)
            for s, each in zip(shapes, learns, strict=True)
        ]

    ours, theirs, x = parameters(), parameters(), inputs(dtype, *shape).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    out, kept = kept_by(lambda: recomputed_linear(x, make, *ours))
    wanted = nn.functional.linear(reference, make(*theirs))
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, reference.grad)
    assert ours[0].grad is None
    for mine, its in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in (x, *ours)}


def test_a_parameter_learns_where_the_input_does_not():
    scale = torch.ones(OUT, 1, requires_grad=True)
    recomputed_linear(inputs(), lambda s: s * torch.ones(OUT, IN), scale).sum().backward()
    torch.testing.assert_close(scale.grad, inputs().sum().expand(OUT, 1))


def test_numeric_gradients():
    x = inputs(torch.float64, 3, 8).requires_grad_()
    table = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: recomputed_linear(x, lambda t: t.repeat(1, 4).tanh(), t), (x, table))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_survives_copies_dtypes_and_state_dicts(layout):
    packed = random_weight(layout)
    layer = PackedLinear(packed, None, torch.float32)
    other = PackedLinear(random_weight(layout, seed=3), None, torch.float32)
    assert not torch.equal(other.dequantize(), layer.dequantize())
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), copy.deepcopy(layer).to("cpu").bfloat16(), other):
        assert torch.equal(same.packed.dequantize(), packed.dequantize()), "a scale that was rounded is another scale"
        assert same.packed.description() == packed.description() and type(same.packed) is type(packed)
    meta = copy.deepcopy(layer).to("meta")
    assert all(tensor.is_meta for tensor in meta.packed.tensors().values())


def test_it_takes_the_memory_of_its_codes():
    layer = PackedLinear(random_weight("int"), None, torch.float32)
    held = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert held == layer.packed.nbytes < OUT * IN


def test_pefts_own_lora_attaches_and_learns():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"q_proj": PackedLinear(random_weight("int"), None, torch.float32)})
    x = inputs()
    before = model["q_proj"](x)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]), model)
    assert isinstance(model["q_proj"].base_layer, PackedLinear)
    out = model["q_proj"](x)
    assert torch.equal(out, before), "B is zero"
    out.square().sum().backward()
    assert model["q_proj"].lora_B["default"].weight.grad.abs().sum() > 0
    assert model["q_proj"].base_layer.weight.grad is None
