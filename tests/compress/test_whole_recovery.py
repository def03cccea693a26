"""Recovery from the command line's recipe to the checkpoint."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.cli import app
from compress.commands import run_command
from compress.errors import InputError
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Journal, RunDir, Shared
from compress.settings import read_setting
from compress.tracker import check_tracker
from compress.trainer import Training
from compress.whole_recovery import prepare_recovery

SMALL = {"seqlen": 24, "batch_size": 2, "micro_batch_size": 2, "lr": 1e-3, "kl": 1.0, "ce": 0.0}
LOWER = {"lrec": {"lr": 1e-4}, "lora": {"lr": 2e-4}}  # whose factors are scaled by 4 and by 2
TOKENS = 24 * 2 * 6


def recipe_for(folder, text, recover, target, **more):
    return read_recipe(
        None,
        {
            "model": str(folder),
            "calib": {"source": str(text), "nsamples": 4, "seqlen": 32},
            "target": {"group_size": 32, **target},
            "recover": recover,
            "recover_for": f"{TOKENS}tokens",
            "options": {name: SMALL | LOWER.get(name, {}) for name in recover.split(",") if name != "low-rank"},
            **more,
        },
    )


def on_text(recipe, **more):
    """The recipe with methods that learn to say what its text says, of which a random model has all to learn."""
    each = {n: o if n == "low-rank" else {**SMALL, "ce": 1.0, **more} for n, o in recipe.options.items()}
    return recipe.model_copy(update={"options": each})


def logits(folder):
    model = open_model(folder)
    hidden = model.embed(torch.arange(3, 30))
    for block in model.blocks():
        hidden = block(hidden)
    return model.logits(hidden)


def digests(out):
    return {file.name: file.read_bytes() for file in sorted(out.rglob("*.safetensors")) if "run" not in file.parts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", dtype=torch.float32)


@pytest.mark.parametrize("method", ["lrec", "qlora", "lora", "l4q", "grid", "pv"])
def test_two_bits_come_nearer_to_the_dense_model(folder, text_file, tmp_path, method):
    recipe = recipe_for(folder, text_file, method, {"wbits": 2})
    result = compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))
    (figures,) = result["recovery"]
    assert figures["method"] == method and figures["training_tokens"] == TOKENS
    assert figures["loss_after"] < figures["loss_before"]
    assert torch.isfinite(logits(tmp_path / "out")).all()
    lines = Journal(tmp_path / "out" / "run" / "log.jsonl").read()
    assert [line["loss_after"] for line in lines if line["event"] == "recovered"] == [figures["loss_after"]]
    assert any(line["event"] == "train" and "held_out" in line for line in lines)
    assert not (tmp_path / "out" / "run" / "teacher").exists()


@pytest.mark.parametrize("method", ["lrec", "pv"])
def test_a_float16_model_learns_and_stays_one(text_file, tmp_path, method):
    folder = save_tiny(tmp_path / "model", "llama", dtype=torch.float16)
    recipe = on_text(recipe_for(folder, text_file, method, {"wbits": 2}))
    (figures,) = compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))["recovery"]
    assert figures["loss_after"] < figures["loss_before"]
    assert logits(tmp_path / "out").dtype == torch.float16 and torch.isfinite(logits(tmp_path / "out")).all()


def test_what_a_tracker_is_told(folder, text_file, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = recipe_for(folder, text_file, "qlora", {"wbits": 4})
    compress(recipe, folder, tmp_path / "out", Reporter(quiet=True, tracker="tensorboard"))
    found = events.EventAccumulator(str(tmp_path / "out" / "run" / "tracker" / "qlora")).Reload()
    told = {"loss", "held_out", "lr", "gradient", "tokens_per_second"}
    assert told <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 7))
    with pytest.raises(InputError, match="there is no tracker 'tensorbored'; there are: "):
        check_tracker("tensorbored")
    with pytest.raises(InputError, match="tracker tensorboard has nothing to do"):
        plain = read_recipe(None, {"model": str(folder), "target": {"wbits": 4}})
        run_command(plain, tmp_path / "other", (None, 1), False, tracker="tensorboard")


def test_killed_between_and_in_methods_it_ends_with_the_same_files(folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.trainer.SAVE_SECONDS", 0.0)
    recipe = recipe_for(folder, text_file, "grid,pv", {"wbits": 2})
    straight = compress(recipe, folder, tmp_path / "straight", Reporter(quiet=True))
    advance, steps, made = Training._advance, [0], []

    def kill(self):
        steps[0] += 1
        if steps[0] in (3, 10):
            raise KeyboardInterrupt
        made.append(self.name)
        return advance(self)

    monkeypatch.setattr(Training, "_advance", kill)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress(recipe, folder, tmp_path / "killed", Reporter(quiet=True))
    killed = compress(recipe, folder, tmp_path / "killed", Reporter(quiet=True))
    assert made == ["grid"] * 6 + ["pv"] * 6, "no step is done twice"
    assert digests(tmp_path / "straight") == digests(tmp_path / "killed")
    figures = ("loss_before", "loss_after", "best_step", "steps", "training_tokens")
    assert [[f[key] for key in figures] for f in straight["recovery"]] == [
        [f[key] for key in figures] for f in killed["recovery"]
    ]
    assert straight["recovery"][1]["loss_before"] == pytest.approx(straight["recovery"][0]["loss_after"], rel=1e-5)


def test_a_pruned_model_keeps_its_zeros(folder, text_file, tmp_path):
    recipe = recipe_for(folder, text_file, "lora", {"pattern": "2:4"}, pruner="wanda")
    result = compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))
    assert result["sparsity"] == pytest.approx(0.5)
    model = open_model(tmp_path / "out")
    for block in model.blocks():
        for layer in block.layers:
            assert ((layer.weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize(("recover", "target"), [("lora", {"pattern": "2:4"}), ("low-rank,qlora", {"wbits": 2})])
def test_adapters_for_the_dense_model_are_loaded_by_peft_and_the_checkpoint_has_none(
    folder, text_file, tmp_path, recover, target
):
    out, plain = tmp_path / "out", tmp_path / "plain"
    recipe = on_text(recipe_for(folder, text_file, recover, target, scatter=True), kl=0.0)
    figures = compress(recipe, folder, out, Reporter(quiet=True))["recovery"][-1]
    assert figures["loss_after"] < figures["loss_before"] and not (out / "run" / "teacher").exists()
    without = {"recover": recover.split(",")[:-1], "scatter": False, "options": {}, "recover_for": "15min"}
    compress(recipe.model_copy(update=without), folder, plain, Reporter(quiet=True))
    assert torch.equal(logits(out), logits(plain)), "compressed layers stay as they are"
    tokens, adapter = torch.arange(3, 30).unsqueeze(0), out / "adapter-for-dense"
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    by_hand = AutoModelForCausalLM.from_pretrained(folder)
    factors = load_file(adapter / "adapter_model.safetensors")
    assert len(factors) == 2 * 7 * 3
    with torch.no_grad():
        before = by_hand(tokens).logits
        for name, a in factors.items():
            if "lora_A" in name:
                layer = by_hand.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += factors[name.replace("lora_A", "lora_B")] @ a
        wanted = by_hand(tokens).logits
        torch.testing.assert_close(tuned(tokens).logits, wanted)
    assert not torch.allclose(wanted, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_adapters_learned_on_a_smaller_model_fit_the_dense_one(folder, text_file, tmp_path):
    atp = {"seqlen": 24, "batch_size": 2, "steps": 6, "lora_rank": 2, "multiple_of": 32}
    recipe = recipe_for(
        folder,
        text_file,
        "lora",
        {"sparsity": 0.3},
        scatter=True,
        pruner="atp",
        train=str(text_file),
        options={"lora": SMALL | {"kl": 0.0, "ce": 1.0}, "atp": atp},
    )
    compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))
    adapter, kept = tmp_path / "out" / "adapter-for-dense", load_file(tmp_path / "out" / "run" / "kept.safetensors")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    small, dense = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "out", folder))
    gone = 0
    for name, factor in load_file(adapter / "adapter_model.safetensors").items():
        layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        side, which = (1, "columns") if "lora_A" in name else (0, "rows")
        stays = kept.get(f"{layer}.{which}", torch.ones(dense[f"{layer}.weight"].shape[side], dtype=torch.bool))
        assert factor.shape[side] == len(stays) == dense[f"{layer}.weight"].shape[side]
        assert int(stays.sum()) == small[f"{layer}.weight"].shape[side]
        assert not factor.movedim(side, 0)[~stays].any() and factor.movedim(side, 0)[stays].any(1).all()
        gone += int((~stays).sum())
    assert gone > 0
    assert torch.isfinite(tuned(torch.arange(3, 30).unsqueeze(0)).logits).all()


def test_what_has_nothing_for_the_dense_model_is_refused(folder, text_file):
    def refused(match, recover, **more):
        with pytest.raises(InputError, match=match):
            prepare_recovery(recipe_for(folder, text_file, recover, {"wbits": 4}, scatter=True, **more))

    refused("lrec learns nothing for the dense model: leave out --scatter, or end with lora", "qlora,lrec")
    refused("low-rank learns nothing for the dense model", "low-rank")
    refused("no adapter of PEFT holds single weights", "lora", options={"lora": {"sparse": 0.01}})
    with pytest.raises(InputError, match="scatter True has nothing to do: give --recover"):
        read_recipe(None, {"model": "m", "target": {"wbits": 4}, "scatter": True})


def test_single_weights_and_directions_of_inputs_reach_the_checkpoint(folder, text_file, tmp_path):
    recipe = recipe_for(folder, text_file, "lrec", {"wbits": 2})
    recipe = on_text(recipe, sparse=0.01, variant="eva", rank=4)
    (figures,) = compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))["recovery"]
    assert figures["loss_after"] < figures["loss_before"]
    held = load_file(tmp_path / "out" / "adapter" / "corrections.safetensors")
    assert all(
        held[f"model.layers.0.{layer}.{part}"].any() for layer in ("self_attn.q_proj", "mlp.down_proj") for part in "ab"
    )
    assert held["model.layers.0.mlp.down_proj.value"].any()


def test_the_teacher_is_dense_where_the_head_is_rounded_and_runs_share_it(folder, text_file, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        RunDir, "drop_blocks", lambda self: made.append(sorted(self.folder_of("teacher").glob("teacher/*")))
    )
    for name, bits in (("a", 16), ("b", 4)):
        recipe = recipe_for(folder, text_file, "grid", {"wbits": 4, "head_bits": bits})
        compress(recipe, folder, tmp_path / name, Reporter(quiet=True), shared=Shared(tmp_path / "shared"))
    (one,), (other,) = made
    assert one.name == other.name and one.read_bytes() == other.read_bytes(), "whatever the head of the student"


def test_what_cannot_be_meant_is_refused_before_anything_is_done(folder, text_file):
    def refused(match, recover="lrec", target=None, **more):
        with pytest.raises(InputError, match=match):
            prepare_recovery(recipe_for(folder, text_file, recover, target or {"wbits": 4}, **more))

    refused("nothing to do: give --wbits, --sparsity", target={"head_bits": 8})
    refused("there is no method 'lerc' to recover with; did you mean lrec", recover="lerc")
    refused("such as 15min, 90s or 200000tokens", recover_for="long")
    refused("low-rank works on layers while they are compressed: name it before grid", recover="grid,low-rank")
    refused("somebody wrote: give --train", calib={"source": "self"})
    with pytest.raises(InputError, match="recover_for 1min has nothing to do: give --recover"):
        read_recipe(None, {"model": "m", "target": {"wbits": 4}, "recover_for": "1min"})


def test_too_little_text_is_said_with_its_mend(folder, tmp_path):
    (tmp_path / "short.txt").write_text(" ".join(f"w{i}" for i in range(3, 33)))
    recipe = recipe_for(folder, tmp_path / "short.txt", "grid", {"wbits": 4}, calib={"nsamples": 1, "seqlen": 16})
    recipe = recipe.model_copy(
        update={"calib": recipe.calib.model_copy(update={"source": str(tmp_path / "short.txt")})}
    )
    with pytest.raises(InputError, match=r"gives 1 windows of 24 tokens.*lower --set grid.seqlen"):
        compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))


@pytest.mark.parametrize(
    ("typed", "names"),
    [("low_rank,lrec", ["low-rank", "lrec"]), ("grid", ["grid"]), ("none", []), ("low-rank+pv", ["low-rank", "pv"])],
)
def test_methods_are_named_in_order(typed, names):
    recipe = read_recipe(None, {"model": "m", "target": {"wbits": 4}, "recover": typed})
    assert recipe.recover == names and recipe.steps[1:] == [("recover", name) for name in names]
    assert read_recipe(None, {"model": "m", "target": {"wbits": 4}, "recover": names}) == recipe


def test_a_sweeps_setting_may_recover():
    values = read_setting("gptq:recover=low-rank+lrec,recover_for=2min,lrec.rank=8,adapter_bits=4")
    recipe = read_recipe(None, {"model": "m", "target": {"wbits": 2}, **values})
    assert recipe.recover == ["low-rank", "lrec"] and recipe.recover_for == "2min" and recipe.adapter_bits == 4


def test_the_command_line_shows_what_a_recovery_takes(folder, text_file, tmp_path):
    from typer.testing import CliRunner

    flags = ["--wbits", "4", "--group-size", "32", "--calib", str(text_file), "--nsamples", "4", "--seqlen", "32"]
    more = ["--recover", "grid", "--recover-for", "480tokens", "--set", "grid.seqlen=24", "--dry-run", "--json"]
    said = CliRunner().invoke(app, ["run", str(folder), *flags, *more, "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    data = json.loads(said.stdout)
    assert data["training_tokens"] == 480 and data["steps"][-1] == "grid"
