"""Sums of the products of inputs: xᵀx, and yᵀx with y what x is in the dense model, a panel of rows at a time.

Of a symmetric sum only the panels up to the diagonal are kept, and a sum becomes float64 with its second product: of
11,008 inputs one whole float64 sum would take 0.9 GiB.
"""

import contextlib
from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from compress.calib.allocator import return_freed

PANEL = 512  # rows of a sum that are made together

Panels = dict[int, Tensor]


class Products:
    """Sums over bunches of tokens, each product made in float32 and added in float64: their order cannot be told."""

    def __init__(self, places: Container[int] | None = None):
        """`places`: which panels are made here, None: all; the others come by `receive`."""
        self._places = places
        self._squares: Panels = {}  # of the sum of xᵀx, [rows, columns up to the diagonal]
        self._crossed: Panels = {}  # of the sum of yᵀx, [rows, in]
        self._moved: Tensor | None = None  # [in] float64, sum of y - x

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        """Take in x [tokens, in] and, with drift, y `dense` [tokens, in]; both of the dtype that the model computes in."""
        dtype, x = x.dtype, x.float()
        dense = None if dense is None else dense.float()
        with products_of(dtype):
            for place, rows in enumerate(panels(x.shape[1])):
                if self._places is not None and place not in self._places:
                    continue
                _add(self._squares, place, x[:, rows].T @ x[:, : rows.stop])
                if dense is not None:
                    _add(self._crossed, place, dense[:, rows].T @ x)
        if dense is not None:
            moved = (dense - x).sum(0)
            self._moved = moved.double() if self._moved is None else self._moved.add_(moved)

    def made(self) -> dict[str, Tensor]:
        """The panels made here, by what `receive` knows them as."""
        kinds = (("squares", self._squares), ("crossed", self._crossed))
        return {f"{kind} {place}": panel for kind, found in kinds for place, panel in found.items()}

    def receive(self, made: Mapping[str, Tensor]) -> None:
        """Take in panels that were made elsewhere, of the same tokens."""
        for key, panel in made.items():
            kind, place = key.split(" ")
            (self._squares if kind == "squares" else self._crossed)[int(place)] = panel

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The Hessian, the drift and its sum, float32 [in, in], [in, in] and [in]; None: not seen. Uses the sums up.

        The drift is the sum of (y - x) xᵀ, made as that of y xᵀ less the Hessian: y is exact in the model's dtype,
        y - x is not.
        """
        if not self._squares:
            return None, None, None
        hessian = _whole(self._squares)
        for rows in range(0, len(hessian), PANEL):  # mirrored: what lies above the panels is what lies to their left
            own, left = slice(rows, rows + PANEL), slice(0, rows)
            hessian[own, own] = hessian[own, own].tril() + hessian[own, own].tril(-1).T
            hessian[left, own] = hessian[own, left].T
        if self._moved is None:
            return hessian, None, None
        return hessian, _whole(self._crossed, hessian), self._moved.float()


def dealt(widths: Mapping[str, int], count: int, drift: bool) -> dict[str, list[int]]:
    """Who of `count` ranks makes each panel of several inputs; `widths`: their features, by name.

    All panels in a row, the widest inputs' first, are cut into stretches of one cost: few ranks need the same input.
    """
    row = [
        (name, (rows.stop - rows.start) * (rows.stop + width * drift))
        for name, width in sorted(widths.items(), key=lambda each: (-each[1], each[0]))
        for rows in panels(width)
    ]
    total, before = sum(cost for _, cost in row), 0.0
    ranks: dict[str, list[int]] = {name: [] for name in widths}
    for name, cost in row:
        ranks[name].append(int(count * (before + cost / 2) / total))
        before += cost
    return ranks


def panels(width: int) -> list[slice]:
    """The rows of each panel."""
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]


def _add(sums: Panels, place: int, product: Tensor) -> None:
    if place not in sums:
        sums[place] = product  # float32 as long as it is the only one
    else:
        sums[place] = sums[place].double().add_(product)


def _whole(sums: Panels, less: Tensor | None = None) -> Tensor:
    """One float32 matrix of panels of rows, which are dropped on the way; `less` is taken off it."""
    width = sums[max(sums)].shape[1]
    whole = torch.empty(width, width, device=sums[0].device)
    for place, rows in enumerate(panels(width)):
        panel = sums.pop(place)
        whole[rows, : panel.shape[1]] = panel if less is None else panel.double().sub_(less[rows])
    return_freed()
    return whole


@contextlib.contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """While open, float32 matrices that hold values of `dtype` are multiplied by the units for bfloat16 (CPU) or tf32.

    Where those hold the values, products are exact and summed in float32, as before, and several times as fast.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]  # made at run time
    before = cpu.fp32_precision, cuda.fp32_precision
    try:
        if dtype == torch.bfloat16:
            cpu.fp32_precision = "bf16"
        if dtype in (torch.bfloat16, torch.float16):
            cuda.fp32_precision = "tf32"
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
