"""Exports to onnxruntime and its generation loop: the extra `export-onnx`."""

import numpy as np
import pytest
import torch

from compress.errors import InputError
from compress.export.command import export
from compress.export.reference import reference_logits, reference_model
from compress.export.source import Source

genai = pytest.importorskip("onnxruntime_genai", reason="the extra export-onnx is not installed")
onnx = pytest.importorskip("onnx", reason="the extra export-onnx is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the builder's own


@pytest.mark.parametrize(
    ("target", "bits"),
    [
        ("W4", 4),
        ("W4 asymmetric", 4),
        ("W8", 8),
        ("W8 asymmetric", 8),
        ("W3", 4),
        ("W2", 2),
        ("W4 2:4", 4),
        ("W4 g16", 4),
    ],
)
def test_weights_bit_for_bit_and_logits_at_level_0(make_checkpoint, tmp_path, target, bits):
    found = export(make_checkpoint(target), "onnx", tmp_path / "x", verify=True).data
    assert found["types"][f"MatMulNBits, {bits} bits"] == found["verify"]["exact"] == 21
    assert found["verify"]["largest_difference_of_logits"] < 1e-5


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "gemma3_text"])
def test_architectures_with_embeddings_left_alone(make_checkpoint, tmp_path, architecture):
    found = export(make_checkpoint("W4", architecture), "onnx", tmp_path / "x", verify=True).data["verify"]
    assert found["exact"] == 21 and found["largest_difference_of_logits"] < 1e-5
    graph = onnx.load(str(tmp_path / "x" / "model.onnx"), load_external_data=False).graph
    assert "GatherBlockQuantized" not in {node.op_type for node in graph.node}


def test_corrections_and_packed_embeddings_are_in_the_graph(make_checkpoint, with_adapter, tmp_path):
    for number, folder in enumerate((with_adapter, make_checkpoint("W4 head 8"), make_checkpoint("pruned"))):
        found = export(folder, "onnx", tmp_path / str(number), verify=True).data["verify"]
        assert found["exact"] == found["packed"] and found["largest_difference_of_logits"] < 1e-5


def test_onnxruntime_genai_goes_on_as_torch_does(make_checkpoint, tmp_path):
    export(make_checkpoint("W4 asymmetric"), "onnx", tmp_path / "x")
    model = genai.Model(str(tmp_path / "x"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    prompt = [1, 270, 261, 265, 300]
    generator.append_tokens(np.array([prompt], dtype=np.int64))
    reference, tokens = reference_model(Source(make_checkpoint("W4 asymmetric"))), list(prompt)
    for _ in range(32):
        generator.generate_next_token()
        tokens.append(int(reference_logits(reference, torch.tensor([tokens]))[0, -1].argmax()))
        assert int(generator.get_next_tokens()[0]) == tokens[-1]


def test_rounded_inputs_are_refused_and_lossy_takes_the_fast_level(make_checkpoint, tmp_path):
    with pytest.raises(InputError, match="rounded to 8 bits, which onnxruntime does not do"):
        export(make_checkpoint("W8A8"), "onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    export(make_checkpoint("W8A8"), "onnx", tmp_path / "x", lossy=True)
    graph = onnx.load(str(tmp_path / "x" / "model.onnx"), load_external_data=False).graph
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    with pytest.raises(InputError, match="choose another -o"):
        export(make_checkpoint("W4"), "onnx", tmp_path / "x")
