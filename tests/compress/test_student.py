"""The compressed model in memory: it computes what its checkpoint does, and passes gradients on."""

import pytest
import torch
from tiny import save_tiny
from torch import nn

from compress.calib.model import Model
from compress.checkpoint.native import Contents, decode
from compress.errors import InputError
from compress.kernels.correction import Correction
from compress.kernels.linear import PackedLinear
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.recovery import Recovered
from compress.run_dir import RunDir, read_json
from compress.student import student_of, with_results

TOKENS = torch.arange(3, 27)[None]


@pytest.fixture
def finished(tmp_path, text_file, monkeypatch):
    """A function that compresses a tiny model; its blocks and what to compare with."""

    def make(architecture="llama", dtype=torch.float32, **more):
        folder = save_tiny(tmp_path / "dense", architecture, dtype=dtype)
        calib = {"source": str(text_file), "nsamples": 4, "seqlen": 32}
        recipe = read_recipe(None, {"model": str(folder), "calib": calib, **more})
        monkeypatch.setattr(RunDir, "drop_blocks", lambda self: None)
        compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))
        run = RunDir(tmp_path / "out" / "run", recipe, read_json(tmp_path / "out" / "run" / "run.json"))
        model = open_model(folder)
        blocks = [decode(*run.restore(f"{index:04d}")) for index in range(model.n_blocks)]
        run.close()
        return model, blocks, tmp_path / "out", run.journal

    return make


def logits(model: Model):
    hidden = model.embed(TOKENS[0])
    for block in model.blocks():
        hidden = block(hidden)
    return model.logits(hidden)


W2 = {"target": {"wbits": 2, "group_size": 32}, "quantizer": "rtn", "format": "native"}
PRUNED = {"target": {"sparsity": 0.5}, "pruner": "wanda"}


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", W2),
        ("llama", PRUNED),
        ("llama", {"target": {"wbits": 4, "sparsity": 0.5, "group_size": 32}, "pruner": "wanda"}),
        ("llama", {"target": {"wbits": 8, "abits": 8}, "quantizer": "rtn"}),
        ("gpt2", {"target": {"wbits": 8, "abits": 8}, "quantizer": "rtn"}),
        ("mixtral", W2),
    ],
)
def test_it_gives_the_checkpoints_logits_and_leaves_the_model_as_it_was(finished, architecture, more):
    model, blocks, out, journal = finished(architecture, **more)
    before = logits(model)
    with student_of(model, blocks, journal) as student, torch.no_grad():
        ours = student.lm(TOKENS, use_cache=False).logits
        assert not any(parameter.requires_grad for parameter in student.lm.parameters())
        assert all(
            isinstance(layer.module, PackedLinear) == (layer.packed is not None) for layer in student.layers.values()
        )
    torch.testing.assert_close(ours, logits(open_model(out)), atol=2e-5, rtol=1e-4)
    assert torch.equal(before, logits(model)), "its blocks come from the files again"


def test_what_is_no_linear_layer_stays_with_a_line_in_the_journal(finished):
    model, blocks, _, journal = finished("gpt2", **W2)
    with student_of(model, blocks, journal) as student:
        assert student.layers == {}
    assert any("recovery leaves it" in line.get("note", "") for line in journal.read())


def test_gradients_pass_the_rounding_of_inputs_as_they_are(finished):
    model, blocks, _, journal = finished("llama", target={"wbits": 8, "abits": 4, "group_size": 32}, quantizer="rtn")
    with student_of(model, blocks, journal) as student:
        layer = student.layers["model.layers.0.mlp.up_proj"]
        place = student.lm.get_submodule("model.layers.0.mlp")
        x = torch.randn(1, 3, 64, requires_grad=True)
        out = place.up_proj(x)
        quantizer = next(each for each in blocks[0].layers if each.name == layer.name).inputs
        assert torch.equal(out, layer.module(quantizer.fake(x.detach())))
        out.sum().backward()
        torch.testing.assert_close(x.grad, layer.packed.dequantize().sum(0).expand(1, 3, 64))
        other = nn.Linear(64, 128, bias=False)
        layer.put(other)
        assert torch.equal(place.up_proj(x), nn.functional.linear(quantizer.fake(x), other.weight)), (
            "whatever stands there"
        )
        assert torch.equal(layer.module(x), nn.functional.linear(x, layer.module.dequantize())), "and only what does"


def test_blocks_keep_only_what_enters_them(finished):
    model, blocks, _, journal = finished("llama", **W2)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with student_of(model, blocks, journal) as student:
        embeddings = student.lm.get_input_embeddings()(TOKENS).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = student.lm.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        inside = len([shape for shape in saved if shape[-1:] == (128,)])
        assert not inside, "of the feed-forward layer's width"
        hidden.square().sum().backward()
        assert embeddings.grad.abs().sum() > 0


def test_dense_weights_are_read_from_the_files(finished):
    model, blocks, _, journal = finished("llama", **W2)
    wanted = {layer.name: layer.weight.clone() for block in model.blocks() for layer in block.layers}
    with student_of(model, blocks, journal) as student:
        for name, layer in student.layers.items():
            assert torch.equal(layer.dense(), wanted[name].float())


def test_a_dense_weight_of_another_scale_is_refused(finished):
    model, blocks, _, journal = finished("llama", target={"wbits": 8, "abits": 8}, activations="smoothquant")
    with student_of(model, blocks, journal) as student, pytest.raises(InputError, match="per-token"):
        student.layers["model.layers.0.mlp.up_proj"].dense()


def test_a_correction_counts_in_the_model_and_results_become_contents(finished):
    model, blocks, _, journal = finished("llama", **W2)
    name = "model.layers.1.mlp.up_proj"
    added = Correction(torch.randn(2, 64), torch.randn(128, 2))
    packed = next(layer.packed for layer in blocks[1].layers if layer.name == name)
    blocks[1] = with_results(blocks[1], {name: Recovered(packed, correction=added)}, torch.float32, 16)
    with student_of(model, blocks, journal) as student:
        standing = student.lm.get_submodule(name)
        x = torch.randn(1, 3, 64)
        wanted = x @ (packed.dequantize() + added.delta()).T
        torch.testing.assert_close(standing(x), wanted, atol=1e-4, rtol=1e-4)
        assert student.layers[name].correction is not None
    small = with_results(blocks[1], {name: Recovered(packed, correction=added)}, torch.float32, 4)
    kept = next(layer.correction for layer in small.layers if layer.name == name)
    assert kept.nbytes < added.nbytes / 4 and kept.bits == 4


def test_what_was_pruned_stays_zero_in_a_weight_that_learned():
    name, keep = "layer", torch.rand(4, 8) < 0.5
    before = Contents([], {"layer.weight": torch.ones(4, 8) * keep}, {name: keep})
    after = with_results(before, {name: Recovered(weight=torch.full((4, 8), 3.0))}, torch.bfloat16, 16)
    assert torch.equal(after.dense["layer.weight"], 3.0 * keep.bfloat16()) and after.masks is before.masks


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_float16_model_is_in_float32_while_it_trains_and_comes_back_to_the_bit(finished, architecture):
    model, blocks, _, journal = finished(architecture, torch.float16, **W2)
    before = logits(model)
    with student_of(model, blocks, journal) as student, torch.no_grad():
        floats = {p.dtype for p in student.lm.parameters() if p.is_floating_point()}
        assert floats == {torch.float32} == {layer.dtype for layer in student.layers.values()}
        assert {layer.module.packed.tensors()["scale"].dtype for layer in student.layers.values()} == {torch.float16}
        assert student.lm(TOKENS, use_cache=False).logits.dtype == torch.float32
    assert any("float32" in line["note"] for line in journal.read() if line["event"] == "note")
    assert before.dtype == torch.float16 and torch.equal(logits(model), before)
