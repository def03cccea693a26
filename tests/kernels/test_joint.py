import pytest
import torch
from packed_weights import codebook_weight, int_weight, sparse_weight

from compress.kernels.correction import Correction
from compress.kernels.dispatch import Preferences, choose
from compress.kernels.inference import CompressedLinear, LayerParts
from compress.kernels.inputs import InputQuantizer
from compress.kernels.joint import JointLinear, JointPart, joinable, joined

CPU = torch.device("cpu")
UNMEASURED = Preferences(measuring=False)
SIZES = (48, 16, 32)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def joint_of(parts):
    layer = CompressedLinear(joined(parts), torch.float32, CPU, UNMEASURED)
    joint = JointLinear(layer, [each.weight.shape[0] for each in parts])
    return joint, [JointPart(joint, index) for index in range(len(parts))]


def key(parts):
    return joinable(parts, choose(parts.case(torch.float32, CPU), UNMEASURED))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("inputs", [None, InputQuantizer(8), InputQuantizer(8, True, torch.randn(64))])
def test_together_they_give_what_each_gives(inputs, tokens):
    biases = [None, torch.randn(16), None]
    parts = [LayerParts(int_weight((n, 64), 8, 64), b, inputs=inputs) for n, b in zip(SIZES, biases, strict=True)]
    assert len({key(each) for each in parts}) == 1
    x = torch.randn(2, tokens, 64)
    for part, alone in zip(joint_of(parts)[1], parts, strict=True):
        y = part(x)
        torch.testing.assert_close(y, CompressedLinear(alone, torch.float32, CPU, UNMEASURED)(x))
        assert y.is_contiguous()


def test_one_product_for_all_and_another_for_another_input():
    joint, parts = joint_of([LayerParts(int_weight((n, 64), 4, 32)) for n in SIZES])
    calls = []
    joint.layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 1, 64)
    first = [part(x) for part in parts]
    assert len(calls) == 1 and joint._made is None  # nothing is held when all are served
    other = x.clone() * 2
    parts[0](x), parts[0](other)
    assert len(calls) == 3
    other.mul_(0.5)
    assert torch.equal(parts[1](other), first[1]) and len(calls) == 4  # changed in place: made again


def test_what_does_not_fit_stays_alone():
    four = LayerParts(int_weight((32, 64), 4, 32))
    assert key(four) == key(LayerParts(int_weight((16, 64), 4, 32)))
    assert key(four) != key(LayerParts(int_weight((32, 64), 4, 64)))
    assert key(four) != key(LayerParts(int_weight((32, 64), 8, 32)))
    assert key(four) != key(LayerParts(int_weight((32, 64), 4, 32), inputs=InputQuantizer(8)))
    assert key(four) != key(LayerParts(sparse_weight((32, 64), 4, 32)))
    shifted = [LayerParts(four.weight, inputs=InputQuantizer(8, True, torch.full((64,), v))) for v in (0.0, 1.0)]
    assert key(shifted[0]) != key(shifted[1])
    assert key(LayerParts(codebook_weight((32, 64)))) is None  # its codebooks are shared by all of its rows
    assert key(LayerParts(four.weight, correction=Correction(torch.ones(1, 64), torch.ones(32, 1)))) is None
