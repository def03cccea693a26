"""Budget: try bits, group sizes and patterns on each part of the model, and take the best mixture that fits in a size.

Hubara et al., Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming (AdaQuant),
arXiv:2006.10518, section 4. For each group of layers and each choice, that group alone becomes what the choice says, by
the recipe's own pruner and quantizer (or quicker ones), on statistics of the dense model, and its loss is measured. The
loss of a whole plan is taken to be the sum over groups. An integer programme then finds the plan of least sum whose
bytes, counted in the format that will be written, are within the budget; it is exact (HiGHS, by branch and bound). The
run measures its own checkpoint in the same way and says how far the sum was off.

Costs, beside one pass of all calibration tokens: a solve of every layer for each choice, and a forward of every trial
through the blocks from its own on, n_blocks² / 2 x groups a block x choices block forwards of `samples` sequences. With
the defaults on 18 blocks of seven layers that is 7938 x 4 sequences; groups of whole modules take two sevenths of it.
Hidden states of all trials are kept at once. With `loss` "logits" every trial is sent through the head as well, at
`positions` tokens of each sequence. On Gemma 3 270M at 3 bits, single layers and logits gave 32.9 where modules and
outputs gave 35.6; 2:4 was worth less than fewer bits of the same size, so the choices have no sparsity unless told.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack
from torch import Tensor

from compress.allocate.choices import CHOICES, read_choices
from compress.allocate.spread import Floats, LayerSize, Trial, TrialOptions, groups_of
from compress.errors import RunError
from compress.task import LayerPlan

NEEDS: frozenset[str] = frozenset()  # beyond what the methods in trials read

Counts = NDArray[np.int64]


class Options(TrialOptions):
    """Between what a budget chooses, and how losses are measured."""

    choices: tuple[str, ...] = Field(
        CHOICES, description="BITS[gGROUP][+N:M or +SHARE%]; 16 for weights as they are; a list, or with commas between"
    )
    loss: Literal["output", "logits"] = Field(
        "logits",
        description="the KL divergence of the logits, or the relative squared error of the last block's output",
    )
    group: Literal["layer", "module", "block"] = Field(
        "layer", description="what gets one choice: each layer, each module of a block (attention, mlp), or a block"
    )
    quantizer: str | None = Field(None, description="what quantizes in the trials; none: the recipe's own")

    @field_validator("choices", mode="before")
    @classmethod
    def _readable(cls, given: Any) -> tuple[str, ...]:
        return tuple(choice.text for choice in read_choices(given))


def stand_ins(options: Options) -> dict[str, str | None]:
    """The stages of a trial, and what takes the place of the recipe's own method."""
    return {"prune": options.pruner, "quantize": options.quantizer}


def trials(layers: Sequence[LayerSize], target: LayerPlan, options: Options) -> list[Trial]:
    """What has to be measured: each group at each choice that changes it, by block, then group, then choice."""
    return [
        Trial(group[0].block, tuple(layer.name for layer in group), choice.plan)
        for group in groups_of(layers, options.group)
        for choice in group[0].choices
        if choice.plan.changes
    ]


def choose_plans(layers: Sequence[LayerSize], measured: Tensor, nbytes: int, options: Options) -> dict[str, LayerPlan]:
    """The plan of each layer, from the losses [n_trials] of `trials`, so that all take no more than `nbytes`.

    Raises RunError if losses that are no numbers leave nothing that fits.
    """
    groups = groups_of(layers, options.group)
    plans = [choice.plan for choice in layers[0].choices]
    losses = np.zeros((len(groups), len(plans)))
    losses[:, [plan.changes for plan in plans]] = measured.numpy().reshape(len(groups), -1)
    sizes = [np.sum([[choice.nbytes for choice in layer.choices] for layer in group], axis=0) for group in groups]
    chosen = least_loss(losses, np.array(sizes, np.int64), nbytes)
    return {layer.name: plans[k] for group, k in zip(groups, chosen, strict=True) for layer in group}


def least_loss(losses: Floats, nbytes: Counts, limit: int) -> Counts:
    """The choice of each group, [n_groups], of least total loss among those that take `limit` bytes or fewer together.

    `losses`, `nbytes`: [n_groups, n_choices], of each group at each choice; infinite losses are never chosen. Exact.
    Raises RunError if nothing fits.
    """
    usable = np.isfinite(losses)
    smallest = np.where(usable, nbytes, np.iinfo(np.int64).max).min(1)
    room = limit - int(smallest.sum()) if usable.any(1).all() else -1
    if room < 0:
        raise RunError(
            "every plan that fits the budget has a part whose trial gave NaN or infinity: use a larger --budget, more "
            "calibration samples, or other choices (--set budget.choices=...)"
        )
    extra = np.where(usable, nbytes - smallest[:, None], 0)
    unit = max(int(np.gcd.reduce(extra, axis=None)), 1)  # in whole units solvers' tolerances cannot let a byte through
    excess = np.where(usable, losses - np.where(usable, losses, np.inf).min(1, keepdims=True), 0.0)
    n_groups, n_choices = losses.shape
    one_each = csr_array(
        (np.ones(losses.size), (np.repeat(np.arange(n_groups), n_choices), np.arange(losses.size))),
        shape=(n_groups, losses.size),
    )
    solved = milp(
        excess.ravel() * (1e6 / (excess.max() or 1.0)),  # its gap of 1e-6 is absolute
        integrality=np.ones(losses.size),
        bounds=Bounds(0, usable.ravel().astype(float)),
        constraints=LinearConstraint(
            vstack([one_each, csr_array(extra.reshape(1, -1) // unit)]),
            np.append(np.ones(n_groups), 0),
            np.append(np.ones(n_groups), room // unit),
        ),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RunError(f"the integer programme of the budget was not solved ({solved.message}): please report it")
    chosen: Counts = solved.x.reshape(losses.shape).argmax(1)
    assert extra[np.arange(n_groups), chosen].sum() <= room
    return chosen
