"""Whole files: llama.cpp's converter is the extra `export-gguf`, and tests that need it say so where it is missing."""

import json
from importlib.util import find_spec

import gguf as gguf_py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import InputError
from compress.export import gguf
from compress.export.command import export
from compress.export.reference import probe, reference_logits, reference_model
from compress.export.source import Source
from compress.gguf_file import read_gguf

converter = pytest.mark.skipif(find_spec("conversion") is None, reason="the extra export-gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the converter's and transformers' own


def exported(folder, tmp_path, **options):
    report = export(folder, "gguf", tmp_path / "x.gguf", verify=True, **options)
    return report.data


@converter
@pytest.mark.parametrize(
    ("target", "kind"),
    [("W4", "Q4_0"), ("W4 asymmetric", "Q5_0"), ("W8", "Q8_0"), ("W3", "Q4_0"), ("W2", "Q4_0"), ("W4 2:4", "Q4_0"),
     ("W4 gptq", "Q4_0")],
)  # fmt: skip
def test_every_packed_weight_comes_back_bit_for_bit(make_checkpoint, tmp_path, target, kind):
    found = exported(make_checkpoint(target), tmp_path)
    assert found["types"][kind] == 21
    assert found["verify"] == {
        "packed": 21, "exact": 21, "largest_difference": 0.0, "largest_difference_of_dense": 0.0,
        "largest_difference_of_logits": None,
    }  # fmt: skip


@converter
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_architectures(make_checkpoint, tmp_path, architecture):
    found = exported(make_checkpoint("W4", architecture), tmp_path)["verify"]
    assert (found["packed"], found["exact"], found["largest_difference_of_dense"]) == (21, 21, 0.0)


@converter
def test_embeddings_and_what_was_only_pruned(make_checkpoint, tmp_path):
    packed = exported(make_checkpoint("W4 head 8"), tmp_path)
    assert packed["types"]["Q8_0"] == 2 and packed["verify"]["exact"] == 23
    pruned = export(make_checkpoint("pruned"), "gguf", tmp_path / "p.gguf", verify=True).data
    assert pruned["types"] == {"BF16": 23, "F32": 7} and pruned["verify"]["largest_difference_of_dense"] == 0.0


@converter
@pytest.mark.parametrize("target", ["W4", "W4 asymmetric"])
def test_transformers_says_the_same_of_both(make_checkpoint, tmp_path, target):
    source = Source(make_checkpoint(target))
    exported(source.folder, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ours, ids = reference_model(source), probe(320)
    assert torch.allclose(reference_logits(theirs.eval(), ids), reference_logits(ours, ids), atol=1e-6)


@converter
def test_what_would_not_be_exact_is_refused_with_what_would_be(make_checkpoint, tmp_path):
    for target, reason in (
        ("W8 asymmetric", "no type of GGUF holds 8 bits asymmetric, groups of 32: --symmetric"),
        ("W4 g16", "groups of 16 do not divide into them: --group-size 32 does"),
        ("W8A8", "rounded to 8 bits, which llama.cpp does not do"),
    ):
        with pytest.raises(InputError, match=reason):
            exported(make_checkpoint(target), tmp_path)
        assert not (tmp_path / "x.gguf").exists()


@converter
def test_lossy_writes_it_all_the_same_and_says_so(make_checkpoint, tmp_path):
    found = exported(make_checkpoint("W8 asymmetric"), tmp_path, lossy=True)
    assert found["types"]["F16"] == 21 and "21 layers are not exact" in found["notes"][0]
    assert 0 < found["verify"]["largest_difference"] < 1e-3
    inputs = exported(make_checkpoint("W8A8"), tmp_path, lossy=True)
    assert inputs["types"]["Q8_0"] == inputs["verify"]["exact"] == 21


@converter
def test_scales_that_half_precision_does_not_hold_are_found(make_checkpoint, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in make_checkpoint("W4").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name] = torch.full_like(tensors[name], 2.0**-30)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="float16, and these do not fit it"):
        exported(folder, tmp_path)
    assert not (tmp_path / "x.gguf").exists()


@converter
def test_the_adapter_adds_what_ours_adds(with_adapter, tmp_path):
    found = exported(with_adapter, tmp_path)
    assert found["verify"]["exact"] == 21 and str(tmp_path / "x-lora.gguf") in found["files"]
    file = read_gguf(tmp_path / "x-lora.gguf")
    assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.lora.alpha"] == 0
    added = {tensor.name: tensor.dequantized() for tensor in file.tensors}
    source = Source(with_adapter)
    down = source.correction("model.layers.1.mlp.down_proj").delta().numpy()
    name = "blk.1.ffn_down.weight"
    assert np.allclose(added[f"{name}.lora_b"] @ added[f"{name}.lora_a"], down, atol=1e-5)
    heads, size = 4, 16  # llama.cpp pairs the rotary dimensions of each head otherwise
    query = source.correction("model.layers.1.self_attn.q_proj").delta().numpy()
    moved = query.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(query.shape)
    name = "blk.1.attn_q.weight"
    assert np.allclose(added[f"{name}.lora_b"] @ added[f"{name}.lora_a"], moved, atol=1e-5)


@converter
def test_the_tokenizer_is_sentencepiece_and_not_one_that_looks_alike(make_checkpoint, tmp_path):
    exported(make_checkpoint("W4", "gemma3_text"), tmp_path)
    fields = gguf_py.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.tokens"].contents()[260:263] == ["▁", "w", "0"]


@converter
def test_an_architecture_that_llama_cpp_lacks_is_refused(make_checkpoint, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in make_checkpoint("W4").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(InputError, match="does not know the model"):
        exported(folder, tmp_path)


def test_types_and_refusals_need_no_converter(make_checkpoint):
    assert {gguf.refusal(layer) for layer in Source(make_checkpoint("W4 asymmetric")).layers} == {None}
    assert "--group-size 32" in gguf.refusal(Source(make_checkpoint("W4 g16")).layers[0])
