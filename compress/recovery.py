"""What a method of recovery works on: a compressed model in memory, its layers one by one, and what is to become of them.

A file of compress/recover with `recover_model` takes a `Student`, puts modules that learn in place of its layers, and
returns the `Learner` that a trainer (compress/trainer.py) drives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.kernels.correction import Correction
from compress.kernels.linear import PackedLinear
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import PackedWeight
from compress.options import MethodOptions


class TrainOptions(MethodOptions):
    """What every method that trains takes."""

    lr: float = Field(1e-4, gt=0, description="highest learning rate")
    seqlen: int = Field(512, ge=8, description="tokens a sequence of training text")
    batch_size: int = Field(4, ge=1, description="sequences a step")
    micro_batch_size: int = Field(4, ge=1, description="sequences in memory at once")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    kl: float = Field(1.0, ge=0, description="weight of the divergence from the dense model's next tokens")
    ce: float = Field(0.0, ge=0, description="weight of the cross-entropy of the text's own next tokens")
    positions: float = Field(1.0, gt=0, le=1, description="share of the tokens of a sequence that the loss looks at")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


@dataclass
class StudentLayer:
    """One linear layer of the compressed model, as it stands in it."""

    name: str  # model.layers.0.self_attn.q_proj
    module: nn.Linear  # a PackedLinear where the layer is quantized; else `module.weight` is the weight
    keep: Tensor | None  # [out, in] bool, False where pruned; None: nothing is
    correction: Correction | None  # what an earlier method adds to the weight
    dtype: torch.dtype  # of the model while it trains
    dense: Callable[[], Tensor]  # the weight before compression, float32 [out, in], read from the files
    put: Callable[[nn.Module], None]  # places another module where the layer stands

    @property
    def quantized(self) -> bool:
        """Whether the layer has codes."""
        return isinstance(self.module, PackedLinear)

    @property
    def packed(self) -> PackedWeight | None:
        """Its codes; None: it has none. Where ranks have a share of them each, all of them have to ask."""
        return self.module.packed if isinstance(self.module, PackedLinear) else None

    @property
    def kept(self) -> Tensor | None:
        """Which weights may be other than zero, bool [out, in]; None: all."""
        packed = self.packed if self.keep is None else None
        return packed.keep() if isinstance(packed, Sparse24IntWeight) else self.keep


@dataclass
class Student:
    """A compressed causal language model in memory; nothing in it learns yet."""

    lm: nn.Module
    layers: dict[str, StudentLayer]
    windows: Tensor | None = None  # [n, seqlen] int64, of the text that it will learn from
    scatter: bool = False  # adapters are for the dense model, and leave these layers as they are


@dataclass(frozen=True)
class Recovered:
    """What became of one layer."""

    packed: PackedWeight | None = None  # None: its codes are what they were, or it has none
    weight: Tensor | None = None  # [out, in] float32, of a layer that is not quantized
    correction: Correction | None = None
    for_dense: Correction | None = None  # what was learned for the dense model instead


@dataclass
class ParameterGroup:
    """Parameters that learn in one way."""

    parameters: list[nn.Parameter]
    lr: float = 1.0  # times the method's learning rate
    weight_decay: float = 0.0
    begins: float = 0.0  # share of the steps before which they stay as they are


class Learner(ABC):
    """What learns, and how a step of the optimizer is completed."""

    @abstractmethod
    def groups(self) -> list[ParameterGroup]:
        """What Adam updates."""

    def complete_gradients(self) -> None:  # noqa: B027 - most have nothing to complete
        """What follows once the gradients of a step are summed, before they are clipped."""

    def update(self, progress: float, lr: float) -> Mapping[str, float]:
        """What follows Adam's step, gradients still there. `progress`: 0 to 1; `lr`: of this step. Returns figures of it."""
        return {}

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that the model's outputs and the next step depend on, beside the optimizer's state: by name, not copied."""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    @abstractmethod
    def results(self) -> dict[str, Recovered]:
        """What became of each layer that was changed, by name."""
