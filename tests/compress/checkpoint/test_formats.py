from pathlib import Path

import pytest
import torch

import compress.checkpoint
from compress.calib.weight_files import WeightFiles
from compress.checkpoint import compressed_tensors, gptq, native
from compress.checkpoint.formats import choose_format, find_format, format_names, open_weights
from compress.errors import InputError


def test_a_format_is_called_as_its_file():
    assert format_names() == ["compressed-tensors", "gptq", "native"]
    assert find_format("compressed-tensors") is compressed_tensors
    for name in format_names():
        assert Path(find_format(name).__file__).parent == Path(compress.checkpoint.__file__).parent


@pytest.mark.parametrize("name", ["awq", "writer", "compressed_tensors", "../native", "dense", ""])
def test_an_unknown_format_lists_the_known_ones(name):
    with pytest.raises(InputError, match="choose compressed-tensors, gptq, native or auto"):
        find_format(name)


def test_every_format_has_the_same_functions():
    for name in format_names():
        module = find_format(name)
        for function in ("refusal", "layer_tensors", "quantization_config", "side_files", "READER"):
            assert callable(getattr(module, function))


def test_auto_takes_the_first_format_that_holds_everything(make_layer):
    assert choose_format("auto", [make_layer("a", bits=3, symmetric=False)])[0] == "compressed-tensors"
    kinds = [make_layer("a", bits=3, symmetric=False), make_layer("b", bits=4)]
    name, reason = choose_format("auto", kinds)
    assert name == "native" and "transformers cannot load asymmetric ones" in reason
    assert choose_format("compressed-tensors", kinds)[0] == "compressed-tensors", "if asked for"
    assert choose_format("auto", kinds[1:], lambda name: None if name == "native" else "too large")[0] == "native"
    name, reason = choose_format("auto", [make_layer("a"), make_layer("e.0", param="e", index=0)])
    assert name == "native" and "e.0, a slice of one parameter" in reason


def test_a_format_asked_for_is_taken_or_refused(make_layer):
    assert choose_format("gptq", [make_layer("a")])[0] == "gptq"
    with pytest.raises(InputError, match="a has neither: compressed-tensors can hold it; choose another --format"):
        choose_format("gptq", [make_layer("a", bits=3)])
    with pytest.raises(InputError, match='no checkpoint format "awq"'):
        choose_format("awq", [make_layer("a")])


def test_without_quantized_layers_a_checkpoint_is_ordinary():
    assert choose_format("auto", [])[0] == "dense"
    with pytest.raises(InputError, match="nothing is quantized that --format gptq could hold"):
        choose_format("gptq", [])
    with pytest.raises(InputError, match='no checkpoint format "awq"'):
        choose_format("awq", [])


@pytest.mark.parametrize("module", [compressed_tensors, gptq, native])
def test_a_checkpoint_is_opened_by_the_reader_of_its_format(tmp_path, make_layer, make_checkpoint, module):
    layer = make_layer("a")
    tensors = module.layer_tensors(layer, torch.float16)
    files = open_weights(make_checkpoint(tmp_path, tensors, module.quantization_config([layer], [])))
    assert type(files) is module.READER
    assert torch.equal(files.read("a.weight"), layer.packed.dequantize().half())


def test_an_ordinary_checkpoint_is_read_as_it_is(tmp_path, make_checkpoint):
    files = open_weights(make_checkpoint(tmp_path, {"a": torch.ones(2)}, None))
    assert type(files) is WeightFiles and torch.equal(files.read("a"), torch.ones(2))


def test_an_unknown_method_is_named(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path, {"a": torch.ones(2)}, {"quant_method": "awq"})
    with pytest.raises(
        InputError, match=r'is quantized by "awq", which is not read.*compress, compressed-tensors, gptq'
    ):
        open_weights(folder)
