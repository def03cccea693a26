"""What the loop over blocks works with: the plan of a run, and what is left of each layer once it is done."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.calib.gradients import FIELDS
from compress.calib.layers import Layer
from compress.calib.model import Model
from compress.calib.ranks import Ranks
from compress.checkpoint.stored import StoredLayer
from compress.gradients import Gradients
from compress.kernels.correction import Correction
from compress.kernels.inputs import InputQuantizer
from compress.kernels.weights import PackedWeight
from compress.plan import PlannedLayer
from compress.run_dir import RunDir
from compress.steps import Step


@dataclass(frozen=True)
class Work:
    """What the loop needs to know."""

    model: Model
    steps: list[Step]
    plans: dict[str, PlannedLayer]
    run: RunDir
    sequential: bool
    refresh_gradients: int = 0  # blocks after which gradients are taken anew; 0: never
    drift: float = 0.0  # share of the drift of earlier layers that each layer makes up for
    format_name: str = "native"  # of the checkpoint, which decides how many bits a weight takes
    adapter_bits: int = 16  # of each number of a correction's factors; 16: of the model's dtype

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the steps read."""
        return frozenset[str]().union(*(step.needs for step in self.steps))

    @property
    def of_inputs(self) -> Step | None:
        """The step that what enters the layers goes through, before the layers themselves go through the others."""
        return next((step for step in self.steps if step.stage == "activations"), None)

    @property
    def of_layers(self) -> list[Step]:
        """The steps that each layer goes through."""
        return [step for step in self.steps if step is not self.of_inputs]

    @property
    def gradients(self) -> Gradients:
        """Those of the needs that are not statistics of an input."""
        return Gradients(self.model, self.run, self.needs & FIELDS, self.refresh_gradients, self.ranks)

    @property
    def ranks(self) -> Ranks:
        """The processes that share the run."""
        return self.run.ranks


@dataclass(frozen=True)
class Finished:
    """What is kept of a layer until its block is saved; the task itself would keep its statistics in memory."""

    layer: Layer
    packed: PackedWeight | None
    keep: Tensor | None  # [out, in] bool
    bits: float  # a weight, scales, zero points and its correction counted
    error: float  # relative, of the layer's output
    inputs: InputQuantizer | None = None
    correction: Correction | None = None
    journal: list[dict[str, Any]] = field(default_factory=list)  # lines about what was done to it

    @property
    def n_weights(self) -> int:
        """How many weights the layer has."""
        return self.layer.shape[0] * self.layer.shape[1]

    @property
    def stored(self) -> StoredLayer | None:
        """The layer as the run folder keeps it; None if it is not quantized."""
        return None if self.packed is None else stored_layer(self.layer, self.packed, self.inputs, self.correction)


def stored_layer(
    layer: Layer, packed: PackedWeight, inputs: InputQuantizer | None = None, correction: Correction | None = None
) -> StoredLayer:
    """A quantized layer as the run folder keeps it."""
    place = (layer.name, layer.param, layer.index, layer.transposed)
    return StoredLayer(*place, packed, inputs=inputs, correction=correction)
