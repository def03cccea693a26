"""Inputs of quantized layers: what is folded changes no output, and what a run measures is what a reader gets."""

import json

import pytest
import torch
from tiny import ARCHITECTURES, save_tiny

from compress.activations import InputPreparer
from compress.calib.hidden import Sequences
from compress.calib.norms import emitting_norms
from compress.calib.observe import observe, saturation, shared_inputs
from compress.calib.weight_files import read_all
from compress.checkpoint.formats import open_weights
from compress.errors import InputError
from compress.evaluate import evaluate
from compress.inspection import inspect
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Journal
from compress.steps import find_steps

QUIET = Reporter(quiet=True)
SEQUENCES = [torch.arange(3, 40), torch.arange(90, 53, -1), torch.arange(100, 174, 2)]
SHIFTED = ("opt", "gpt2", "bloom", "gpt_neox", "phi", "starcoder2")  # norms and all their readers have biases
WITH_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")


def recipe_for(folder, text, **more):
    calib = {"source": str(text), "nsamples": 4, "seqlen": 32}
    return read_recipe(None, {"model": str(folder), "calib": calib, **more})


def run(folder, out, text, **more):
    return compress(recipe_for(folder, text, **more), folder, out, QUIET)


def journal(out):
    return Journal(out / "run" / "log.jsonl").read()


def logits(folder, tokens=range(3, 30)):
    model = open_model(folder)
    hidden = model.embed(torch.tensor(tokens))
    for block in model.blocks():
        hidden = block(hidden)
    return model.logits(hidden)


def calibrated(out):
    """The first calibration sequence: static codes span what it has, and not all that other text has."""
    return read_all(out / "run" / "tokens.safetensors")[0]["tokens"][0].tolist()


def stirred(folder, architecture):
    """A model whose norms and biases are no ones and zeros, with a few channels far larger than others."""
    model = open_model(save_tiny(folder, architecture))
    generator = torch.Generator().manual_seed(1)
    for index in range(model.n_blocks):
        model.load_block(index)
    for name, parameter in model.lm.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln" in name:
                parameter.data[::16] *= 5
    model.lm.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "method"),
    [(name, "outliertune") for name in ARCHITECTURES if name not in WITH_EXPERTS]
    + [(name, "smoothquant") for name in ("gemma3_text", "phi", "gpt2")],
)
def test_folding_alone_changes_no_output_and_statistics_are_those_of_the_new_inputs(tmp_path, architecture, method):
    folder = stirred(tmp_path / "m", architecture)
    recipe = recipe_for(folder, "none", activations=method, target={"wbits": 8, "abits": 8})
    step, model = find_steps(recipe)[0], open_model(folder)
    hidden = [model.embed(tokens) for tokens in SEQUENCES]
    block = model.load_block(1)
    before, shared = [block(each) for each in hidden], shared_inputs(block, hidden[0])
    layers = [layer for layer in block.layers if layer.name in shared]
    norms = emitting_norms(block, shared, hidden[0])
    needs = frozenset({"x_sum", "x_sq", "x_min", "x_max", "hessian"})
    stats = observe(block, layers, Sequences(hidden), needs, shared)
    preparer = InputPreparer(step, norms, shared, Journal(tmp_path / "log.jsonl"))
    prepared = preparer.prepare(layers, {layer.name: recipe.target.layer_plan() for layer in layers}, stats)
    for layer in layers:
        layer.install(prepared[layer.name].folded(layer.weight.float()))
    for old, new in zip(before, (block(each) for each in hidden), strict=True):
        assert (new - old).norm() <= 1e-5 * old.norm()
    again = observe(block, layers, Sequences(hidden), needs, shared)
    for layer in layers:
        for name in needs:
            expected = getattr(again[layer.name], name)
            largest = expected.abs().max().item()
            torch.testing.assert_close(getattr(stats[layer.name], name), expected, rtol=1e-3, atol=5e-3 * largest)
    static = {name for name, done in prepared.items() if done.quantizer.static}
    assert static == ({name for name in shared if shared[name] in norms} if method == "outliertune" else set())
    if method == "outliertune" and architecture in SHIFTED:
        for name in static:
            seen = stats[name]
            torch.testing.assert_close(seen.x_max, -seen.x_min, rtol=1e-2, atol=0.1)


def test_on_request_layers_of_a_norm_without_bias_subtract_the_shift_themselves(tmp_path, text_file):
    folder = stirred(tmp_path / "m", "llama")
    result = run(
        folder, tmp_path / "out", text_file, target={"wbits": 8, "abits": 8}, activations="outliertune",
        options={"outliertune": {"symmetrize": "yes"}}, format="native",
    )  # fmt: skip
    assert result["format"] == "native"
    model = open_model(tmp_path / "out")
    shifts = {name: q.shift for name, q in model.input_quantizers.items() if q.shift is not None}
    assert len(shifts) == 3 * 5 and all(shift.dtype == torch.float32 for shift in shifts.values())
    tokens = calibrated(tmp_path / "out")
    dense = logits(folder, tokens)
    assert (logits(tmp_path / "out", tokens) - dense).norm() < 0.05 * dense.norm()


TARGETS = {
    "W8A8": ({"wbits": 8, "abits": 8}, None, "compressed-tensors", 0.03),
    "W8A8 smooth": ({"wbits": 8, "abits": 8}, "smoothquant", "compressed-tensors", 0.03),
    "W8A8 static": ({"wbits": 8, "abits": 8}, "outliertune", "native", 0.05),
    "W6A6": ({"wbits": 6, "abits": 6}, None, "native", 0.15),
    "W4A8": ({"wbits": 4, "abits": 8, "group_size": 32}, None, "compressed-tensors", 0.3),
    "W4A8 static, half pruned": (
        {"wbits": 4, "abits": 8, "group_size": 32, "sparsity": 0.5},
        "outliertune",
        "native",
        1,
    ),
}


@pytest.mark.parametrize("architecture", ["opt", "gemma3_text"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_checkpoint_gives_what_the_run_ended_with(tmp_path, text_file, kind, architecture):
    target, method, format_name, far = TARGETS[kind]
    folder = stirred(tmp_path / "m", architecture)
    recipe = {"target": target, **({} if method is None else {"activations": method})}
    recipe |= {"pruner": "wanda"} if "sparsity" in target else {}
    result = run(folder, tmp_path / "out", text_file, **recipe)
    native = run(folder, tmp_path / "native", text_file, **recipe, format="native")
    assert (result["format"], native["format"]) == (format_name, "native")
    tokens = calibrated(tmp_path / "out")
    found, dense = logits(tmp_path / "out", tokens), logits(folder, tokens)
    assert torch.equal(found, logits(tmp_path / "native", tokens))
    assert 0 < (found - dense).norm() < far * dense.norm()
    quantizers = open_model(tmp_path / "out").input_quantizers
    lines = [line for line in journal(tmp_path / "out") if line["event"] == "input"]
    assert {name.removesuffix(".weight"): q.static for name, q in quantizers.items()} == {
        line["layer"]: line["codes"] == "static" for line in lines
    }
    assert {q.bits for q in quantizers.values()} == {target["abits"]} and len(lines) == len(quantizers)


def test_the_norm_emits_codes_and_saturation_is_in_the_journal(tmp_path, text_file):
    folder, out = stirred(tmp_path / "m", "llama"), tmp_path / "out"
    options = {"outliertune": {"clip_ratio": 0.5}}
    run(folder, out, text_file, target={"wbits": 8, "abits": 8}, activations="outliertune", options=options)
    shares = {line["layer"]: line["share"] for line in journal(out) if line["event"] == "saturation"}
    assert len(shares) == 3 * 5, "each layer behind a norm, in the last block too"
    assert 0 < max(shares.values()) < 0.2
    model = open_model(out)
    hidden = model.embed(torch.arange(3, 30))
    block = model.load_block(0)
    with saturation(block) as counts:
        block(hidden)
    assert counts and all(total == 27 * 64 for _, total in counts.values())
    said = {line["layer"]: line for line in inspect(out).data["layers"]}
    line = said["model.layers.0.self_attn.q_proj"]
    assert line["inputs"] == "8 bits, static" and line["saturated"] == shares[line["layer"]]
    assert said["model.layers.0.mlp.down_proj"]["inputs"] == "8 bits, per token"


def test_each_layer_in_turn_calibrates_on_rounded_inputs(tmp_path, text_file):
    folder = stirred(tmp_path / "m", "llama")
    found = {}
    for sequential in (False, True):
        out = tmp_path / str(sequential)
        run(folder, out, text_file, target={"wbits": 8, "abits": 4}, activations="per-token", sequential=sequential)
        found[sequential] = open_weights(out)
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[True].read(first), found[False].read(first))
    assert not torch.equal(found[True].read(last), found[False].read(last))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_run_that_goes_on_ends_with_the_same_bytes(tmp_path, text_file, architecture, monkeypatch):
    folder = stirred(tmp_path / "m", architecture)
    asked = {"target": {"wbits": 8, "abits": 8}, "activations": "outliertune"}
    run(folder, tmp_path / "straight", text_file, **asked)

    class Killed(Exception):
        pass

    def after_two(self, **values):
        write(self, **values)
        if values["event"] == "block" and values["block"] == 1:
            raise Killed

    with monkeypatch.context() as patched:
        write = Journal.write
        patched.setattr(Journal, "write", after_two)
        with pytest.raises(Killed):
            run(folder, tmp_path / "stopped", text_file, **asked)
    run(folder, tmp_path / "stopped", text_file, **asked)
    assert [line["block"] for line in journal(tmp_path / "stopped") if line["event"] == "replayed"] == [0, 1]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_tokens_alone_need_no_data(tmp_path, text_file):
    folder = save_tiny(tmp_path / "m")
    asked = {"target": {"wbits": 8, "abits": 8}, "quantizer": "rtn", "activations": "per-token"}
    run(folder, tmp_path / "out", "there is no such text", **asked)
    assert len(open_model(tmp_path / "out").input_quantizers) == 21


def test_masks_by_gradients_are_those_of_the_model_before_the_fold(tmp_path, text_file):
    """|W| |G| is what it was, so the same weights go."""
    folder = stirred(tmp_path / "m", "llama")
    zeros = {}
    for abits in (8, 16):
        more = {"activations": "outliertune"} if abits == 8 else {}
        target = {"sparsity": 0.5, "wbits": 8, "group_size": -1, "abits": abits}
        run(folder, tmp_path / str(abits), text_file, target=target, pruner="gradient", format="native", **more)
        zeros[abits] = open_weights(tmp_path / str(abits)).read("model.layers.0.self_attn.q_proj.weight") == 0
    assert (zeros[8] == zeros[16]).float().mean() > 0.99  # small weights round to zero as well


def test_what_cannot_be_is_refused_in_one_line_before_any_work(tmp_path, text_file):
    llama = save_tiny(tmp_path / "llama")
    with pytest.raises(InputError, match="abits 8 is for what enters quantized layers: give --wbits"):
        run(llama, tmp_path / "a", text_file, target={"abits": 8, "sparsity": 0.5})
    with pytest.raises(InputError, match="activations smoothquant has nothing to do: give --abits"):
        run(llama, tmp_path / "a", text_file, target={"wbits": 8}, activations="smoothquant")
    with pytest.raises(InputError, match=r"compressed-tensors cannot hold .*q_proj, whose norm emits integer codes"):
        asked = {"target": {"wbits": 8, "abits": 8}, "activations": "outliertune", "format": "compressed-tensors"}
        run(llama, tmp_path / "a", text_file, **asked)
    with pytest.raises(InputError, match=r"gptq cannot say that what enters .*q_proj is rounded"):
        run(llama, tmp_path / "a", text_file, target={"wbits": 4, "group_size": 32, "abits": 8}, format="gptq")
    mixtral = save_tiny(tmp_path / "mixtral", "mixtral")
    with pytest.raises(InputError, match=r"experts.* is one expert of many in a parameter, whose inputs stay"):
        run(mixtral, tmp_path / "a", text_file, target={"wbits": 8, "abits": 8})
    assert not (tmp_path / "a").exists()
    run(llama, tmp_path / "out", text_file, target={"wbits": 8, "abits": 8})
    with pytest.raises(InputError, match="is quantized already: compress the model that this one was made of"):
        run(tmp_path / "out", tmp_path / "a", text_file, target={"wbits": 4, "group_size": 32})


def test_a_scale_for_all_inputs_is_the_default_where_integers_are_multiplied(tmp_path):
    for wbits, abits, wanted in ((8, 8, -1), (6, 6, -1), (4, 8, 128), (8, 16, 128)):
        recipe = read_recipe(None, {"model": "x", "target": {"wbits": wbits, "abits": abits}})
        assert recipe.target.group_size == wanted
        again = tmp_path / "again.toml"
        again.write_text(recipe.toml())
        assert read_recipe(again, {}) == recipe
    assert (
        read_recipe(None, {"model": "x", "target": {"wbits": 8, "abits": 8, "group_size": 64}}).target.group_size == 64
    )


def test_evaluation_rounds_inputs(tmp_path, text_file):
    folder = stirred(tmp_path / "m", "llama")
    kept = {}
    for abits in (4, 16):
        out = tmp_path / str(abits)
        run(
            folder,
            out,
            text_file,
            target={"wbits": 8, "abits": abits, "group_size": -1},
            **({"activations": "per-token"} if abits == 4 else {}),
        )
        kept[abits] = evaluate(out, [str(text_file)], 32, 4, QUIET)["perplexity"]["words"]
    config = json.loads((tmp_path / "4" / "config.json").read_text())["quantization_config"]
    assert config["layers"]["model.layers.0.mlp.down_proj"]["abits"] == 4
    assert kept[4] != kept[16]
