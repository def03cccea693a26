"""What multiplies by a packed weight: one class for each way, each with its own memory layout."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compress.kernels.gemm.launch import Epilogue, Tiling
from compress.kernels.inputs import InputQuantizer
from compress.kernels.weights import PackedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """What a layer asks of an implementation. The weight may be without values (on the meta device)."""

    weight: PackedWeight
    device: torch.device  # where the layer is to run
    dtype: torch.dtype  # of its outputs
    inputs: InputQuantizer | None = None  # how what enters it is rounded; None: not at all

    @property
    def key(self) -> str:
        """What decides how fast an implementation is, in a word: "IntWeight 4 bits ... 2048x640 bfloat16"."""
        facts = {"inputs": self.inputs.bits} if self.inputs else {}
        said = " ".join(f"{name} {value}" for name, value in {**self.weight.description(), **facts}.items())
        name, dtype = type(self.weight).__name__, str(self.dtype).removeprefix("torch.")
        return f"{name} out_features {self.weight.shape[0]} {said} {dtype}"


class Implementation(nn.Module, ABC):
    """A weight as one implementation lays it out, made once at load, and the product with it.

    Its tensors are buffers that no state dict holds: they are made from a `PackedWeight` and are no format of files.
    """

    NAME: ClassVar[str]
    ABOUT: ClassVar[str]  # one line: what it does, and where it wins
    ROLE: ClassVar[str] = "packed"  # "packed"; "decode": a dense weight for each call; "dense": one that is kept
    CODES: ClassVar[bool] = (
        False  # takes int8 codes of the inputs, and returns float32; else floats of the case's dtype
    )
    EPILOGUE: ClassVar[bool] = False  # takes an Epilogue as well, and adds it before the outputs are rounded
    BEATEN_FROM: ClassVar[int] = 2**31  # tokens from which decoding is faster, unless this machine was measured
    TILED: ClassVar[bool] = False  # has `candidates`
    tilings: Sequence[Tiling] = ()  # the fastest of them, by tokens; of none a rule decides

    @classmethod
    @abstractmethod
    def supports(cls, case: Case) -> str | None:
        """Why it cannot serve `case`, as in "it needs ..."; None: it can."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, extra: Tensor | Epilogue | None = None) -> Tensor:
            """[tokens, in] to [tokens, out], in floats.

            `extra`: with CODES the scale of each token, float32 [tokens, 1], None if inputs are static; with EPILOGUE
            what is added.
            """

    def candidates(self, tokens: int) -> Sequence[Tiling]:
        """What may be timed to decide how a product of so many tokens is cut into tiles, the rule's own choice first."""
        return ()

    def keep(self, name: str, tensor: Tensor) -> None:
        """Hold a tensor that goes where the module goes."""
        self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(buffer.nbytes for buffer in self.buffers())


def needs_cpu(case: Case) -> str | None:
    """Why an implementation for processors, with floats torch multiplies, cannot serve `case`; None: no reason here."""
    if case.device.type != "cpu":
        return f"it runs on a CPU, not on {case.device.type}"
    if case.dtype not in FLOATS:
        return f"it computes in float16, bfloat16 or float32, not in {case.dtype}"
    return None
