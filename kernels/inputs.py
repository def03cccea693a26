"""Integer codes of what enters a linear layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-60  # of a token; an input of zeros only has to divide by something


@dataclass(frozen=True)
class InputQuantizer:
    """How an input [..., in] becomes codes of `bits` bits, symmetric around zero.

    Static: whoever emits the input has divided it by a scale for each channel, and the columns of the weight have been
    multiplied with it, so the code is the nearest whole number to x - shift (OutlierTune, arXiv:2406.18832). Otherwise
    each token has a scale of its own, found from its largest magnitude at run time.
    """

    bits: int  # at most 8
    static: bool = False
    shift: Tensor | None = None  # [in] float32, of static inputs: what the layer itself subtracts; None: nothing

    @property
    def highest(self) -> int:
        """The largest code; the smallest is -highest - 1."""
        return 2 ** (self.bits - 1) - 1

    def token_scale(self, x: Tensor) -> Tensor | None:
        """float32 [..., 1], of bfloat16 values so that code times scale is exact; None if static."""
        if self.static:
            return None
        largest = x.detach().abs().amax(-1, keepdim=True).float()
        return (largest / self.highest).clamp(min=SMALLEST_SCALE).bfloat16().float()

    def codes(self, x: Tensor) -> Tensor:
        """int8, as `x` [..., in]."""
        return self.codes_and_scale(x)[0]

    def codes_and_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes, int8, as `x` [..., in], and what `token_scale` gives."""
        scale = self.token_scale(x)
        return self._codes(x, scale).to(torch.int8), scale

    def fake(self, x: Tensor) -> Tensor:
        """The values that the codes stand for, in the shape and dtype of `x`."""
        scale = self.token_scale(x)
        values = self._codes(x, scale)
        if scale is not None:
            values = values * scale
        elif self.shift is not None:
            values = values + self.shift.to(x.device)
        return values.to(x.dtype)

    def saturated(self, x: Tensor) -> int:
        """How many values of `x` lie beyond the range of the codes; none of inputs with a scale for each token."""
        if not self.static:
            return 0
        rounded = self._shifted(x).round()
        return int(((rounded > self.highest) | (rounded < -self.highest - 1)).sum())

    def _codes(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Codes as floats: of the dtype of `x` if there is nothing to divide by or subtract, else float32."""
        rounded = self._shifted(x).round() if scale is None else x.float().div(scale).round_()
        return rounded.clamp_(-self.highest - 1, self.highest)

    def _shifted(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x.float() - self.shift.to(x.device)
