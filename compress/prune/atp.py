"""ATP: learn which feed-forward channels and heads to take out while LoRA adapts the model to a text.

Lu et al., All-in-One Tuning and Structural Pruning for Domain-Specific LLMs, arXiv:2412.14426. A small transformer (the
generator) gives every structure a logit; sigmoid((logit + noise + base) / T) is its mask. In turn, the generator learns
from held-out text under soft masks, with 5 log(max(p, p*) / min(p, p*)) added to the loss where p is the kept share of
weights and p* the wanted one, and LoRA learns from the rest under hard masks. LoRA's branch is not masked,
y = m (W x) + B A x, so that a structure may come back; a proximal step of a group lasso (threshold
lr * ratio * 50000 (e^t - 1) / (e - 1), t from 0 to 1) drives the LoRA of masked ones to zero instead. Then the decision is
frozen, LoRA goes on, is merged, and what is masked is taken out. `search=0` decides once, before training, by Wanda's
score summed over a structure: pruning first and tuning then, which the paper compares with.

What differs from the paper: the noise is a difference of two Gumbel variables, since a single one is biased by 0.58. All
blocks keep equally many structures, so that the result is an ordinary model: in each block the largest logits are kept,
as many as thresholds at zero keep in the mean of all blocks. Heads take the place of single dimensions of heads, which
such a model cannot leave out in some blocks (compress/structures.py). `ratio` is the structure's share of the removed
weights. Logits may start from the scores of `search=0` (`prior`). The last decision is taken without noise, and what
LoRA of removed structures then is left at the end is set to zero.

Costs two forward and backward passes of the whole model a step while searching, then one, with all of it in memory.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import InputError, RunError
from compress.options import MethodOptions
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
from compress.structures import HEADS, Masks
from compress.training import Session, Trainee, optimizer_state, restore_optimizer

NEEDS: frozenset[str] = frozenset()

TRIED_BATCHES = 4  # that one-shot scores are taken from and numbers of heads compared on


class Options(MethodOptions):
    """Options of ATP."""

    steps: int = Field(300, ge=1, description="batches that LoRA learns from")
    search: float = Field(0.5, ge=0, le=1, description="share of the steps before the decision is frozen; 0: one shot")
    batch_size: int = Field(4, ge=1, description="windows a step")
    seqlen: int = Field(256, ge=8, description="tokens a window")
    lr: float = Field(2e-4, gt=0, description="learning rate of LoRA, falling to a tenth along a cosine")
    generator_lr: float = Field(1e-3, gt=0, description="learning rate of the generator, falling likewise")
    lora_rank: int = Field(8, ge=1, description="rank of LoRA")
    heads: bool = Field(True, description="take out attention heads too, not only feed-forward channels")
    multiple_of: int = Field(64, ge=1, description="channels that stay are a multiple of this")
    base: float = Field(3.0, description="added to every logit, so that the search starts with nearly all kept")
    prior: float = Field(
        1.0, ge=0, description="standard deviations of one-shot scores in starting logits; 0: as published"
    )
    temperature: float = Field(0.4, gt=0, description="of the masks")
    save_every: int = Field(50, ge=1, description="steps between what a killed run goes on from")


def prune_model(
    trainee: Trainee, windows: Tensor, sparsity: float, options: Options, session: Session
) -> tuple[Masks, dict[str, Any]]:
    """Train, and decide what stays: bool [blocks, size] by structure, equally many in each block; and figures.

    `windows`: tokens [n, seqlen] int64; a tenth of them is held out for the generator. The adapters of what does not stay
    are exactly zero at the end. Goes on from what `session` holds; on a CPU bit for bit as if never stopped.
    Raises InputError for too little text or a sparsity that cannot be reached, RunError if the loss is no number.
    """
    tuning = Tuning(trainee, windows, sparsity, options)
    if (state := session.restore()) is not None:
        tuning.restore(state)
    while tuning.step < options.steps:
        figures = tuning.advance()
        session.tell(tuning.step, figures)
        if tuning.step % options.save_every == 0 or tuning.step == options.steps:
            session.save(tuning.state())
    return tuning.finish()


class Tuning:
    """The state of one run: the generator, LoRA, their optimizers, and the decision once it is taken.

    Noise and batches are functions of the seed and the step, so that there is no random state to keep.
    """

    def __init__(self, trainee: Trainee, windows: Tensor, sparsity: float, options: Options):
        self.trainee, self.sparsity, self.options, self.step = trainee, sparsity, options, 0
        self.kinds = trainee.structures.kinds
        held_out = max(options.batch_size, len(windows) // 10)
        if len(windows) < held_out + options.batch_size:
            raise InputError(
                f"the text to train on gives {len(windows)} windows of {options.seqlen} tokens, and a batch to learn from and "
                f"one held out take {2 * options.batch_size}: use a longer text, or lower atp.seqlen or atp.batch_size"
            )
        self.held_out = self._order(windows[:held_out])
        self.batches = self._order(windows[held_out:])
        self.search_steps = round(options.search * options.steps)
        self.tried = self.held_out[:TRIED_BATCHES]
        scores = trainee.scores(list(self.tried))
        self.generator = Generator(
            trainee.structures.n_blocks, {kind.name: kind.size for kind in self.kinds}, trainee.seed
        ).to(trainee.device)
        self.start = {name: options.base + options.prior * _standardized(each) for name, each in scores.items()}
        self.lora = trainee.parameters()
        self.optimizers = {
            "lora": torch.optim.AdamW(self.lora.values(), weight_decay=0.0),
            "generator": torch.optim.AdamW(self.generator.parameters(), weight_decay=0.0),
        }
        self.decision = None if self.search_steps else self._decided(scores)
        self.first_loss = self.last_loss = math.nan

    def _order(self, windows: Tensor) -> Tensor:
        """Batches [steps, batch_size, seqlen] that go through all windows, shuffled anew each time."""
        random = torch.Generator().manual_seed(self.trainee.seed)
        wanted = self.options.steps * self.options.batch_size
        rounds = [torch.randperm(len(windows), generator=random) for _ in range(-(-wanted // len(windows)))]
        return windows[torch.cat(rounds)[:wanted]].unflatten(0, (self.options.steps, -1))

    def advance(self) -> dict[str, Any]:
        """One step of the generator, while it searches, and one of LoRA. Returns figures of it."""
        figures: dict[str, Any] = {}
        if self.step < self.search_steps:
            figures |= self._generator_step()
            masks = self._hard(self._logits(2 * self.step + 1))
        else:
            if self.decision is None:
                self.decision = self._freeze()
            masks = self.decision
        figures |= self._lora_step(masks)
        self.step += 1
        return figures

    def _logits(self, draw: int | None) -> dict[str, Tensor]:
        """Logits with their start and, unless `draw` is None, noise; [blocks, size] by structure."""
        logits = {name: each + self.start[name] for name, each in self.generator().items()}
        if draw is None:
            return logits
        random = torch.Generator().manual_seed((self.trainee.seed * 1_000_003 + draw) % 2**63)
        return {name: each + gumbel_difference(each.shape, random).to(each.device) for name, each in logits.items()}

    def _kept(self, logits: dict[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
        """The share of weights that stays by thresholds at zero, and the widths all blocks may have that come to it."""
        structures = self.trainee.structures
        counts = {name: mean_count(each, self.options.temperature) for name, each in logits.items()}
        gone = torch.stack([kind.weights * (kind.size - counts[kind.name]) for kind in self.kinds]).sum()
        kept = 1 - structures.n_blocks * gone / structures.n_weights
        return kept, structures.nearest(1 - kept.item(), counts[HEADS].item() if HEADS in counts else 0)

    def _hard(self, logits: dict[str, Tensor]) -> Masks:
        widths = self._kept(logits)[1]
        return {name: largest(each.detach(), widths[name]) for name, each in logits.items()}

    def _generator_step(self) -> dict[str, Any]:
        """Soft masks on held-out text. They are centred on each block's threshold: above one half is what will stay."""
        self.generator.zero_grad()
        temperature = self.options.temperature
        logits = self._logits(2 * self.step)
        kept, widths = self._kept(logits)
        soft = {n: torch.sigmoid((z - thresholds(z, widths[n])) / temperature) for n, z in logits.items()}
        loss = self.trainee.loss(self.held_out[self.step], soft) + budget_loss(kept, 1 - self.sparsity)
        parameters = list(self.generator.parameters())
        loss.backward(inputs=parameters)
        self._update("generator", parameters, self.options.generator_lr, self.step / self.search_steps, 3.0)
        return {"search_loss": self._checked(loss), "kept": kept.item(), **widths}

    def _lora_step(self, masks: Masks) -> dict[str, Any]:
        """LoRA learns from one batch under hard masks, and is shrunk where they are zero."""
        for parameter in self.lora.values():
            parameter.grad = None
        progress = self.step / self.options.steps
        loss = self.trainee.loss(self.batches[self.step], masks, frozen_only=True)
        loss.backward(inputs=list(self.lora.values()))
        self._update("lora", list(self.lora.values()), self.options.lr, progress, 1.0)
        self.last_loss = self._checked(loss)
        if self.step == 0:
            self.first_loss = self.last_loss
        left = self._shrink(masks, self.options.lr * lasso_strength(progress))
        return {"loss": self.last_loss, "removed_norm": left}

    def _update(self, name: str, parameters: list[Any], lr: float, progress: float, clip: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        for group in self.optimizers[name].param_groups:
            group["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * progress))
        self.optimizers[name].step()

    def _checked(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(f"the loss is {value} at step {self.step + 1}: lower atp.lr and atp.generator_lr")
        return value

    @torch.no_grad()
    def _shrink(self, masks: Masks, strength: float) -> float:
        """The proximal step on all groups. Returns the largest norm left of a structure that is masked."""
        left = 0.0
        gone = {kind.name: kind.weights * int((~masks[kind.name]).sum()) for kind in self.kinds}
        for kind in self.kinds:
            threshold = strength * gone[kind.name] / max(1, sum(gone.values()))
            for block in range(self.trainee.structures.n_blocks):
                groups = self.trainee.groups(block, kind)
                left = max(left, shrink(groups, masks[kind.name][block], threshold))
        return left

    @torch.no_grad()
    def _freeze(self) -> Masks:
        """The decision, without noise."""
        return self._decided(self._logits(None))

    @torch.no_grad()
    def _decided(self, scores: dict[str, Tensor]) -> Masks:
        """The largest of each block, as many as meet the budget. Of numbers of heads, the one that loses least is taken."""
        candidates = []
        for widths in self.trainee.structures.choices(self.sparsity):
            masks = {name: largest(each, widths[name]) for name, each in scores.items()}
            losses = [self.trainee.loss(tokens, masks, frozen_only=True).item() for tokens in self.tried]
            candidates.append((sum(losses), masks))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, as tensors."""
        tensors = {f"lora.{name}": p.detach() for name, p in self.lora.items()}
        tensors |= {f"generator.{name}": t for name, t in self.generator.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= optimizer_state(optimizer, f"adam.{name}")
        tensors |= {f"keep.{name}": each for name, each in (self.decision or {}).items()}
        figures = [self.step, self.first_loss, self.last_loss]
        return tensors | {"figures": torch.tensor(figures, dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a state that `state` gave."""
        step, self.first_loss, self.last_loss = tensors["figures"].tolist()
        self.step = int(step)
        with torch.no_grad():
            for name, parameter in self.lora.items():
                parameter.copy_(tensors[f"lora.{name}"])
        self.generator.load_state_dict({name: tensors[f"generator.{name}"] for name in self.generator.state_dict()})
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, f"adam.{name}", tensors)
        if any(name.startswith("keep.") for name in tensors):
            self.decision = {kind.name: tensors[f"keep.{kind.name}"].to(self.trainee.device) for kind in self.kinds}

    def finish(self) -> tuple[Masks, dict[str, Any]]:
        """The decision, with what LoRA it leaves of removed structures set to zero, and the figures of the run."""
        decision = self.decision or self._freeze()
        left = self._shrink(decision, 0.0)
        self._shrink(decision, math.inf)
        widths = {kind.name: int(decision[kind.name][0].sum()) for kind in self.kinds}
        figures = {"first_loss": self.first_loss, "last_loss": self.last_loss, "removed_norm": left, "widths": widths}
        return decision, figures | {"sparsity": self.trainee.structures.sparsity(widths)}


def _standardized(scores: Tensor) -> Tensor:
    """Logarithms of scores [blocks, size] with mean 0 and standard deviation 1 in each block."""
    logs = scores.clamp(min=1e-30).log()
    return (logs - logs.mean(1, keepdim=True)) / logs.std(1, keepdim=True).clamp(min=1e-6)
