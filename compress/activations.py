"""Inputs of quantized layers: each distinct one gets its codes, and its scales a place in the norm and the weights."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calib.layers import Layer
from compress.calib.norms import Norm
from compress.calib.stats import LayerStats
from compress.kernels.inputs import InputQuantizer
from compress.run_dir import Journal
from compress.steps import Step
from compress.task import InputTask, LayerPlan


@dataclass(frozen=True)
class Prepared:
    """What a layer has to know of the input it shares with others."""

    quantizer: InputQuantizer
    scale: Tensor | None = None  # [in] float32, what the columns of the weight are to be multiplied with

    def folded(self, weight: Tensor) -> Tensor:
        """A weight [out, in] that gives the same outputs now."""
        return weight if self.scale is None else weight * self.scale

    def gradients(self, fields: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Gradient fields of the weight as it came, for the weight as it is now."""
        if self.scale is None or not fields:
            return dict(fields)
        gradients = LayerStats(0, grad_sq=fields.get("grad_sq"), grad_abs=fields.get("grad_abs"))
        divided = gradients.divided(self.scale)
        return {name: getattr(divided, name) for name in fields}


class InputPreparer:
    """Takes the inputs of one block's layers through a method of the stage "activations".

    `norms`: those that emit an input, by its first reader; `shared`: layer -> the first layer with the same input.
    """

    def __init__(self, step: Step, norms: dict[str, Norm], shared: dict[str, str], journal: Journal):
        self.step, self.norms, self.shared, self.journal = step, norms, shared, journal

    def prepare(
        self, layers: list[Layer], plans: dict[str, LayerPlan], stats: dict[str, LayerStats]
    ) -> dict[str, Prepared]:
        """Fold what is to be folded, and say what becomes of each input, by layer.

        The norms and the biases are changed in place, and `stats` [layer] to what the layers go on to see. Weights stay
        as they are: whoever installs them multiplies their columns. All layers that share an input have to be there.
        """
        by_input: dict[str, list[Layer]] = {}
        for layer in layers:
            by_input.setdefault(self.shared[layer.name], []).append(layer)
        prepared: dict[str, Prepared] = {}
        for first, readers in by_input.items():
            quantized = [layer.name for layer in readers if self.step.applies(plans[layer.name])]
            if quantized:
                started = time.monotonic()
                done = self._prepare(self.norms.get(first), readers, plans[quantized[0]].abits, stats)
                self._tell(quantized, done, time.monotonic() - started)
                prepared |= {layer.name: done for layer in readers}
        return prepared

    def _prepare(self, norm: Norm | None, readers: list[Layer], abits: int, stats: dict[str, LayerStats]) -> Prepared:
        seen = stats.get(readers[0].name, LayerStats(0))
        shiftable = norm is not None and norm.has_bias and all(layer.bias is not None for layer in readers)
        weights = tuple(layer.weight for layer in readers)
        task: InputTask = self.step.run(InputTask(seen, weights, abits, norm is not None, shiftable))
        if task.scale is None or norm is None:
            return Prepared(InputQuantizer(abits, task.static))
        scale, shift = norm.divide(task.scale, task.shift if shiftable else None)
        if shift is not None:
            seen = seen.shifted(shift)
            for layer in readers:
                _add_to_bias(layer, shift)
        seen = seen.divided(scale)
        stats |= {layer.name: seen for layer in readers}
        own = None if task.shift is None or shiftable else task.shift / scale
        return Prepared(InputQuantizer(abits, task.static, own), scale)

    def _tell(self, layers: list[str], done: Prepared, seconds: float) -> None:
        codes = "static" if done.quantizer.static else "per token"
        facts: dict[str, Any] = {"method": self.step.name, "abits": done.quantizer.bits, "codes": codes}
        for name in layers:
            self.journal.write(event="input", layer=name, **facts, seconds=round(seconds / len(layers), 4))


@torch.no_grad()
def _add_to_bias(layer: Layer, shift: Tensor) -> None:
    """Make up for inputs that are less by `shift` [in], before the columns of the weight are multiplied."""
    assert layer.bias is not None
    layer.bias.copy_(layer.bias.float() + layer.weight.float() @ shift)
