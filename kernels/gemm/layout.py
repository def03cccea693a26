"""What the layouts of Triton's products share: rows of 16, and outputs side by side in memory."""

from torch import Tensor

ROWS = 16  # of a plane or slot: the least depth of a product of 16-bit tiles


def turned(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of groups [out, groups] as [groups, out], contiguous, and back."""
    return scale.T.contiguous(), None if zero_point is None else zero_point.T.contiguous()
