"""Train what a method of recovery has put into a model: Adam, a schedule, a budget, and the best state on held-out text.

The state is written about once a minute. Windows are a function of the seed and the step, and a budget in minutes is
turned into a number of steps before the first one, so a training that goes on after a kill ends bit for bit as it would have.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from compress.calib.ranks import ALONE, Ranks
from compress.distill import Lesson, distillation_loss
from compress.errors import RunError
from compress.recovery import Learner, TrainOptions
from compress.teacher import LastHidden
from compress.training import Session, optimizer_state, restore_optimizer
from compress.training_budget import TrainingBudget

HELD_OUT = 16  # sequences at most that the best state is chosen on
EVALUATIONS = 8  # about as many over the training, beside the first
SAVE_SECONDS = 60.0
REHEARSED = 2  # steps that a rate is measured on, and undone; the first of them is slower than others
BEST, LEARNED, ADAM = "best.", "learned.", "adam"


@dataclass(frozen=True)
class Course:
    """What is learned from: windows of text, the teacher's last hidden states there, and the teacher for its head."""

    windows: Tensor  # [n, seqlen] int64; the last tenth, of 16 at most, is held out
    states: LastHidden | None  # None: nothing asks what the teacher says
    teacher: Any
    seed: int

    @property
    def n_held_out(self) -> int:
        """How many windows are held out."""
        return held_out(len(self.windows))

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of a step, [size] int64: all in turn, in another order each time."""
        n = len(self.windows) - self.n_held_out
        return torch.tensor([self._order(each // n)[each % n] for each in range(step * size, (step + 1) * size)])

    def _order(self, turn: int) -> list[int]:
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) % 2**63)
        return torch.randperm(len(self.windows) - self.n_held_out, generator=random).tolist()


def held_out(n_windows: int) -> int:
    """How many of so many windows are not learned from."""
    return min(HELD_OUT, max(1, n_windows // 10))


class Training:
    """One method's training: `begin` says how long it is, `run` takes it from where its session left it to its end.

    Every rank takes its turn at the micro-batches of a step, and one for which none is left goes along with the last: it
    may have a share of the model that others need. All add up the gradients in the order of the micro-batches, so the
    result does not depend on how many ranks there are.
    """

    def __init__(
        self, lm: nn.Module, learner: Learner, course: Course, options: TrainOptions, name: str, ranks: Ranks = ALONE
    ):
        self.lm, self.learner, self.course, self.options, self.name = lm, learner, course, options, name
        self.ranks = ranks
        lm.eval()  # adapters come with dropout, which the seed and the step do not decide
        self.groups = learner.groups()
        self.optimizer = self._adam()
        dtype, device = next(p.dtype for p in lm.parameters() if p.is_floating_point()), next(lm.parameters()).device
        AcceleratorState._reset_state(reset_partial_state=True)  # a run before this one may have had another dtype
        self.micro = math.ceil(options.batch_size / options.micro_batch_size)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
            gradient_accumulation_steps=self.micro,
            cpu=device.type == "cpu",
        )
        self.step = self.steps = self.best_step = 0
        self.first = self.best_loss = math.nan
        self.best: dict[str, Tensor] = {}

    def _adam(self) -> torch.optim.AdamW:
        groups = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in self.groups]
        return torch.optim.AdamW(groups, lr=self.options.lr)

    def begin(self, budget: TrainingBudget, session: Session) -> None:
        """Go back to where a session was, or measure where the training starts; then it is known how many steps it has."""
        if (state := session.restore()) is not None:
            self._restore(state)
            return
        started = time.monotonic()
        self.first = self._evaluate()
        if budget.tokens is not None:
            self.steps = max(1, budget.tokens // self._tokens_a_step)
            return
        assert budget.seconds is not None
        evaluating = time.monotonic() - started
        seconds = self._rehearse()
        left = budget.seconds - (time.monotonic() - started) - EVALUATIONS * evaluating
        self.steps = self.ranks.agree(lambda: max(1, int(left / seconds)))

    def _rehearse(self) -> float:
        """The seconds of a step. The learner is then as it was."""
        self.steps, seconds = 2 * REHEARSED, 0.0
        for _ in range(REHEARSED):
            started = time.monotonic()
            self._advance()
            seconds = time.monotonic() - started
        self.learner.load(self.best)
        self.optimizer, self.step = self._adam(), 0
        return seconds

    def run(self, session: Session) -> dict[str, Any]:
        """Train to the end, and leave the learner in the state that was best on held-out text.

        Returns figures: loss_before, loss_after (held out, in nats), best_step, steps, training_tokens,
        training_seconds (of all sittings, without what a kill lost).
        Raises RunError if a loss or a gradient is no number.
        """
        saved, every = time.monotonic(), max(1, -(-self.steps // EVALUATIONS))
        while self.step < self.steps:
            began = time.monotonic()
            figures = self._advance()
            figures["tokens_per_second"] = round(self._tokens_a_step / (time.monotonic() - began), 3)
            if self.step % every == 0 or self.step == self.steps:
                figures["held_out"] = self._evaluate()
            session.tell(self.step, figures)
            if time.monotonic() - saved >= SAVE_SECONDS or self.step == self.steps:
                session.save(self._state())
                saved = time.monotonic()
        self.learner.load(self.best)
        return {
            "loss_before": self.first,
            "loss_after": self.best_loss,
            "best_step": self.best_step,
            "steps": self.steps,
            "training_tokens": self.steps * self._tokens_a_step,
            "training_seconds": session.seconds,
        }

    @property
    def _tokens_a_step(self) -> int:
        return self.options.batch_size * self.course.windows.shape[1]

    # ---- a step ----

    def _advance(self) -> dict[str, Any]:
        """One step of the optimizer. Returns figures of it."""
        progress = self.step / max(1, self.steps)
        lr = self.options.lr * self._schedule()
        loss = self._gradients()
        self.learner.complete_gradients()
        active = [group for group in self.groups if progress >= group.begins]
        for group in self.groups:
            if progress < group.begins:
                for parameter in group.parameters:
                    parameter.grad = None
        norm = self.accelerator.clip_grad_norm_([p for group in active for p in group.parameters], self.options.clip)
        self._require_finite("gradient", float(norm or 0.0))
        for group, adam in zip(self.groups, self.optimizer.param_groups, strict=True):
            adam["lr"] = lr * group.lr
        self.optimizer.step()
        more = self.learner.update(progress, lr)
        self.optimizer.zero_grad()
        self.step += 1
        return {"loss": loss, "lr": lr, "gradient": float(norm or 0.0), **more}

    def _schedule(self) -> float:
        """The share of the learning rate: up over the warm-up, then down to zero along a cosine."""
        warmup = math.ceil(self.options.warmup * self.steps)
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (self.step - warmup) / max(1, self.steps - warmup))

    def _gradients(self) -> float:
        """The gradients of a batch, and its loss."""
        total, batch = 0.0, self.course.batch(self.step, self.options.batch_size)
        parts, sums = batch.tensor_split(self.micro), _Gradients(self.lm, self.ranks)
        for _, turn in self.ranks.turns(len(parts)):
            index = self._own(turn)
            with self.ranks.noticing():
                with self.accelerator.autocast():
                    loss = self._loss(parts[index], self.step * self.micro + index)
                share = len(parts[index]) / len(batch)
                value = self._require_finite("loss", loss.item()) * share
                self.accelerator.backward(loss * (share * self.micro))  # which it divides by their number
            sums.add(len(turn))
            total = sum(self.ranks.gather(value)[: len(turn)], total)
        sums.install()
        return total

    def _own(self, turn: list[tuple[int, int]]) -> int:
        """Which micro-batch of a turn is this rank's."""
        return turn[min(self.ranks.number, len(turn) - 1)][1]

    def _loss(self, at: Tensor, draw: int) -> Tensor:
        """The loss of some windows, at positions that `draw` chooses."""
        tokens, options = self.course.windows[at], self.options
        n, seqlen = tokens.shape
        places = torch.arange(n * seqlen).view(n, seqlen)[:, :-1].flatten()
        if options.positions < 1:
            random = torch.Generator().manual_seed((self.course.seed * 1_000_003 + draw) % 2**63)
            chosen = torch.randperm(len(places), generator=random)[: math.ceil(options.positions * len(places))]
            places = places[chosen.sort().values]
        device, states = next(self.lm.parameters()).device, None
        targets, places = tokens.flatten()[places + 1].to(device), places.to(device)
        if self.course.states is not None:
            states = self.course.states[at].flatten(0, 1)[places]
        lesson = Lesson(places, targets, states, self.course.teacher, options.kl, options.ce)
        return distillation_loss(self.lm, tokens.to(device), lesson)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The loss of the held-out windows; a state that is the best so far is kept."""
        windows = torch.arange(len(self.course.windows))[-self.course.n_held_out :]
        parts, total = windows.split(self.options.micro_batch_size), 0.0
        for _, turn in self.ranks.turns(len(parts)):
            index = self._own(turn)
            with self.ranks.noticing():
                value = self._loss(parts[index], -1 - index).item() * len(parts[index])
            total = sum(self.ranks.gather(value)[: len(turn)], total)
        loss = self._require_finite("held-out loss", total / len(windows))
        if not loss >= self.best_loss:  # the first is compared with NaN
            self.best_loss, self.best_step = loss, self.step
            self.best = {name: tensor.detach().clone() for name, tensor in self.learner.tensors().items()}
        return loss

    def _require_finite(self, what: str, value: float) -> float:
        if not math.isfinite(value):
            raise RunError(f"{self.name}: the {what} is {value} at step {self.step + 1}: lower {self.name}.lr")
        return value

    # ---- its state ----

    def _state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        figures = [self.step, self.steps, self.best_step, self.first, self.best_loss]
        tensors = {"figures": torch.tensor(figures, dtype=torch.float64)}
        tensors |= {LEARNED + name: tensor.detach() for name, tensor in self.learner.tensors().items()}
        tensors |= {BEST + name: tensor for name, tensor in self.best.items()}
        return tensors | optimizer_state(self.optimizer, ADAM)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        *counts, self.first, self.best_loss = state["figures"].tolist()
        self.step, self.steps, self.best_step = (int(count) for count in counts)
        self.learner.load(_under(LEARNED, state))
        self.best = _under(BEST, state)
        restore_optimizer(self.optimizer, ADAM, dict(state))


class _Gradients:
    """The sums of all ranks' gradients, micro-batch by micro-batch. Without other ranks autograd adds them up itself."""

    def __init__(self, lm: nn.Module, ranks: Ranks):
        self.ranks = ranks
        self.parameters = {str(i): p for i, p in enumerate(lm.parameters()) if p.requires_grad}
        self.sums: dict[str, Tensor] = {}

    def add(self, n: int) -> None:
        """Add those of the first `n` ranks, which have had a micro-batch each."""
        if self.ranks.alone:
            return
        own = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        for theirs in self.ranks.share_out(own)[:n]:
            for name, gradient in theirs.items():
                self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient

    def install(self) -> None:
        """Give each parameter its sum."""
        for name, gradient in self.sums.items():
            self.parameters[name].grad = gradient


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
