"""Training: it learns, keeps the best, fits its budget, and ends the same whether or not it was killed."""

import math
from itertools import pairwise

import pytest
import torch
from tiny import tiny_lm
from torch import nn

from compress.errors import RunError
from compress.kernels.linear import PackedLinear
from compress.kernels.weights import Grid, IntWeight
from compress.recovery import Learner, ParameterGroup, Recovered, TrainOptions
from compress.trainer import Course, Training, held_out
from compress.training import Session
from compress.training_budget import TrainingBudget

SEQLEN = 24
OPTIONS = TrainOptions(seqlen=SEQLEN, batch_size=4, micro_batch_size=2, lr=1e-1, ce=0.01)
TEN_STEPS = TrainingBudget(tokens=10 * 4 * SEQLEN)


class Scaled(nn.Module):
    """A layer whose outputs learn a factor, which starts much too large, and a shift."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.factor, self.shift = nn.Parameter(torch.full((layer.out_features,), 9.0)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.layer(x) * self.factor + self.shift


class ScaleLearner(Learner):
    """Puts `Scaled` over every feed-forward layer of a model, which is quantized to two bits."""

    def __init__(self, lm, begins=0.0):
        self.layers, self.begins, self.seen = {}, begins, []
        for index, block in enumerate(lm.base_model.layers):
            groups = block.mlp.down_proj.weight.detach().unflatten(1, (-1, 32))
            grid = Grid.fit(groups, 2, True, torch.float32)
            packed = IntWeight.from_codes(grid.encode_groups(groups).flatten(1), grid, 32, True, torch.float32)
            block.mlp.down_proj = self.layers[f"{index}"] = Scaled(PackedLinear(packed, None, torch.float32))

    def groups(self):
        shifts = [layer.shift for layer in self.layers.values()]
        return [
            ParameterGroup([layer.factor for layer in self.layers.values()], weight_decay=0.1),
            ParameterGroup(shifts, lr=0.1, begins=self.begins),
        ]

    def update(self, progress, lr):
        self.seen.append((progress, lr))
        return {"shift": sum(layer.shift.item() for layer in self.layers.values())}

    def tensors(self):
        return {f"{n}.{p}": getattr(x, p).detach() for n, x in self.layers.items() for p in ("factor", "shift")}

    def results(self):
        return {name: Recovered(layer.layer.packed) for name, layer in self.layers.items()}


def windows(n=30):
    return torch.randint(3, 200, (n, SEQLEN), generator=torch.Generator().manual_seed(0))


def course(n=30):
    teacher = tiny_lm("llama").requires_grad_(False)
    with torch.no_grad():
        states = teacher.base_model(windows(n)).last_hidden_state
    return Course(windows(n), states, teacher, seed=3)


def training(begins=0.0, given=None, **options):
    lm = tiny_lm("llama").requires_grad_(False)
    learner = ScaleLearner(lm, begins)
    return Training(lm, learner, given or course(), OPTIONS.model_copy(update=options), "scales"), learner


def session(tmp_path, tell=lambda step, figures: None):
    tmp_path.mkdir(exist_ok=True)
    return Session(tmp_path / "training.safetensors", tell)


def trained(made, tmp_path, budget=TEN_STEPS, tell=lambda step, figures: None):
    here = session(tmp_path, tell)
    made.begin(budget, here)
    return made.run(here)


def test_held_out_loss_falls_and_the_best_state_is_what_is_left(tmp_path):
    made, learner = training()
    told = []
    figures = trained(made, tmp_path, tell=lambda step, figures: told.append(figures))
    held = [each["held_out"] for each in told if "held_out" in each]
    assert figures["loss_after"] == min(figures["loss_before"], *held) < figures["loss_before"]
    assert figures["steps"] == 10 == len(told) and figures["training_tokens"] == 10 * 4 * SEQLEN
    with torch.no_grad():
        assert made._evaluate() == pytest.approx(figures["loss_after"], rel=1e-6)
    assert len(learner.seen) == 10 and learner.seen[0][0] == 0 and learner.seen[-1][0] == 0.9


def test_it_never_ends_worse_than_it_began(tmp_path):
    made, learner = training(lr=100.0)
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    figures = trained(made, tmp_path)
    assert figures["loss_after"] <= figures["loss_before"]
    if figures["best_step"] == 0:
        assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())


def test_killed_and_gone_on_with_it_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.trainer.SAVE_SECONDS", 0.0)
    straight, learner = training(begins=0.3, positions=0.5)
    figures = trained(straight, tmp_path / "straight")

    class Killed(Exception):
        pass

    def kill(step, figures):
        if step in (4, 7):
            raise Killed

    left = [kill, kill, lambda step, figures: None]
    for tell in left:
        other, again = training(begins=0.3, positions=0.5)
        try:
            ended = trained(other, tmp_path / "killed", tell=tell)
        except Killed:
            continue
    for name, tensor in learner.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert {**figures, "training_seconds": 0} == {**ended, "training_seconds": 0}
    mine, theirs = straight._state(), other._state()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_micro_batches_change_nothing_but_memory(tmp_path):
    whole, one = training(micro_batch_size=4)
    parts, two = training(micro_batch_size=3)  # three sequences and one
    trained(whole, tmp_path / "a")
    trained(parts, tmp_path / "b")
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(two.tensors()[name], tensor, atol=2e-4, rtol=2e-3)


def test_a_group_stays_as_it_is_until_it_begins(tmp_path):
    shifts = []
    made, _ = training(begins=0.5)
    trained(made, tmp_path, tell=lambda step, figures: shifts.append(figures["shift"]))
    assert not any(shifts[:5]) and all(shifts[5:])


def test_the_rate_rises_and_falls(tmp_path):
    rates = []
    made, _ = training(warmup=0.25)
    trained(made, tmp_path, TrainingBudget(tokens=20 * 4 * SEQLEN), lambda step, figures: rates.append(figures["lr"]))
    assert rates[:5] == pytest.approx([2e-2, 4e-2, 6e-2, 8e-2, 1e-1])
    assert rates[5] == pytest.approx(1e-1) and all(a > b for a, b in pairwise(rates[5:]))
    assert rates[-1] < 2e-3


def test_a_time_becomes_a_number_of_steps_and_the_rehearsal_leaves_no_trace(tmp_path):
    made, learner = training()
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    made.begin(TrainingBudget(seconds=5.0), session(tmp_path))
    assert made.step == 0 and made.steps >= 1 and not made.optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_no_number_ends_it_by_name_and_step(tmp_path, bad):
    made, learner = training()
    here = session(tmp_path)

    def poison(step, figures):
        if step == 2:
            learner.layers["1"].factor.data.fill_(bad)

    here.tell = poison
    made.begin(TEN_STEPS, here)
    with pytest.raises(RunError, match=r"scales: the .* is (nan|inf) at step 3: lower scales.lr"):
        made.run(here)


def test_every_window_is_learned_from_once_before_any_is_again_and_none_held_out():
    given = course(25)
    assert given.n_held_out == 2
    seen = torch.cat([given.batch(step, 5) for step in range(9)])
    assert sorted(seen[:23].tolist()) == list(range(23)) != seen[:23].tolist()
    assert seen[23:].unique().numel() == 22, "the second turn has another order, and no repeats"
    assert torch.equal(given.batch(4, 5), course(25).batch(4, 5))


@pytest.mark.parametrize(("n", "held"), [(2, 1), (9, 1), (40, 4), (160, 16), (4000, 16)])
def test_a_tenth_is_held_out(n, held):
    assert held_out(n) == held
