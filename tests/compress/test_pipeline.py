"""Whole runs on tiny models, through files and back."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, save_tiny
from transformers import AutoModelForCausalLM

from compress.checkpoint.formats import open_weights
from compress.errors import InputError, RunError
from compress.evaluate import evaluate
from compress.pipeline import compress, open_model
from compress.progress import Reporter, Stage
from compress.recipe import read_recipe
from compress.run_dir import Journal

QUIET = Reporter(quiet=True)


def recipe_for(folder, text, target, **more):
    calib = {"source": str(text), "nsamples": 4, "seqlen": 32}
    return read_recipe(None, {"model": str(folder), "calib": calib, "target": {"group_size": 32, **target}, **more})


def run(folder, out, text, target, **more):
    return compress(recipe_for(folder, text, target, **more), folder, out, QUIET)


def logits(folder, tokens=range(3, 30)):
    model = open_model(folder)
    hidden = model.embed(torch.tensor(tokens))
    for block in model.blocks():
        hidden = block(hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_pruned_quantized_saved_and_read_again(tmp_path, text_file, architecture):
    folder = save_tiny(tmp_path / "dense", architecture)
    target = {"pattern": "2:4", "wbits": 4, "group_size": 16}
    result = run(folder, tmp_path / "out", text_file, target, pruner="wanda", quantizer="gptq")
    assert result["sparsity"] == pytest.approx(0.5)
    # 4 bits, or two codes and their places in each four, and a 16-bit scale for 16 weights.
    wanted = pytest.approx(4.0, abs=0.1) if result["format"] == "native" else pytest.approx(5.0)  # rows end with a word
    assert result["layer_bits_per_weight"] == wanted
    files = open_weights(tmp_path / "out")
    model = open_model(tmp_path / "out")
    checked = 0
    dense = {line["layer"] for line in journal(tmp_path / "out") if line["event"] == "note"}
    assert all(name.endswith("mixer.dt_proj") for name in dense), "mamba alone multiplies by a weight without its layer"
    for block in model.blocks():
        for layer in block.layers:
            if layer.name in dense:
                continue
            groups = layer.weight.float().unflatten(1, (-1, 4))
            assert ((groups == 0).sum(-1) >= 2).all(), layer.name
            checked += 1
    assert checked == len([line for line in journal(tmp_path / "out") if line.get("step") == "quantize"])
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert files.nbytes() < open_weights(folder).nbytes()


def journal(out):
    return Journal(out / "run" / "log.jsonl").read()


def test_the_checkpoint_gives_the_logits_the_run_ended_with(tmp_path, llama_folder, text_file):
    """Through the packed file and back: what later blocks calibrated on is what a reader gets."""
    run(llama_folder, tmp_path / "ct", text_file, {"sparsity": 0.5, "wbits": 4})
    run(llama_folder, tmp_path / "native", text_file, {"sparsity": 0.5, "wbits": 4}, format="native")
    assert torch.equal(logits(tmp_path / "ct"), logits(tmp_path / "native"))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")(torch.arange(3, 30)[None], use_cache=False)
    assert torch.equal(plain.logits.to(torch.bfloat16), logits(tmp_path / "ct"))


def test_what_is_pruned_2_of_4_is_smaller_in_the_native_format_and_decodes_to_the_same(
    tmp_path, llama_folder, text_file
):
    target = {"pattern": "2:4", "wbits": 4}
    ct, native = (
        run(llama_folder, tmp_path / name, text_file, target, pruner="wanda", format=name)
        for name in ("compressed-tensors", "native")
    )
    assert torch.equal(logits(tmp_path / "compressed-tensors"), logits(tmp_path / "native"))
    assert (ct["layer_bits_per_weight"], native["layer_bits_per_weight"]) == (4.5, 3.5)
    assert {line["bits"] for line in journal(tmp_path / "native") if line.get("step") == "quantize"} == {3.5}
    assert native["compressed_bytes"] < ct["compressed_bytes"]


def test_codebooks_go_through_the_native_format_and_back(tmp_path, llama_folder, text_file):
    options = {"codebook": {"code_bits": 4, "vector_size": 4, "iterations": 1}}
    more = {"quantizer": "codebook", "options": options}
    result = run(llama_folder, tmp_path / "out", text_file, {"wbits": 2}, **more)
    assert result["format"] == "native"
    model, dense = open_model(tmp_path / "out"), open_model(llama_folder)
    for block, before in zip(model.blocks(), dense.blocks(), strict=True):
        for layer, other in zip(block.layers, before.layers, strict=True):
            assert not torch.equal(layer.weight, other.weight)
            assert torch.nn.functional.cosine_similarity(layer.weight.flatten(), other.weight.flatten(), dim=0) > 0.8
    with pytest.raises(InputError, match=r"compressed-tensors cannot hold .*, which has codebooks: native can"):
        run(llama_folder, tmp_path / "ct", text_file, {"wbits": 2}, format="compressed-tensors", **more)
    with pytest.raises(InputError, match="codebook cannot keep pruned weights at zero"):
        run(llama_folder, tmp_path / "pruned", text_file, {"wbits": 2, "sparsity": 0.5}, **more)
    assert not (tmp_path / "pruned").exists()


class Interrupting(Reporter):
    """Stops a run after two blocks."""

    @contextmanager
    def stage(self, title, total):
        yield _Ending(self, title, total)


class _Ending(Stage):
    def step(self, note=""):
        super().step(note)
        if (self.title, self.done) == ("block", 2):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ({"pattern": "2:4", "wbits": 4}, {"pruner": "wanda"}),
        ({"wbits": 2}, {"quantizer": "codebook", "options": {"codebook": {"code_bits": 4, "vector_size": 4}}}),
    ],
)
def test_every_layout_is_replayed(tmp_path, llama_folder, text_file, target, more):
    run(llama_folder, tmp_path / "straight", text_file, target, format="native", **more)
    recipe = recipe_for(llama_folder, text_file, target, format="native", **more)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, llama_folder, tmp_path / "out", Interrupting(quiet=True))
    compress(recipe, llama_folder, tmp_path / "out", QUIET)
    assert [line["block"] for line in journal(tmp_path / "out") if line["event"] == "replayed"] == [0, 1]
    straight, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "out"))
    assert straight == resumed


def test_pruned_only_is_an_ordinary_checkpoint(tmp_path, text_file):
    for architecture in ("llama", "mixtral", "gpt2"):
        folder = save_tiny(tmp_path / architecture, architecture)
        result = run(folder, tmp_path / "out" / architecture, text_file, {"sparsity": 0.5}, pruner="wanda")
        assert result["format"] == "dense"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / architecture)
        with torch.no_grad():
            plain = loaded(torch.arange(3, 30)[None], use_cache=False).logits
        assert torch.equal(plain, logits(tmp_path / "out" / architecture))
        assert {p.name for p in folder.iterdir()} <= {p.name for p in (tmp_path / "out" / architecture).iterdir()}


@pytest.mark.parametrize("head_bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_can_be_quantized(tmp_path, text_file, tied, head_bits):
    folder = save_tiny(tmp_path / "dense", tie_word_embeddings=tied)
    result = run(folder, tmp_path / "out", text_file, {"wbits": 4, "head_bits": head_bits})
    assert result["format"] == "native"
    model, dense = open_model(tmp_path / "out"), open_model(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, theirs = model.lm.get_parameter(name), dense.lm.get_parameter(name)
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) / (2**head_bits - 1) * 1.2)
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    assert len([name for name in layers if ".layers." not in name]) == (1 if tied else 2)


def test_a_tied_head_is_stored_once(tmp_path, text_file):
    sizes = {}
    for tied in (True, False):
        folder = save_tiny(tmp_path / f"dense{tied}", tie_word_embeddings=tied)
        sizes[tied] = run(folder, tmp_path / f"out{tied}", text_file, {"wbits": 4})["compressed_bytes"]
    assert sizes[False] - sizes[True] == pytest.approx(200 * 64 * 4, abs=400)


def test_calibrating_each_layer_on_compressed_ones_changes_later_layers_only(tmp_path, llama_folder, text_file):
    target = {"sparsity": 0.5}
    run(llama_folder, tmp_path / "a", text_file, target, sequential=False)
    run(llama_folder, tmp_path / "b", text_file, target, sequential=True)
    a, b = open_weights(tmp_path / "a"), open_weights(tmp_path / "b")
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(a.read(first), b.read(first))
    assert not torch.equal(a.read(last), b.read(last))


def test_methods_without_data_need_none(tmp_path, llama_folder):
    recipe = {
        "model": "x",
        "target": {"sparsity": 0.5, "wbits": 8, "group_size": 32},
        "pruner": "magnitude",
        "quantizer": "rtn",
    }
    recipe["calib"] = {"source": "there is no such text"}
    compress(read_recipe(None, recipe), llama_folder, tmp_path / "out", QUIET)
    assert {line["error_on"] for line in journal(tmp_path / "out") if line["event"] == "layer"} == {"weights"}


def test_the_journal_says_what_happened_to_every_layer(tmp_path, llama_folder, text_file):
    run(llama_folder, tmp_path / "out", text_file, {"sparsity": 0.5, "wbits": 4})
    layers = [line for line in journal(tmp_path / "out") if line["event"] == "layer"]
    assert len(layers) == 3 * 7 * 2
    layers.sort(key=lambda line: line["layer"])
    for pruned, quantized in zip(layers[::2], layers[1::2], strict=True):
        assert (pruned["step"], quantized["step"]) == ("prune", "quantize")
        assert 0 < pruned["error"] < 1 and pruned["error_on"] == "hessian"
        assert pruned["density"] == quantized["density"] == 0.5
        assert (pruned["bits"], quantized["bits"]) == (16.0, 4.5)
    blocks = [line["seconds"] for line in journal(tmp_path / "out") if line["event"] == "block"]
    assert len(blocks) == 3 and {"load", "observe", "solve", "save", "forward"} <= set(blocks[0])


def test_the_same_command_again_gives_the_same_answer(tmp_path, llama_folder, text_file):
    first = run(llama_folder, tmp_path / "out", text_file, {"wbits": 4})
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run(llama_folder, tmp_path / "out", text_file, {"wbits": 4}) == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp


def test_what_does_not_divide_is_refused_before_any_work(tmp_path, llama_folder, text_file):
    with pytest.raises(
        InputError, match=r"q_proj has 64 inputs, which groups of 48 do not divide: use --group-size 64"
    ):
        run(llama_folder, tmp_path / "out", text_file, {"wbits": 4, "group_size": 48})
    with pytest.raises(InputError, match=r"q_proj has 64 inputs, which 2:5 does not divide"):
        run(llama_folder, tmp_path / "out", text_file, {"pattern": "2:5"})
    with pytest.raises(InputError, match="gptq"):
        run(llama_folder, tmp_path / "out", text_file, {"wbits": 3}, format="gptq")
    assert not (tmp_path / "out").exists()


def test_evaluation_counts_every_token_but_the_bos(tmp_path, llama_folder, text_file):
    result = evaluate(llama_folder, [str(text_file)], 32, 5, QUIET)
    assert result["tokens"] == 5 * 31
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    words = [int(word[1:]) for word in text_file.read_text().split()]
    windows = torch.tensor([[1, *words[i * 31 : (i + 1) * 31]] for i in range(5)])
    with torch.no_grad():
        wanted = sum(model(w[None], labels=w[None]).loss.double() for w in windows) / 5
    assert result["perplexity"]["words"] == pytest.approx(wanted.exp().item(), rel=2e-3)


@pytest.mark.parametrize(
    "lost", ["config.json", "tokenizer.json", "recipe.toml", "model.safetensors", "half the weights"]
)
def test_a_finished_checkpoint_that_lost_a_file_is_made_again(tmp_path, llama_folder, text_file, lost):
    out = tmp_path / "out"
    run(llama_folder, out, text_file, {"wbits": 4})
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file() and file.name != "README.md"}
    if lost == "half the weights":
        (out / "model.safetensors").write_bytes(before["model.safetensors"][:30_000])
    else:
        (out / lost).unlink()
    run(llama_folder, out, text_file, {"wbits": 4})
    assert {name: (out / name).read_bytes() for name in before} == before


def damaged(llama_folder, folder, name, value):
    shutil.copytree(llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "method", [{"pruner": "wanda"}, {"pruner": "sparsegpt"}, {"pruner": "alps"}, {"quantizer": "gptq"}]
)
def test_inputs_that_are_not_finite_stop_the_run_and_name_the_layer(tmp_path, llama_folder, text_file, method):
    folder = damaged(llama_folder, tmp_path / "m", "model.layers.1.input_layernorm.weight", float("inf"))
    target = {"sparsity": 0.5} if "pruner" in method else {"wbits": 4}
    with pytest.raises(RunError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj hold NaN or infinity"):
        run(folder, tmp_path / "out", text_file, target, **method)


def test_embeddings_that_are_not_finite_are_not_rounded(tmp_path, llama_folder, text_file):
    folder = damaged(llama_folder, tmp_path / "m", "model.embed_tokens.weight", float("nan"))
    with pytest.raises(RunError, match=r"model\.embed_tokens holds NaN or infinity as it came"):
        run(folder, tmp_path / "out", text_file, {"head_bits": 8})


def test_tensors_left_out_are_noted(tmp_path, llama_folder, text_file):
    folder = shutil.copytree(llama_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    run(folder, tmp_path / "out", text_file, {"wbits": 4})
    assert len([line for line in journal(tmp_path / "out") if line["event"] == "note"]) == 9
