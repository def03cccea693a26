"""The linear layers of a transformer block, whatever they are made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.kernels.inputs import InputQuantizer

PRODUCTS = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)  # of experts
ROUTERS = ("gate", "router", "shared_expert_gate")  # small layers that choose experts: they stay dense


@dataclass(frozen=True)
class Layer:
    """One linear map inside a block: a module, or one expert's slice of a 3-D parameter."""

    name: str  # "model.layers.0.mlp.down_proj"; experts end in their number
    param: str  # the parameter it is, or is a slice of
    owner: nn.Module  # the module that holds the parameter
    attribute: str  # the parameter's name in `owner`
    index: int | None  # the slice of a 3-D parameter; None for a 2-D one
    transposed: bool  # stored as [in, out]

    @property
    def stored(self) -> Tensor:
        """The weight as the model holds it."""
        parameter = getattr(self.owner, self.attribute)
        return parameter if self.index is None else parameter[self.index]

    @property
    def weight(self) -> Tensor:
        """A view of the weight, [out, in]."""
        return self.stored.T if self.transposed else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), known before any weight is loaded."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def bias(self) -> Tensor | None:
        """What is added to the outputs, [out]; None: nothing."""
        return getattr(self.owner, "bias", None) if self.index is None else None

    @property
    def inputs(self) -> InputQuantizer | None:
        """How what enters the layer is rounded; None: not at all."""
        return getattr(self.owner, "input_quantizer", None)

    def quantize_inputs(self, quantizer: InputQuantizer | None) -> None:
        """Round what enters the layer to the values of its codes, from now on; None: no longer. Not for slices."""
        if quantizer is not None and not hasattr(self.owner, "input_quantizer"):
            self.owner.register_forward_pre_hook(_rounded_input)
        if quantizer is not None or self.inputs is not None:
            self.owner.input_quantizer = quantizer  # type: ignore[assignment]

    def install(self, weight: Tensor) -> None:
        """Overwrite the weight with [out, in] of any float dtype."""
        with torch.no_grad():
            self.weight.copy_(weight)


def _rounded_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer = module.input_quantizer
    return args if quantizer is None else (quantizer.fake(args[0]), *args[1:])


def linear_layers(prefix: str, block: nn.Module) -> list[Layer]:
    """The linear layers of a block called `prefix`, in the order it defines them."""
    layers = []
    for name, module in block.named_modules():
        full = f"{prefix}.{name}"
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in ROUTERS:
            layers.append(Layer(full, f"{full}.weight", module, "weight", None, isinstance(module, Conv1D)))
        elif hasattr(module, "num_experts"):
            layers.extend(_expert_layers(full, module))
    return layers


def _expert_layers(name: str, module: nn.Module) -> list[Layer]:
    """A layer for each expert's slice of a module's 3-D parameters."""
    transposed = bool(getattr(module, "is_transposed", False))
    return [
        Layer(f"{name}.{attribute}.{expert}", f"{name}.{attribute}", module, attribute, expert, transposed)
        for attribute, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        for expert in range(len(parameter))
    ]
