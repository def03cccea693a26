import contextlib
import io
import json
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from sizes import layer_sizes
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.allocate.budget import Options, choose_plans, least_loss, trials
from compress.allocate.choices import Budget, Choice, read_choices
from compress.allocate.spread import Priced
from compress.calib.stats import LayerStats
from compress.checkpoint.formats import open_weights
from compress.commands import run_command
from compress.errors import InputError, RunError
from compress.inspection import inspect
from compress.measure import DenseModel, measure
from compress.pipeline import compress, open_model
from compress.plan import plan_head, plan_layers
from compress.progress import Reporter
from compress.quantize import rtn
from compress.recipe import read_recipe
from compress.run_dir import Journal, RunDir
from compress.sizes import Sizes, dense_bytes
from compress.task import LayerPlan, LayerTask

QUIET = Reporter(quiet=True)
CHOICES = ["2g32", "3g32", "4g32", "8g32", "4g32+2:4"]


@st.composite
def programmes(draw):
    """Losses, bytes and a limit that some plan keeps to."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    n = shape[0] * shape[1]
    losses = np.array(draw(st.lists(st.floats(1e-6, 1e3), min_size=n, max_size=n))).reshape(shape)
    losses[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = draw(
        st.sampled_from([1.0, np.inf])
    )
    assume(np.isfinite(losses).any(1).all())
    unit = draw(st.sampled_from([1, 7, 1280]))
    sizes = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    nbytes = unit * np.array(sizes, np.int64).reshape(shape)
    low = np.where(np.isfinite(losses), nbytes, 10**9).min(1).sum()
    return losses, nbytes, draw(st.integers(int(low), int(max(low, nbytes.max(1).sum()))))


@settings(max_examples=60)
@given(programmes())
def test_the_integer_programme_equals_trying_everything(programme):
    losses, nbytes, limit = programme
    rows = np.arange(len(losses))
    chosen = least_loss(losses, nbytes, limit)
    assert nbytes[rows, chosen].sum() <= limit
    plans = [np.array(plan) for plan in product(range(losses.shape[1]), repeat=len(losses))]
    best = min(losses[rows, plan].sum() for plan in plans if nbytes[rows, plan].sum() <= limit)
    assert losses[rows, chosen].sum() == pytest.approx(best, rel=1e-9)


def test_a_larger_budget_never_loses_more():
    random = np.random.default_rng(0)
    losses, nbytes = random.random((8, 5)), random.integers(1, 30, (8, 5))
    totals = []
    for limit in range(int(nbytes.min(1).sum()), int(nbytes.max(1).sum()) + 1, 3):
        totals.append(losses[np.arange(8), least_loss(losses, nbytes, limit)].sum())
    assert (np.diff(totals) <= 1e-12).all() and totals[-1] == pytest.approx(losses.min(1).sum())


def test_what_does_not_fit_or_was_no_number_is_never_chosen():
    with pytest.raises(RunError, match="NaN or infinity: use a larger --budget"):
        least_loss(np.ones((2, 2)), np.full((2, 2), 5), 9)
    with pytest.raises(RunError, match="NaN or infinity"):
        least_loss(np.array([[1.0, 1.0], [np.inf, np.inf]]), np.ones((2, 2), np.int64), 9)


PLANS = [LayerPlan(wbits=bits, group_size=64, symmetric=bits > 3) for bits in (2, 3, 4, 8)] + [LayerPlan()]


def priced(layers):
    """Layers that take as many bytes as codes have, and may stay as they are."""
    return [replace(x, choices=tuple(Priced(p, x.n_weights * p.wbits // 8) for p in PLANS)) for x in layers]


def test_the_layers_of_a_group_become_the_same_and_a_sensitive_group_gets_more_bits():
    layers = priced(layer_sizes())
    for group, count in (("layer", 8), ("module", 8), ("block", 4)):
        options = Options(group=group)
        asked = trials(layers, LayerPlan(), options)
        assert len(asked) == count * 4, "16 bits need no trial"
        weight = {0: 1.0, 1: 1.0, 2: 50.0, 3: 1.0}
        measured = torch.tensor([weight[t.block] * 4.0**-t.plan.wbits for t in asked], dtype=torch.float64)
        nbytes = sum(x.n_weights for x in layers) * 3 // 8
        plans = choose_plans(layers, measured, nbytes, options)
        assert sum(x.n_weights * plans[x.name].wbits // 8 for x in layers) <= nbytes
        bits = {block: [plans[x.name].wbits for x in layers if x.block == block] for block in range(4)}
        assert min(bits[2]) >= max(bits[0] + bits[1] + bits[3]) and np.mean(bits[2]) > np.mean(bits[1])
        if group == "block":
            assert all(len(set(each)) == 1 for each in bits.values())


def test_experts_of_one_parameter_are_one_group():
    layers = [replace(layers, name=f"model.layers.0.mlp.experts.up.{i}") for i, layers in enumerate(layer_sizes(1))]
    assert len(trials(priced(layers), LayerPlan(), Options(group="layer"))) == 4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("4g128", (4, 128, None, 0.0)),
        ("3", (3, None, None, 0.0)),
        ("8g-1", (8, -1, None, 0.0)),
        ("4g64+2:4", (4, 64, (2, 4), 0.5)),
        ("4g64+30%", (4, 64, None, 0.3)),
        ("16", (16, None, None, 0.0)),
        ("16+2:4", (16, None, (2, 4), 0.5)),
    ],
)
def test_choices_are_read(text, wanted):
    choice = Choice.read(text)
    assert (choice.wbits, choice.group_size, choice.pattern, choice.sparsity) == wanted


@pytest.mark.parametrize(
    "text", ["", "g64", "1g64", "9g64", "4g4", "16g64", "4g64+4:4", "4g64+100%", "4g64+2:", "int4"]
)
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(ValueError):
        Choice.read(text)
    with pytest.raises(ValueError):
        read_choices([text])


def test_choices_may_be_typed_with_commas_between():
    assert read_choices("3g64, 4g128+2:4") == read_choices(["3g64", "4g128+2:4"])
    assert Options(choices="2g64,4g64").choices == ("2g64", "4g64")
    for wrong in ([], [4], 4, {"a": 1}):
        with pytest.raises(ValueError, match="should be a list"):
            read_choices(wrong)


def test_budgets_are_bytes_or_bits():
    assert Budget.read("0.25x").nbytes(1000) == 250
    assert Budget.read("1.5MiB").nbytes(1000) == 3 * 2**19
    assert Budget.read("2 MB").nbytes(1000) == 2_000_000
    assert Budget.read("3.2bits") == Budget(3.2, "bits")
    for wrong in ("", "3", "bits", "0x", "-1x", "3.2 bit", "1e3MB", "nanx"):
        with pytest.raises(ValueError, match=r"should be 0\.25x"):
            Budget.read(wrong)


# ---- in a run ----


def recipe_for(folder, text, budget, target=None, **more):
    values = {"choices": CHOICES, "samples": 2, "tokens": 24, **more.pop("budget_options", {})}
    calib = {"source": str(text), "nsamples": 4, "seqlen": 32}
    options = {"budget": values, **more.pop("options", {})}
    return read_recipe(
        None,
        {
            "model": str(folder), "calib": calib, "target": {"budget": budget, **(target or {})}, "options": options,
            "pruner": "wanda", "quantizer": "rtn", **more,
        },
    )  # fmt: skip


def plan_of(out):
    """The plan of each layer by name, as the run wrote it."""
    plans = json.loads((out / "run" / "plan.json").read_text())
    pairs = ("pattern", "block")
    return {n: LayerPlan(**each | {k: each[k] and tuple(each[k]) for k in pairs}) for n, each in plans.items()}


@pytest.mark.parametrize(
    ("architecture", "budget", "more"),
    [
        ("llama", "3.3bits", {}),
        ("llama", "3.3bits", {"format": "compressed-tensors"}),
        ("llama", "0.4x", {"target": {"head_bits": 8, "group_size": 32}}),
        ("llama", "0.13MB", {}),
        ("gemma3_text", "0.45x", {"budget_options": {"loss": "logits", "group": "layer", "positions": 5}}),
        ("mixtral", "0.3x", {"budget_options": {"group": "layer"}}),
        ("gpt2", "4bits", {"budget_options": {"group": "block"}}),
        ("opt", "0.5x", {"format": "native"}),
    ],
)
def test_the_checkpoint_keeps_to_the_budget_to_the_byte(tmp_path, text_file, architecture, budget, more):
    folder = save_tiny(tmp_path / "m", architecture, dtype=torch.bfloat16)
    recipe, out, model = recipe_for(folder, text_file, budget, **more), tmp_path / "out", open_model(folder)
    result = compress(recipe, folder, out, QUIET)
    asked, plan = Budget.read(budget), plan_of(out)
    layers = [replace(layer, plan=plan[layer.name]) for layer in plan_layers(model, recipe)]
    sizes = Sizes(model, asked, result["format"])
    planned = sum(sizes.of(layer.place, layer.stored) for layer in layers)
    room = sizes.room([layer.place for layer in layers], plan_head(model, recipe))
    assert planned <= room
    if asked.unit == "bits":
        weights = sum(layer.n_weights for layer in layers)
        assert result["layer_bits_per_weight"] * weights / 8 == pytest.approx(planned, abs=1e-6)
        assert result["layer_bits_per_weight"] <= asked.amount
    else:
        slack = asked.nbytes(dense_bytes(model)) - room + planned - result["compressed_bytes"]
        assert 0 <= slack <= 64 + 30 * len(open_weights(out).entries), "of headers, by a few bytes a tensor"
    for line in Journal(out / "run" / "log.jsonl").read():
        if line["event"] == "layer" and line["step"] == "quantize":
            assert 1 - line["density"] == pytest.approx(plan[line["layer"]].sparsity)


@pytest.mark.parametrize(
    ("budget", "recover", "bits", "options"),
    [
        ("4.2bits", "low-rank", 16, {"rank": 2}),
        ("3.6bits", "low-rank", 4, {"rank": 2}),
        ("0.6x", "low-rank", 4, {"rank": 2, "residual": 0.01}),
        ("0.6x", "low-rank,lrec", 16, {"rank": 2}),
    ],
)
def test_corrections_count_in_the_budget(tmp_path, text_file, budget, recover, bits, options):
    folder = save_tiny(tmp_path / "m", "llama", dtype=torch.bfloat16)
    each = {"low-rank": options, "lrec": {"seqlen": 24, "batch_size": 2, "micro_batch_size": 2, "sparse": 0.005}}
    more = {"options": {name: each[name] for name in recover.split(",")}, "recover_for": "96tokens"}
    recipe = recipe_for(folder, text_file, budget, recover=recover, adapter_bits=bits, **more)
    out, model = tmp_path / "out", open_model(folder)
    result = compress(recipe, folder, out, QUIET)
    layers = [replace(layer, plan=plan_of(out)[layer.name]) for layer in plan_layers(model, recipe)]
    added = [layer.stored.correction for layer in layers if layer.stored]
    assert added and all((each.rank, each.bits) == (2, bits) for each in added)
    assert all(bool(each.single) == ("residual" in options or "lrec" in recover) for each in added)
    asked = Budget.read(budget)
    if asked.unit == "bits":
        planned = sum(Sizes(model, asked, result["format"]).of(layer.place, layer.stored) for layer in layers)
        weights = sum(layer.n_weights for layer in layers)
        assert result["layer_bits_per_weight"] * weights / 8 <= planned <= asked.amount * weights / 8
    else:
        most = asked.nbytes(dense_bytes(model))
        assert 0.8 * most <= result["compressed_bytes"] <= most


def loud(folder, block):
    """The model with a block that adds ten times as much."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if f"layers.{block}." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensors[name] * 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("loss", ["output", "logits"])
def test_a_sensitive_block_gets_more_bits_and_the_plan_beats_the_uniform_one(tmp_path, text_file, loss):
    folder, options = loud(save_tiny(tmp_path / "m"), 0), {"loss": loss, "choices": ["2g32", "3g32", "4g32"]}
    recipe = recipe_for(folder, text_file, "3.7bits", budget_options=options, pruner=None)
    result = compress(recipe, folder, tmp_path / "out", QUIET)
    bits = {name: plan.wbits for name, plan in plan_of(tmp_path / "out").items()}
    of = {block: [b for name, b in bits.items() if f"layers.{block}." in name] for block in range(3)}
    assert np.mean(of[0]) > max(np.mean(of[1]), np.mean(of[2]))
    even = recipe_for(folder, text_file, "3.8bits", budget_options=options | {"choices": ["3g32"]}, pruner=None)
    uniform = compress(even, folder, tmp_path / "even", QUIET)
    assert uniform["layer_bits_per_weight"] >= result["layer_bits_per_weight"]
    assert result["measured_loss"] < uniform["measured_loss"]
    assert f"predicted {result['predicted_loss']:.4g}, measured" in str(inspect(tmp_path / "out").tables)
    assert inspect(tmp_path / "out").data["losses"]["measured_loss"] == result["measured_loss"]


@pytest.mark.parametrize("loss", ["output", "logits"])
def test_the_loss_of_a_plan_with_one_part_is_what_its_trial_measured(tmp_path, text_file, loss):
    """Trials and the finished checkpoint are measured alike: where nothing adds up, prediction and result agree."""
    folder = save_tiny(tmp_path / "m")
    options = {"choices": ["16", "4g32"], "group": "block", "loss": loss}
    recipe = recipe_for(folder, text_file, "23bits", budget_options=options, pruner=None)  # of 32; one block at 5
    result = compress(recipe, folder, tmp_path / "out", QUIET)
    changed = {name.split(".")[2] for name, plan in plan_of(tmp_path / "out").items() if plan.changes}
    assert len(changed) == 1
    assert result["measured_loss"] == pytest.approx(result["predicted_loss"], rel=1e-4)
    notes = [line for line in Journal(tmp_path / "out" / "run" / "log.jsonl").read() if line["event"] == "note"]
    assert len(notes) == 14 and "asks nothing" in notes[0]["note"]


def measured(folder, tmp_path, recipe):
    model = open_model(folder)
    layers = plan_layers(model, recipe)
    tokens = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    with contextlib.closing(RunDir(tmp_path, recipe, {"model": None})) as run:
        found = measure(DenseModel(model, layers, run, QUIET), recipe, tokens)["measured"]
    options = Options(**recipe.options["budget"])
    return dict(zip(trials(layers, recipe.target.layer_plan(), options), found.tolist(), strict=True)), tokens


def test_divergences_are_those_of_the_whole_model(tmp_path, text_file):
    folder = save_tiny(tmp_path / "m", "gemma3_text")
    options = {"loss": "logits", "positions": 24}
    found, tokens = measured(folder, tmp_path / "run", recipe_for(folder, text_file, "4bits", budget_options=options))
    with torch.no_grad():
        model, sample = AutoModelForCausalLM.from_pretrained(folder), tokens[:2, :24]
        dense = model(sample).logits.log_softmax(-1)
        for trial in [trial for trial in found if trial.plan.wbits < 8 and not trial.plan.sparsity]:
            before = {name: model.get_parameter(f"{name}.weight").clone() for name in trial.layers}
            for name, weight in before.items():
                task = LayerTask(name, weight, weight, LayerStats(0), trial.plan, torch.float32)
                model.get_parameter(f"{name}.weight").copy_(rtn.quantize_layer(task, rtn.Options()).weight)
            log_q = model(sample).logits.log_softmax(-1)
            wanted = (dense.exp() * (dense - log_q)).sum(-1).mean().item()
            assert found[trial] == pytest.approx(wanted, rel=1e-3, abs=1e-7)
            for name, weight in before.items():
                model.get_parameter(f"{name}.weight").copy_(weight)


def test_a_trial_does_not_depend_on_the_others(tmp_path, text_file):
    folder = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    more = {"pruner": "sparsegpt", "quantizer": "gptq"}
    there, _ = measured(folder, tmp_path / "a", recipe_for(folder, text_file, "4bits", **more))
    options = {"choices": CHOICES[:0:-1]}
    back, _ = measured(folder, tmp_path / "b", recipe_for(folder, text_file, "4bits", budget_options=options, **more))
    assert len(back) == 3 * 7 * 4 and all(loss == there[trial] for trial, loss in back.items())


def test_trials_may_use_quicker_methods_than_the_recipe(tmp_path, text_file):
    folder, quick = save_tiny(tmp_path / "m"), {"pruner": "magnitude", "quantizer": "rtn"}
    borrowed = recipe_for(folder, text_file, "4bits", budget_options=quick, pruner="wanda", quantizer="gptq")
    own = recipe_for(folder, text_file, "4bits", pruner="magnitude", quantizer="rtn")
    assert measured(folder, tmp_path / "a", borrowed)[0] == measured(folder, tmp_path / "b", own)[0]


def test_a_run_that_goes_on_has_the_same_plan_and_bytes(tmp_path, text_file, llama_folder):
    recipe, out = recipe_for(llama_folder, text_file, "0.45x"), tmp_path / "out"
    straight = compress(recipe, llama_folder, out, QUIET)
    plan, weights = plan_of(out), (out / "model.safetensors").read_bytes()
    for file in ("result.json", "plan.json"):
        (out / "run" / file).unlink()
    again = compress(recipe, llama_folder, out, QUIET)
    assert plan_of(out) == plan and (out / "model.safetensors").read_bytes() == weights
    lines = Journal(out / "run" / "log.jsonl").read()
    assert len([line for line in lines if line["event"] == "measured"]) == 1
    same = ("predicted_loss", "measured_loss", "compressed_bytes")
    assert [again[key] for key in same] == [straight[key] for key in same]


def test_a_dry_run_shows_the_plan(tmp_path, text_file, llama_folder):
    recipe = recipe_for(llama_folder, text_file, "3.3bits")
    report = run_command(recipe, tmp_path / "out", (None, 2), True)
    console = Console(width=140, file=io.StringIO())
    console.print(*report.tables, sep="\n")
    text = console.file.getvalue()
    assert "bits a weight of each block" in text and "loss, predicted" in text
    result = compress(recipe, llama_folder, tmp_path / "out", QUIET)
    assert report.data["plan"] == {name: asdict(plan) for name, plan in plan_of(tmp_path / "out").items()}
    assert report.data["predicted_loss"] == result["predicted_loss"]
    assert report.data["format"] == result["format"]
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert report.data["compressed_bytes"] == result["compressed_bytes"] - header - 8


def test_a_plan_with_2_of_4_is_written_without_its_zeros(tmp_path, text_file, llama_folder):
    options = {"choices": ["4g32+2:4", "8g32"]}
    for budget, name in (("4bits", "native"), ("8.6bits", "compressed-tensors")):
        result = compress(
            recipe_for(llama_folder, text_file, budget, budget_options=options), llama_folder, tmp_path / name, QUIET
        )
        assert result["format"] == name
        assert any(plan.pattern for plan in plan_of(tmp_path / name).values()) == (name == "native")


def test_a_mixture_is_written_so_that_transformers_loads_it_or_says_why_not(tmp_path, text_file, llama_folder):
    options = {"choices": ["3g32", "4g32"], "group": "layer"}
    for symmetric, name in ((None, "native"), (True, "compressed-tensors")):
        out, target = tmp_path / name, {"symmetric": symmetric}
        recipe = recipe_for(
            llama_folder, text_file, "4.2bits", target, budget_options=options, pruner=None, quantizer="gptq"
        )
        assert compress(recipe, llama_folder, out, QUIET)["format"] == name
        assert {plan.wbits for plan in plan_of(out).values()} == {3, 4}
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out)(torch.arange(3, 30)[None], use_cache=False).logits
        model = open_model(out)
        hidden = model.embed(torch.arange(3, 30))
        for block in model.blocks():
            hidden = block(hidden)
        assert torch.equal(model.logits(hidden), loaded.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("target", "more", "line"),
    [
        ({"budget": "3"}, {}, r"target\.budget = '3': should be 0\.25x"),
        ({"budget": None, "allocate": "budget"}, {}, "has nothing to keep to: give --budget, such as 3bits"),
        ({"allocate": "owl"}, {}, "a budget says itself how bits are spread: leave out allocate owl"),
        ({"wbits": 4}, {}, "chooses bits and sparsity itself: leave out --wbits"),
        ({"pattern": "2:4"}, {}, "chooses bits and sparsity itself"),
        ({}, {"budget_options": {"choices": ["5g"]}}, "5g should be BITS"),
        ({}, {"budget_options": {"choices": ["4g32"]}}, "pruner wanda has nothing to do"),
    ],
)
def test_what_a_budget_cannot_mean_is_refused(target, more, line):
    with pytest.raises(InputError, match=line):
        recipe_for("m", "none.txt", "3bits", target=target, **more)


@pytest.mark.parametrize(
    ("budget", "more", "line"),
    [
        ("1bits", {}, r"budget 1bits cannot be met: the smallest choices come to 2\.75 bits a weight: use smaller"),
        ("0.01MB", {}, r"come to \d.* KiB, \d.* KiB of it outside the blocks' layers: use --head-bits 4, smaller"),
        ("0.01MB", {"target": {"head_bits": 4, "group_size": 32}}, "outside the blocks' layers: use smaller choices"),
        ("3bits", {"budget_options": {"choices": ["4g48"]}, "pruner": None}, "groups of 48 do not divide: use other"),
        ("3bits", {"format": "gptq"}, "gptq"),
        ("3bits", {"pruner": "atp", "train": "x.txt"}, "budget tries pruners on parts of the model"),
        ("3bits", {"budget_options": {"quantizer": "gtpq"}}, "no method 'gtpq' to quantize with; did you mean gptq"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_measured(llama_folder, budget, more, line):
    with pytest.raises(InputError, match=line):
        plan_layers(open_model(llama_folder), recipe_for(llama_folder, "none.txt", budget, **more))
