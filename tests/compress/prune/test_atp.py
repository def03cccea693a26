"""ATP: what the search, the shrinking and the whole run have to keep to."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_lm
from transformers import AutoModelForCausalLM

from compress.commands import inspect_command, run_command
from compress.distill import next_token_loss
from compress.errors import InputError
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.prune import atp
from compress.prune.decisions import (
    Generator,
    budget_loss,
    gumbel_difference,
    largest,
    lasso_strength,
    mean_count,
    shrink,
    thresholds,
)
from compress.recipe import read_recipe
from compress.run_dir import Journal
from compress.structures import CHANNELS, HEADS, find_structures
from compress.training import Session, Trainee

QUIET = Reporter(quiet=True)
SMALL = {"steps": 10, "batch_size": 2, "seqlen": 24, "multiple_of": 8, "save_every": 3}


def trainee(folder, heads=True, seed=0):
    model = open_model(folder)
    return Trainee(model, find_structures(model, heads, 8), 4, seed)


def windows(n=40, seqlen=24, seed=0):
    """Ten of the 200 tokens, in any order: that much is easy to learn."""
    return torch.randint(3, 13, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def session(tmp_path, tell=lambda step, figures: None):
    return Session(tmp_path / "training.safetensors", tell)


# ---- the decision ----


def test_the_generator_gives_a_logit_for_each_structure_the_same_for_a_seed():
    sizes = {CHANNELS: 24, HEADS: 4}
    logits, again, other = Generator(5, sizes, 3)(), Generator(5, sizes, 3)(), Generator(5, sizes, 4)()
    assert {name: tuple(each.shape) for name, each in logits.items()} == {CHANNELS: (5, 24), HEADS: (5, 4)}
    assert all(torch.equal(logits[name], again[name]) for name in sizes)
    assert not torch.equal(logits[CHANNELS], other[CHANNELS])
    assert not torch.allclose(logits[CHANNELS][0], logits[CHANNELS][1]), "blocks are told apart"


def test_noise_is_logistic_so_it_favours_neither_side():
    noise = gumbel_difference(torch.Size([200_000]), torch.Generator().manual_seed(0))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert (noise > -3).float().mean().item() == pytest.approx(1 / (1 + math.exp(-3)), abs=0.005)


def test_the_search_starts_with_nearly_all_kept(tmp_path):
    told = []
    atp.prune_model(
        trainee(save_tiny(tmp_path / "m")), windows(), 0.3, atp.Options(**SMALL | {"prior": 0.0, "steps": 1, "search": 1.0}),
        session(tmp_path, lambda step, figures: told.append(figures)),
    )  # fmt: skip
    assert told[0]["kept"] > 0.9


def test_thresholds_lie_between_what_stays_and_what_goes():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    for width in (1, 4, 9, 10):
        above = logits > thresholds(logits, width)
        assert (above.sum(1) == width).all()
        assert torch.equal(above, largest(logits, width))


def test_the_count_is_hard_and_its_gradient_soft():
    logits = torch.tensor([[0.1, -0.2, 3.0], [0.3, 0.2, -5.0]], requires_grad=True)
    count = mean_count(logits, 0.4)
    assert count.item() == pytest.approx(2.0)
    (gradient,) = torch.autograd.grad(count, logits)
    assert (gradient > 0).all() and gradient[0, 0] > gradient[0, 2]


def test_the_budget_is_lowest_where_it_is_met():
    values = [budget_loss(torch.tensor(p), 0.7).item() for p in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert values[2] == pytest.approx(0, abs=1e-6) and values[0] > values[1] > 0.1 < values[3] < values[4]
    assert budget_loss(torch.tensor(0.35), 0.7).item() == pytest.approx(5 * math.log(2))


def test_the_budget_alone_drives_a_generator_to_the_wanted_share():
    generator = Generator(4, {CHANNELS: 64}, 0)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-3)
    random, kept = torch.Generator().manual_seed(0), []
    for _ in range(100):
        logits = generator()[CHANNELS] + 3.0
        share = mean_count(logits + gumbel_difference(logits.shape, random), 0.4) / 64
        kept.append(share.item())
        optimizer.zero_grad()
        budget_loss(share, 0.6).backward()
        optimizer.step()
    assert kept[0] > 0.9
    assert sum(kept[-20:]) / 20 == pytest.approx(0.6, abs=0.04)


# ---- LoRA and its shrinking ----


def test_shrinking_lowers_norms_of_what_goes_and_turns_nothing_round():
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(6, 3, generator=generator), torch.randn(6, 2, 4, generator=generator)]
    before = [group.clone() for group in groups]
    keep = torch.tensor([True, False, False, True, False, False])
    norms = torch.cat([group.flatten(1) for group in groups], 1).norm(dim=1)
    threshold = norms[~keep].median().item()
    left = shrink(groups, keep, threshold)
    after = torch.cat([group.flatten(1) for group in groups], 1).norm(dim=1)
    torch.testing.assert_close(after[~keep], (norms[~keep] - threshold).clamp(min=0))
    assert left == pytest.approx(after[~keep].max().item())
    assert (after[~keep] == 0).any() and (after[~keep] > 0).any()
    for group, old in zip(groups, before, strict=True):
        assert (group * old >= 0).all()
        assert torch.equal(group[keep], old[keep])


def test_the_lasso_grows_from_nothing_to_its_published_strength():
    assert lasso_strength(0.0) == 0 and lasso_strength(1.0) == pytest.approx(50000)


def test_the_adapters_of_masked_channels_learn_while_the_frozen_branch_is_cut(tmp_path):
    learner = trainee(save_tiny(tmp_path), heads=False)
    for block in range(3):  # B starts at zero, and then A has no gradient
        for name in learner.layers[block]:
            learner.factors(block, name)[1].data.normal_(std=0.1)
    keep = {CHANNELS: torch.ones(3, 128, dtype=torch.bool)}
    keep[CHANNELS][:, :50] = False
    loss = learner.loss(windows(2), keep, frozen_only=True)
    parameters = learner.parameters()
    loss.backward(inputs=list(parameters.values()))
    for name in ("gate_proj", "up_proj"):
        gradient = learner.factors(1, f"mlp.{name}")[1].grad
        assert (gradient[:50].abs().sum(1) > 0).all()
    assert (learner.factors(1, "mlp.down_proj")[0].grad[:, :50].abs().sum(0) > 0).all()
    for layer, rows in (("gate_proj", slice(50)), ("up_proj", slice(50))):  # the frozen rows no longer matter
        learner.layers[1][f"mlp.{layer}"].base_layer.weight.data[rows] = 100.0
    learner.layers[1]["mlp.down_proj"].base_layer.weight.data[:, :50] = 100.0
    assert learner.loss(windows(2), keep, frozen_only=True).item() == pytest.approx(loss.item(), abs=1e-6)
    assert {p.dtype for p in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_the_loss_in_pieces_is_transformers_own(monkeypatch, architecture):
    monkeypatch.setattr("compress.distill.POSITIONS", 7)
    monkeypatch.setattr("compress.distill.WORDS", 60)
    lm, tokens = tiny_lm(architecture), windows(3)
    weight = lm.base_model.layers[0].mlp.up_proj.weight
    lm.requires_grad_(False)
    weight.requires_grad_(True)
    ours = next_token_loss(lm, tokens)
    theirs = lm(tokens, labels=tokens, use_cache=False).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, weight)[0], torch.autograd.grad(theirs, weight)[0], rtol=1e-3, atol=1e-6
    )


# ---- a run ----


@pytest.mark.parametrize("search", [0.0, 0.5])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_run_decides_equal_widths_learns_and_clears_what_goes(tmp_path, architecture, search):
    learner = trainee(save_tiny(tmp_path / "m", architecture, num_key_value_heads=1))
    options = atp.Options(**SMALL | {"steps": 30, "search": search, "lr": 1e-2})
    keep, figures = atp.prune_model(learner, windows(100), 0.3, options, session(tmp_path))
    widths = figures["widths"]
    assert {name: set(each.sum(1).tolist()) for name, each in keep.items()} == {n: {w} for n, w in widths.items()}
    assert figures["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert figures["last_loss"] < figures["first_loss"] - 0.2
    assert figures["removed_norm"] < 1e-3, "the lasso left something to be cut off"
    for kind in learner.kinds:
        for block in range(3):
            for group in learner.groups(block, kind):
                assert (group[~keep[kind.name][block]] == 0).all()
                assert group[keep[kind.name][block]].any()
    tokens = windows(2, seed=5)
    with torch.no_grad():
        plain, cut = learner.loss(tokens, keep), learner.loss(tokens, keep, frozen_only=True)
    assert plain.item() == pytest.approx(cut.item(), abs=1e-6), "taking out is exact only if both agree"


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    folder = save_tiny(tmp_path / "m")

    def train(name, at=None):
        learner = trainee(folder)

        def tell(step, figures):
            if step == at:
                raise KeyboardInterrupt

        (tmp_path / name).mkdir(exist_ok=True)
        keep, figures = atp.prune_model(learner, windows(), 0.3, atp.Options(**SMALL), session(tmp_path / name, tell))
        return keep, figures, learner.parameters()

    straight = train("straight")
    for stop in (4, 8):  # while it searches, and after the decision
        with pytest.raises(KeyboardInterrupt):
            train(f"killed at {stop}", stop)
        resumed = train(f"killed at {stop}")
        assert all(torch.equal(straight[0][name], resumed[0][name]) for name in straight[0])
        assert all(torch.equal(straight[2][name], resumed[2][name]) for name in straight[2])
        assert straight[1]["last_loss"] == resumed[1]["last_loss"]


def test_seconds_before_a_kill_count_as_far_as_the_state_was_saved(tmp_path):
    first = session(tmp_path)
    first.started -= 100
    first.save({"x": torch.zeros(1)})
    first.started -= 100  # lost
    second = session(tmp_path)
    assert second.seconds < 100
    second.restore()
    assert 100 <= second.earlier < 200 and second.seconds >= second.earlier


def test_a_finished_training_is_not_repeated_and_its_seconds_count_once(tmp_path, text_file):
    folder = save_tiny(tmp_path / "dense")
    recipe, out = recipe_for(folder, text_file, {"sparsity": 0.3}, steps=2), tmp_path / "out"
    before = compress(recipe, folder, out, QUIET)
    (out / "run" / "result.json").unlink()
    after = compress(recipe, folder, out, QUIET)
    assert after["training_seconds"] == before["training_seconds"] < after["seconds"]
    lines = Journal(out / "run" / "log.jsonl").read()
    assert [line["seconds"] for line in lines if line["event"] == "replayed" and "method" in line] == [
        before["training_seconds"]
    ]
    assert len([line for line in lines if line["event"] == "train"]) == 1


def test_without_peft_it_is_refused_at_once(tmp_path, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    folder = save_tiny(tmp_path / "dense")
    with pytest.raises(InputError, match="training needs peft: pip install"):
        compress(recipe_for(folder, text_file, {"sparsity": 0.3}), folder, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def recipe_for(folder, text, target, **options):
    return read_recipe(
        None,
        {
            "model": str(folder), "pruner": "atp", "train": str(text), "target": target,
            "calib": {"source": str(text), "nsamples": 2, "seqlen": 32},
            "options": {"atp": {**SMALL, "steps": 6, **options}},
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("gemma3_text", {"num_key_value_heads": 1}), ("qwen3", {}), ("qwen2", {})],
)
def test_the_checkpoint_is_an_ordinary_smaller_model(tmp_path, text_file, architecture, changes):
    folder = save_tiny(tmp_path / "dense", architecture, **changes)
    out = tmp_path / "out"
    result = compress(recipe_for(folder, text_file, {"sparsity": 0.3}), folder, out, QUIET)
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in result["sizes"]} == result["sizes"]
    model = AutoModelForCausalLM.from_pretrained(out)
    stored = load_file(out / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in stored.values())
    dense = AutoModelForCausalLM.from_pretrained(folder)
    before, after = (sum(p.numel() for n, p in m.named_parameters() if "proj.weight" in n) for m in (dense, model))
    assert result["sparsity"] == pytest.approx(1 - after / before)
    assert result["sparsity"] == pytest.approx(0.3, abs=0.02)
    with torch.no_grad():
        logits = model(windows(2), use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert "weights taken out" in (out / "README.md").read_text()
    report = inspect_command(out)
    assert "atp kept" in " ".join(report.data["notes"])
    assert compress(recipe_for(folder, text_file, {"sparsity": 0.3}), folder, out, QUIET) == result


def test_what_is_left_is_quantized_in_the_same_run(tmp_path, text_file):
    folder = save_tiny(tmp_path / "dense")
    target = {"sparsity": 0.3, "wbits": 4, "group_size": 32}
    result = compress(recipe_for(folder, text_file, target), folder, tmp_path / "out", QUIET)
    assert result["widths"][CHANNELS] % 32 == 0
    assert result["layer_bits_per_weight"] == pytest.approx(4.5)
    assert result["sizes"]["intermediate_size"] == open_model(tmp_path / "out").config.intermediate_size


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path, text_file):
    folder = save_tiny(tmp_path / "dense")
    recipe = recipe_for(folder, text_file, {"sparsity": 0.3})
    report = run_command(recipe, tmp_path / "out", (None, 1), True)
    assert report.data["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert report.data["compressed_bytes"] < report.data["dense_bytes"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": None}, "atp learns from text: give --train FILE"),
        ({"refine": "dsnot"}, "leave out refine dsnot"),
        ({"target": {"pattern": "2:4"}}, "leave out pattern 2:4"),
        ({"target": {"sparsity": 0.3, "allocate": "owl"}}, "leave out allocate owl"),
        ({"target": {"sparsity": 0.99}}, "come to a sparsity"),
        ({"options": {"atp": {"seqlen": 3000}}}, "use a longer text"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, text_file, changes, said):
    folder = save_tiny(tmp_path / "dense")
    values = recipe_for(folder, text_file, {"sparsity": 0.3}).model_dump(exclude_none=True) | changes
    recipe = read_recipe(None, {key: value for key, value in values.items() if value is not None})
    with pytest.raises(InputError, match=said) as refused:
        compress(recipe, folder, tmp_path / "out", QUIET)
    assert "\n" not in str(refused.value)
