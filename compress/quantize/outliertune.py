"""OutlierTune: a static scale for each input channel, folded into the weights, so that the norm emits the codes.

arXiv:2406.18832. Each channel is divided by its largest magnitude over the calibration tokens and its column of every
weight that reads it is multiplied with it before the weights are pruned and quantized, so a product of integers needs no
scale of the input at all. Channels are centred first ("symmetrization") where the norm and all its readers have biases
that can take the shift up; on request elsewhere too, and then the layers subtract it themselves. Only inputs that a norm
emits and nothing but linear layers reads can be treated so: others (of o_proj and down_proj) get a scale for each token.
The shift is the middle of a channel's range over all samples, not the mean of their middles: only so are the ends alike.
It reads ranges and sums of the inputs. At 8 bits a scale for each token is more exact; below, channels win.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.options import MethodOptions
from compress.task import InputTask

NEEDS = frozenset({"x_min", "x_max", "x_sum"})
STATIC = True
SMALLEST = 1e-5  # of a scale, as in the official code; a channel that is always the same has the scale 1


class Options(MethodOptions):
    """Which inputs are centred, and how much of their range the codes span."""

    symmetrize: Literal["auto", "yes", "no"] = Field(
        "auto", description="centre each channel; auto: where the norm and its readers have biases"
    )
    clip_ratio: float = Field(1.0, gt=0, le=1, description="share of the range of the whole input that codes span")


def needs(options: Options) -> frozenset[str]:
    """Sums are for the statistics of shifted inputs."""
    return NEEDS - {"x_sum"} if options.symmetrize == "no" else NEEDS


def scale_inputs(task: InputTask, options: Options) -> InputTask:
    """Give a foldable input static codes; leave others to a scale for each token."""
    low, high = task.stats.x_min, task.stats.x_max
    assert low is not None and high is not None  # NEEDS asks for them
    if not task.foldable:
        return task
    shift = None
    if options.symmetrize == "yes" or (options.symmetrize == "auto" and task.shiftable):
        shift = (low + high) / 2
        low, high = low - shift, high - shift
    largest = _clipped(low, high, options.clip_ratio)
    scale = torch.where(largest > 0, (largest / task.highest).clamp(min=SMALLEST), 1.0)
    return task.scaled(scale, shift, static=True)


def _clipped(low: Tensor, high: Tensor, ratio: float) -> Tensor:
    """The largest magnitude of each channel, [in], within `ratio` of the range of the whole input."""
    return torch.maximum(-low.clamp(min=ratio * low.min()), high.clamp(max=ratio * high.max()))
