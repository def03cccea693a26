import math

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.calib import gradients
from compress.calib.gradients import FIELDS, GradientPass, Span
from compress.calib.model import Model
from compress.calib.weight_files import WeightFiles
from compress.errors import RunError

TOKENS = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(0))


def open_model(folder):
    return Model(folder, WeightFiles(folder))


def embedded(model, tokens):
    return [model.embed(window) for window in tokens]


def taken(model, folder, tokens=TOKENS, fields=FIELDS, span=None, stored=(), keep=None):
    """Layer name -> field -> gradient, of every block of the span."""
    found = {}
    span = span or range(model.n_blocks)
    going = GradientPass(model, tokens, fields, Span(span, stored), folder)
    going.run(embedded(model, tokens), keep or (lambda index, gradients: found.update(gradients)))
    return found


def by_autograd(folder, model, tokens=TOKENS):
    """The same from the whole model in memory and its own loss: layer name -> field -> gradient."""
    lm = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    layers = [layer for index in range(model.n_blocks) for layer in model.layers_of(index)]
    found = {layer.name: {field: torch.zeros(layer.shape) for field in FIELDS} for layer in layers}
    for window in tokens:
        lm.zero_grad()
        lm(window[None], labels=window[None], use_cache=False).loss.backward()
        for layer in layers:
            gradient = lm.get_parameter(layer.param).grad
            gradient = torch.zeros(layer.shape) if gradient is None else gradient.float()
            gradient = gradient if layer.index is None else gradient[layer.index]
            gradient = gradient.T if layer.transposed else gradient
            targets = len(window) - 1
            found[layer.name]["grad_sq"] += targets * gradient.square() / len(tokens)
            found[layer.name]["grad_abs"] += math.sqrt(targets) * gradient.abs() / len(tokens)
    return found


def difference(a, b):
    """The largest relative difference (in norm) of two passes' gradients, over layers and fields."""
    assert a.keys() == b.keys()
    return max(
        ((a[name][field] - b[name][field]).norm() / b[name][field].norm().clamp_min(1e-30)).item()
        for name in a
        for field in a[name]
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma2", "opt", "gpt2", "mixtral", "qwen3_moe"])
def test_they_are_the_whole_models_gradients(tmp_path, architecture):
    folder = save_tiny(tmp_path / "model", architecture)
    model = open_model(folder)
    ours = taken(model, tmp_path / "pass")
    assert difference(ours, by_autograd(folder, model)) < 2e-6
    assert not list((tmp_path / "pass").iterdir())


def test_no_array_of_tokens_by_vocabulary_is_needed(tmp_path, monkeypatch, llama_folder):
    model = open_model(llama_folder)
    whole = taken(model, tmp_path)
    monkeypatch.setattr("compress.calib.gradients.LOGITS_AT_ONCE", 5 * 200)
    assert difference(taken(model, tmp_path), whole) < 0.01  # bfloat16


def test_only_the_fields_and_the_blocks_that_are_asked_for(tmp_path, llama_folder):
    model = open_model(llama_folder)
    whole = taken(model, tmp_path)
    part = taken(model, tmp_path, fields=frozenset({"grad_abs"}), span=range(2))
    assert {field for fields in part.values() for field in fields} == {"grad_abs"}
    assert part.keys() == {name for name in whole if ".layers.2." not in name}
    for name, fields in part.items():
        assert torch.equal(fields["grad_abs"], whole[name]["grad_abs"])


def test_they_do_not_depend_on_how_often_the_same_sequences_come(tmp_path, llama_folder):
    model = open_model(llama_folder)
    assert difference(taken(model, tmp_path, torch.cat([TOKENS, TOKENS])), taken(model, tmp_path)) < 1e-6


def test_they_hardly_depend_on_the_length_of_sequences_where_tokens_are_independent(tmp_path):
    """Random tokens, so that gradients of tokens are nearly independent: four times the tokens, about the same mean."""
    model = open_model(save_tiny(tmp_path / "model"))
    tokens = torch.randint(3, 200, (64, 97), generator=torch.Generator().manual_seed(1))
    long, short = taken(model, tmp_path, tokens[:48]), taken(model, tmp_path, tokens[:, :25])
    name = "model.layers.1.mlp.down_proj"
    for field in FIELDS:
        ratio = (long[name][field].mean() / short[name][field].mean()).item()
        assert 0.7 < ratio < 1.5  # g² alone would fall to a quarter, |g| to a half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_gradients_do_not_vanish(tmp_path, dtype):
    """A last norm scaled by 2⁻³⁰ scales hidden gradients alike, to 1e-11 and less."""
    folders = {}
    for exponent in (-10, -40):
        lm = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model", dtype=dtype))
        lm.model.norm.weight.data *= 2.0**exponent
        lm.save_pretrained(tmp_path / str(exponent))
        folders[exponent] = tmp_path / str(exponent)
    one, small = (taken(open_model(folder), tmp_path / "pass") for folder in folders.values())
    for name, fields in small.items():
        assert 0 < fields["grad_abs"].max() < 1e-9
        assert (fields["grad_sq"] > 0).float().mean() > 0.99
        torch.testing.assert_close(fields["grad_sq"] * 2.0**60, one[name]["grad_sq"], rtol=2e-2, atol=1e-20)


def test_float16_holds_gradients_that_its_own_autograd_loses(tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model", dtype=torch.float16))
    lm.model.norm.weight.data *= 2.0**-7
    folder = tmp_path / "scaled"
    lm.save_pretrained(folder)
    model = open_model(folder)
    ours, theirs = taken(model, tmp_path / "pass"), by_autograd(folder, model)
    exact = taken(Model(folder, WeightFiles(folder), torch.float32), tmp_path / "pass")
    assert difference(ours, exact) < 0.01 < 0.05 < difference(theirs, exact)


def test_an_expert_no_token_reaches_has_no_gradient(tmp_path):
    model = open_model(save_tiny(tmp_path / "model", "mixtral", num_local_experts=16))
    found = taken(model, tmp_path, torch.tensor([[5] * 12, [9] * 12]))
    experts = [f["grad_sq"] for name, f in found.items() if ".layers.0." in name and "gate_up_proj" in name]
    assert [each.shape for each in experts] == [(256, 64)] * 16
    assert 0 < sum(not each.any() for each in experts) < 16


class _Killed(Exception):
    pass


def killed_at(block, stored, on_disk):
    def keep(index, gradients):
        if index == block and not on_disk:
            raise _Killed
        stored[index] = gradients
        if index == block:
            raise _Killed

    return keep


@pytest.mark.parametrize(("block", "on_disk"), [(2, False), (2, True), (1, False), (1, True), (0, False)])
def test_a_pass_goes_on_where_it_was_killed(tmp_path, llama_folder, monkeypatch, block, on_disk):
    whole = taken(open_model(llama_folder), tmp_path / "straight")
    model, stored, folder = open_model(llama_folder), {}, tmp_path / "pass"
    with pytest.raises(_Killed):
        taken(model, folder, keep=killed_at(block, stored, on_disk))
    model, again = open_model(llama_folder), []
    load = Model.load_block
    monkeypatch.setattr(Model, "load_block", lambda self, index: again.append(index) or load(self, index))
    going = GradientPass(model, TOKENS, FIELDS, Span(range(3), set(stored)), folder)
    done = []
    going.run(embedded(model, TOKENS), stored.__setitem__, lambda: done.append(1))
    assert len(done) == going.steps
    assert again.count(2) == (block == 2 and not on_disk)  # no way to the head again
    found = {name: fields for gradients in stored.values() for name, fields in gradients.items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n][f], whole[n][f]) for n in whole for f in FIELDS)
    assert not list(folder.iterdir())


def test_blocks_beyond_the_span_count_but_are_not_kept_and_a_kill_there_is_survived(
    tmp_path, llama_folder, monkeypatch
):
    model = open_model(llama_folder)
    whole = taken(model, tmp_path / "straight")
    loads, load = [], Model.load_block

    def killed(self, index):
        loads.append(index)
        if loads == [0, 0, 1, 2, 2, 1]:  # probed; forward; backward through block 2
            raise _Killed
        return load(self, index)

    monkeypatch.setattr(Model, "load_block", killed)
    with pytest.raises(_Killed):
        taken(open_model(llama_folder), tmp_path / "pass", span=range(1))
    assert [file.name for file in (tmp_path / "pass").glob("*.gradient")] == ["0002.gradient"]
    loads.clear()
    found = taken(model, tmp_path / "pass", span=range(1))
    assert loads == [0, 1, 0]
    assert len(found) == 7
    assert all(torch.equal(found[n][f], whole[n][f]) for n in found for f in FIELDS)


def test_a_disk_without_room_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, llama_folder):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match=r"takes .* MiB for hidden states"):
        taken(open_model(llama_folder), tmp_path / "pass")
    assert not list((tmp_path / "pass").iterdir())


def test_a_loss_that_is_not_finite_is_told(tmp_path, llama_folder):
    model = open_model(llama_folder)
    model.lm.model.norm.weight[3] = math.nan
    with pytest.raises(RunError, match="a gradient is NaN or infinite"):
        taken(model, tmp_path)


def test_one_layers_gradient_at_a_time_and_one_block(tmp_path, llama_folder, monkeypatch):
    """When a gradient arrives no other is held, and only one block is loaded."""
    model = open_model(llama_folder)
    seen = []
    see = gradients._Sums._see

    def watched(self, name, weight):
        parameters = dict(model.lm.named_parameters())
        assert [n for n, p in parameters.items() if p.grad is not None] == [f"{name}.weight"]
        assert len({n.split(".")[2] for n, p in parameters.items() if ".layers." in n and not p.is_meta}) == 1
        seen.append(name)
        see(self, name, weight)

    monkeypatch.setattr(gradients._Sums, "_see", watched)
    taken(model, tmp_path)
    assert len(seen) == 4 * 21
