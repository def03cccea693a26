"""The two implementations that serve any weight on any device: decode it once, or for each call."""

import torch
from torch import Tensor

from compress.kernels.implementation import FLOATS, Case, Implementation
from compress.kernels.weights import PackedWeight

ROWS = 16384  # decoded at a time


def decoded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`, each value rounded once; in pieces, since the whole in float32 can outweigh a model."""
    whole = torch.empty(weight.shape, dtype=dtype, device=next(iter(weight.tensors().values())).device)
    for start in range(0, len(whole), ROWS):
        whole[start : start + ROWS] = weight.rows(slice(start, start + ROWS)).dequantize()
    return whole


class Dense(Implementation):
    """The decoded weight, kept."""

    NAME = "dense"
    ABOUT = "decoded once and kept: a dense layer's speed and memory"
    ROLE = "dense"

    weight: Tensor

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Any weight, in float16, bfloat16 or float32."""
        return None if case.dtype in FLOATS else f"it computes in float16, bfloat16 or float32, not in {case.dtype}"

    def __init__(self, case: Case):
        super().__init__()
        self.keep("weight", decoded(case.weight, case.dtype).to(case.device))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return torch.nn.functional.linear(x, self.weight)


class Reference(Implementation):
    """The packed weight as it came, decoded for each call by plain torch: slow, exact, and the least memory."""

    NAME = "reference"
    ABOUT = "decoded for each call in plain torch: for what nothing else serves, and to compare with"
    ROLE = "decode"

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Any weight, in float16, bfloat16 or float32."""
        return Dense.supports(case)

    def __init__(self, case: Case):
        super().__init__()
        self.kind, self.description, self.dtype = type(case.weight), case.weight.description(), case.dtype
        self.names = list(case.weight.tensors())
        for name, tensor in case.weight.tensors().items():
            self.keep(name, tensor.to(case.device))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        weight = self.kind.from_tensors({name: getattr(self, name) for name in self.names}, self.description)
        return torch.nn.functional.linear(x, decoded(weight, self.dtype))
