"""What rules of allocation measure, against the whole model in memory."""

import contextlib
import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.allocate.owl import Options as OwlOptions
from compress.allocate.owl import measure_block
from compress.allocate.sensitivity import Options, trials
from compress.calib.stats import LayerStats
from compress.checkpoint.formats import open_weights
from compress.errors import InputError, RunError
from compress.measure import DenseModel, measure, tried
from compress.pipeline import compress, open_model
from compress.plan import plan_layers
from compress.progress import Reporter
from compress.prune.masks import keep_largest
from compress.recipe import read_recipe
from compress.run_dir import Journal, RunDir
from compress.steps import find_steps

QUIET = Reporter(quiet=True)
TOKENS = torch.randint(3, 200, (5, 32), generator=torch.Generator().manual_seed(0))


def recipe_for(folder, allocate, text="none.txt", pruner="wanda", **more):
    calib = {"source": str(text), "nsamples": 4, "seqlen": 32}
    target = {"sparsity": 0.5, "allocate": allocate, **more.pop("target", {})}
    return read_recipe(None, {"model": str(folder), "calib": calib, "target": target, "pruner": pruner, **more})


def measured(folder, tmp_path, recipe):
    model = open_model(folder)
    layers = plan_layers(model, recipe)
    with contextlib.closing(RunDir(tmp_path / "run", recipe, {"model": None})) as run:
        return measure(DenseModel(model, layers, run, QUIET), recipe, TOKENS)["measured"], layers


def outputs(model, tokens):
    """What leaves the last block of a transformers model, [n, tokens, hidden_size] float64."""
    last = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))[-1]
    seen = []
    hook = last.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for sequence in tokens:
            model(sequence[None], use_cache=False)
    hook.remove()
    return torch.cat(seen).double()


def norms(model, tokens):
    """The norm of each input channel of each linear layer, over all tokens."""
    squares, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(module, args, name=name):
                squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).square().sum(0)

            hooks.append(module.register_forward_pre_hook(add))
    outputs(model, tokens)
    for hook in hooks:
        hook.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@pytest.mark.parametrize(
    ("architecture", "pruner"),
    [("llama", "magnitude"), ("llama", "wanda"), ("gemma3_text", "wanda"), ("opt", "wanda"), ("mixtral", "magnitude")],
)
def test_distortions_are_those_of_the_pruned_model_as_a_whole(tmp_path, architecture, pruner):
    folder = save_tiny(tmp_path / "m", architecture)
    settings = {"reach": 0.2, "step": 0.2, "samples": 3, "tokens": 24}
    recipe = recipe_for(folder, "sensitivity", pruner=pruner, options={"sensitivity": settings})
    found, layers = measured(folder, tmp_path, recipe)
    asked = trials(layers, recipe.target.layer_plan(), Options(**settings))
    assert len(found) == len(asked) == 3 * 2 * 3

    sample = TOKENS[:3, :24]
    dense = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    scale = norms(dense, TOKENS) if pruner == "wanda" else {}
    wanted = outputs(dense, sample)
    for trial, distortion in zip(asked, found.tolist(), strict=True):
        model = copy.deepcopy(dense)
        for name in trial.layers:
            weight = parameter(model, name)
            plan = replace(recipe.target.layer_plan(), sparsity=trial.plan.sparsity)
            weight.masked_fill_(~keep_largest(weight.abs() * scale.get(name, 1.0), plan), 0.0)
        error = (outputs(model, sample) - wanted).square().sum(-1) / wanted.square().sum(-1)
        assert distortion == pytest.approx(error.mean().item(), rel=1e-4), trial
        assert distortion > 0


def parameter(model, layer):
    """The weight of a layer by our name for it: a module, or one expert of a parameter."""
    path, _, last = layer.rpartition(".")
    if last.isdecimal():
        return model.get_parameter(path).data[int(last)]
    return model.get_parameter(f"{layer}.weight").data


def test_layers_are_pruned_for_the_trial_alone(tmp_path):
    """After it, and if it fails, every weight is as it was, to the bit."""
    recipe = recipe_for("m", "sensitivity")
    for architecture in ("llama", "mixtral", "gpt2"):
        model = open_model(save_tiny(tmp_path / architecture, architecture, dtype=torch.bfloat16))
        model.embed(TOKENS[0])
        with model.loaded(1) as block:
            before = {name: tensor.clone() for name, tensor in block.state().items()}
            layers, plan = block.layers[:3], recipe.target.layer_plan()
            stats = [LayerStats(9, x_sq=torch.ones(layer.shape[1])) for layer in layers]
            with pytest.raises(ZeroDivisionError), tried(layers, stats, plan, find_steps(recipe)):
                for layer in layers:
                    assert (layer.weight == 0).float().mean().item() == pytest.approx(0.5)
                raise ZeroDivisionError
            assert all(torch.equal(tensor, before[name]) for name, tensor in block.state().items())


def test_outlier_ratios_are_those_of_the_whole_model(tmp_path):
    folder = save_tiny(tmp_path / "m", "gemma3_text")
    recipe = recipe_for(folder, "owl", options={"owl": {"threshold": 3}})
    found, layers = measured(folder, tmp_path, recipe)
    model = AutoModelForCausalLM.from_pretrained(folder)
    scale = norms(model, TOKENS)
    for block in range(3):
        inside = [
            (parameter(model, layer.name), LayerStats(160, x_sq=scale[layer.name] ** 2))
            for layer in layers
            if layer.block == block
        ]
        wanted = measure_block(inside, OwlOptions(threshold=3))
        ours = torch.stack([value for value, layer in zip(found, layers, strict=True) if layer.block == block])
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=0)
        assert 0 < ours[0] < 1


def plan_of(out):
    plans = json.loads((out / "run" / "plan.json").read_text())
    return {name: plan["sparsity"] for name, plan in plans.items()}


def by_block(plan):
    """The mean sparsity of the layers of each block."""
    blocks = {}
    for name, sparsity in plan.items():
        blocks.setdefault(int(name.split(".")[2]), []).append(sparsity)
    return {block: sum(shares) / len(shares) for block, shares in blocks.items()}


def changed(folder, tmp_path, change):
    """The model with `change` made to the weights of block 1."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1.") and tensor.dim() == 2:
            tensors[name] = change(name, tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def outliers(name, weight):
    if name.endswith(("q_proj.weight", "k_proj.weight")):  # what leaves the block stays as it was, more or less
        weight = weight.clone()
        weight[::4, ::4] *= 30
    return weight


def loud(name, weight):
    return weight * 6 if name.endswith(("o_proj.weight", "down_proj.weight")) else weight


@pytest.mark.parametrize(("allocate", "change"), [("owl", outliers), ("sensitivity", loud)])
def test_a_block_that_stands_out_gives_less_and_the_total_is_met(tmp_path, text_file, allocate, change):
    folder = changed(save_tiny(tmp_path / "m"), tmp_path, change)
    result = compress(recipe_for(folder, allocate, text_file), folder, tmp_path / "out", QUIET)
    shares = by_block(plan_of(tmp_path / "out"))
    assert shares[1] < min(shares[0], shares[2]) - 0.05
    assert result["sparsity"] == pytest.approx(0.5, abs=1 / 64)
    journal = Journal(tmp_path / "out" / "run" / "log.jsonl").read()
    for line in journal:
        if line["event"] == "layer":
            planned = plan_of(tmp_path / "out")[line["layer"]]
            assert 1 - line["density"] == pytest.approx(planned, abs=1 / 64)


@pytest.mark.parametrize("allocate", ["owl", "sensitivity"])
def test_a_run_that_goes_on_measures_nothing_again(tmp_path, text_file, llama_folder, allocate):
    target = {"wbits": 4, "group_size": 32}
    options = {"sensitivity": {"samples": 2, "tokens": 16}} if allocate == "sensitivity" else {}
    recipe = recipe_for(llama_folder, allocate, text_file, target=target, quantizer="rtn", options=options)
    straight = compress(recipe, llama_folder, tmp_path, QUIET)
    plan, files = plan_of(tmp_path), open_weights(tmp_path)
    weights = {name: files.read(name) for name in files.names()}
    for file in ("result.json", "plan.json"):
        (tmp_path / "run" / file).unlink()
    again = compress(recipe, llama_folder, tmp_path, QUIET)
    assert plan_of(tmp_path) == plan
    files = open_weights(tmp_path)
    assert all(torch.equal(files.read(name), weight) for name, weight in weights.items())
    lines = Journal(tmp_path / "run" / "log.jsonl").read()
    assert len([line for line in lines if line["event"] == "measured"]) == 1
    assert again["sparsity"] == straight["sparsity"]


def test_a_pruner_that_reads_gradients_can_be_tried(tmp_path, text_file, llama_folder):
    recipe = recipe_for(llama_folder, "sensitivity", text_file, pruner="gblm")
    compress(recipe, llama_folder, tmp_path / "out", QUIET)
    lines = Journal(tmp_path / "out" / "run" / "log.jsonl").read()
    assert len([line for line in lines if line["event"] == "gradients"]) == 3, "one pass serves the trials and the run"
    assert len(set(plan_of(tmp_path / "out").values())) > 1


def test_what_cannot_be_allocated_is_refused_at_once(llama_folder):
    with pytest.raises(InputError, match=r"2:4 fixes every layer's sparsity: leave out allocate owl"):
        recipe_for(llama_folder, "owl", target={"sparsity": 0.5, "pattern": "2:4"})
    with pytest.raises(InputError, match="allocate sensitivity has nothing to do: give --sparsity"):
        recipe_for(llama_folder, "sensitivity", target={"sparsity": 0.0, "wbits": 4}, pruner=None)
    model = open_model(llama_folder)
    with pytest.raises(InputError, match="no method 'owls' to allocate with; did you mean owl"):
        plan_layers(model, recipe_for(llama_folder, "owls"))
    with pytest.raises(InputError, match="owl: limit = 2"):
        plan_layers(model, recipe_for(llama_folder, "owl", options={"owl": {"limit": 2}}))
    with pytest.raises(InputError, match="no method 'wnda' to prune with; did you mean wanda"):
        plan_layers(model, recipe_for(llama_folder, "sensitivity", options={"sensitivity": {"pruner": "wnda"}}))
    with pytest.raises(InputError, match="sensitivity tries pruners on parts of the model, and atp works on a whole"):
        plan_layers(model, recipe_for(llama_folder, "sensitivity", options={"sensitivity": {"pruner": "atp"}}))
    plan_layers(model, recipe_for(llama_folder, "owl", target={"pattern": "16x16"}, refine=None))


def test_damaged_weights_stop_the_measurement_and_are_named(tmp_path):
    def damage(name, weight):
        weight = weight.clone()
        weight[0, 0] = float("nan")
        return weight

    folder = changed(save_tiny(tmp_path / "m"), tmp_path, damage)
    with pytest.raises(RunError, match=r"model\.layers\.1\.self_attn\.q_proj or its inputs hold NaN"):
        measured(folder, tmp_path, recipe_for(folder, "owl"))


def test_trials_may_use_a_quicker_pruner_than_the_recipe(tmp_path):
    folder = save_tiny(tmp_path / "m")
    quick = {"options": {"sensitivity": {"pruner": "magnitude"}, "wanda": {}}}
    borrowed, _ = measured(folder, tmp_path / "a", recipe_for(folder, "sensitivity", **quick))
    own, _ = measured(folder, tmp_path / "b", recipe_for(folder, "sensitivity", pruner="magnitude"))
    assert torch.equal(borrowed, own)


def test_a_quicker_pruner_needs_no_gradients_that_the_recipes_takes_anew(tmp_path, text_file, llama_folder):
    options = {"sensitivity": {"pruner": "wanda"}}
    recipe = recipe_for(llama_folder, "sensitivity", text_file, pruner="gblm", options=options)
    calib = recipe.calib.model_copy(update={"refresh_gradients": 1})
    compress(recipe.model_copy(update={"calib": calib}), llama_folder, tmp_path / "out", QUIET)
    lines = Journal(tmp_path / "out" / "run" / "log.jsonl").read()
    events = [line["event"] for line in lines if line["event"] in ("measured", "gradients")]
    assert events == ["measured", "gradients", "gradients", "gradients"]
