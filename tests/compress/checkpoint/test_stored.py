import pytest
import torch

from compress.checkpoint.stored import exact, group_sizes, refuse
from compress.errors import RunError


def test_rows_as_long_as_a_group_join_the_groups_of_longer_rows(make_layer):
    short = make_layer("short", shape=(32, 32), group_size=32)
    long = make_layer("long", shape=(32, 64), group_size=32)
    assert group_sizes([short, long]) == {"short": 32, "long": 32}


def test_one_scale_a_row_everywhere_is_per_channel(make_layer):
    layers = [make_layer("a", shape=(32, 32), group_size=32), make_layer("b", shape=(32, 64), group_size=64)]
    assert group_sizes(layers) == {"a": -1, "b": -1}


def test_a_refusal_names_the_first_layer_it_applies_to(make_layer):
    layers = [make_layer("a", bits=4), make_layer("b", bits=3), make_layer("c", bits=3)]
    reasons = [(lambda layer: layer.packed.bits == 8, "eight"), (lambda layer: layer.packed.bits == 3, "{name} is odd")]
    assert refuse(layers, reasons) == "b is odd"
    assert refuse(layers[:1], reasons) is None


def test_scales_change_dtype_only_if_they_stay_the_same():
    scale = torch.tensor([[0.5, 2**-14 * 1.5]], dtype=torch.float16)
    assert torch.equal(exact(scale, torch.bfloat16, "x").float(), scale.float())
    with pytest.raises(RunError, match=r"scales of x are torch.float16 and do not fit torch.bfloat16: quantize again"):
        exact(torch.tensor([[1.0009765625]], dtype=torch.float16), torch.bfloat16, "x")
    with pytest.raises(RunError, match=r"do not fit torch\.float16"):
        exact(torch.tensor([[1e6]], dtype=torch.bfloat16), torch.float16, "x")
