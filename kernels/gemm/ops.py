"""Products with a weight in a kernel's layout, as torch operators: each one node to torch.compile, without gradients.

A layout is a frozen dataclass: first its tensors, some of them None, then the numbers that say how to read them. An
operator takes the two lists, and its fake asks the layout for no more than `shape`. `module` launches the kernels by
functions of the same names, and is imported when they first run.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from compress.kernels.gemm.launch import Epilogue, Tiling, as_numbers, candidates, from_numbers

Tensors = Sequence[Tensor | None]
Numbers = Sequence[int]


def product(family: str, layout: type[Any], module: str) -> Callable[..., Tensor]:
    """The operator compress::{family}_matmul, as a function of x, a weight in this layout, and what is optional."""

    def run(
        x: Tensor, tensors: Tensors, numbers: Numbers, epilogue: Tensors, deterministic: bool, tilings: Numbers
    ) -> Tensor:
        weight, measured = layout(*tensors, *numbers), from_numbers(tilings)
        y: Tensor = import_module(module).matmul(x, weight, Epilogue(*epilogue), deterministic, tilings=measured)
        return y

    def fake(
        x: Tensor, tensors: Tensors, numbers: Numbers, epilogue: Tensors, deterministic: bool, tilings: Numbers
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], layout(*tensors, *numbers).shape[0])

    operator = torch.library.custom_op(f"compress::{family}_matmul", run, mutates_args=())
    operator.register_fake(fake)

    def matmul(
        x: Tensor,
        weight: Any,
        epilogue: Epilogue = Epilogue(),
        deterministic: bool = False,
        tilings: Sequence[Tiling] = (),
    ) -> Tensor:
        """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x: float16 or bfloat16 [..., in], on a GPU.

        Deterministic: the same bits in every run, and for a token the same in every batch, as far as torch's products
        with A and B are; otherwise splits of the inputs are added in the order in which they finish. `tilings`: what was
        measured (`choose_launch`). Raises InputError if `x` or the epilogue does not fit the weight, or no kernel runs
        there.
        """
        added = [epilogue.bias, epilogue.a, epilogue.b]
        y: Tensor = operator(x, *_parts(weight), added, deterministic, as_numbers(tilings))
        return y

    return matmul


def dense(family: str, layout: type[Any], module: str) -> Callable[..., Tensor]:
    """The operator compress::{family}_dequantize, as a function of a weight in this layout and a dtype."""

    def run(tensors: Tensors, numbers: Numbers, dtype: torch.dtype, transposed: bool) -> Tensor:
        values: Tensor = import_module(module).dequantize(layout(*tensors, *numbers), dtype, transposed)
        return values

    def fake(tensors: Tensors, numbers: Numbers, dtype: torch.dtype, transposed: bool) -> Tensor:
        shape = layout(*tensors, *numbers).shape
        first = next(tensor for tensor in tensors if tensor is not None)
        return first.new_empty(shape[::-1] if transposed else shape, dtype=dtype)

    operator = torch.library.custom_op(f"compress::{family}_dequantize", run, mutates_args=())
    operator.register_fake(fake)

    def dequantize(weight: Any, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
        values: Tensor = operator(*_parts(weight), dtype, transposed)
        return values

    return dequantize


def tiled(module: str) -> Callable[[Any, int], list[Tiling]]:
    """What is worth timing of the tiles in a module of kernels, as a function of a weight in its layout and tokens."""

    def tilings(weight: Any, tokens: int) -> list[Tiling]:
        """For so many tokens, the default first."""
        return candidates(tokens, import_module(module).tiles(weight))

    return tilings


def _parts(weight: Any) -> tuple[list[Tensor | None], list[int]]:
    values = [getattr(weight, field.name) for field in fields(weight)]
    count = next(i for i, value in enumerate(values) if isinstance(value, int))
    return values[:count], values[count:]
