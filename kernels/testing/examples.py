"""A small launch of each kernel, as its configuration has it, with the result it should have."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.gemm.launch import Launch
from compress.kernels.packing import pack
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight

SPLITS = 2  # of the inputs, where a configuration has any
STEPS = 2  # of the main loop in each


@dataclass(frozen=True)
class Outcome:
    """What a launch gave, and what it should have."""

    result: Tensor
    reference: Tensor  # of torch, in the dtype of the inputs
    exact: Tensor  # float64
    weights: int  # values of the weight


def run_wna16(config: KernelConfig) -> Outcome:
    """Integer weights of 2, 3, 4 and 8 bits."""
    from compress.kernels.wna16.layout import SlicedWeight
    from compress.kernels.wna16.triton import matmul

    launch, inputs = _launch(config), _inputs(config)
    group, symmetric = config.constexprs["GROUP"] or inputs, "zero_ptr" not in config.signature
    weight = random_int_weight((launch.block_n, inputs), config.constexprs["BITS"], group, symmetric)
    x = _tokens(config, inputs)
    return _product(matmul(x, SlicedWeight.from_int(weight), launch=launch), x, weight.dequantize())


def run_sparse24(config: KernelConfig) -> Outcome:
    """Integer weights of which two in four are kept."""
    from compress.kernels.sparse24.layout import SlicedSparse24Weight
    from compress.kernels.sparse24.triton import matmul

    launch, inputs = _launch(config), _inputs(config)
    group, symmetric = config.constexprs["GROUP"] or inputs, "zero_ptr" not in config.signature
    weight = _pruned(random_int_weight((launch.block_n, inputs), config.constexprs["FIELD"], group, symmetric))
    x = _tokens(config, inputs)
    return _product(matmul(x, SlicedSparse24Weight.from_sparse(weight), launch=launch), x, weight.dequantize())


def run_fragments(config: KernelConfig) -> Outcome:
    """Integer weights, dense or 2:4, in the order of fragments."""
    from compress.kernels.fragments.gluon import matmul
    from compress.kernels.fragments.layout import FragmentWeight

    constants, launch, inputs = config.constexprs, _launch(config), _inputs(config)
    sparse, group = " 2:4 " in config.name, constants["GROUP"] or inputs
    bits = constants["WORDS"] * (2 if sparse else 1) // constants["BLOCK_K"]
    bits += "beside_ptr" in config.signature and not sparse
    dense = random_int_weight((launch.block_n, inputs), bits, group, "zero_ptr" not in config.signature)
    weight = _pruned(dense) if sparse else dense
    laid = (
        FragmentWeight.from_sparse(weight) if isinstance(weight, Sparse24IntWeight) else FragmentWeight.from_int(dense)
    )
    x = torch.randn(launch.block_m - 3, inputs, generator=_seeded(1))
    x = x.to(torch.bfloat16 if " bf16 " in config.name else torch.float16)
    return _product(matmul(x, laid, launch=launch), x, weight.dequantize())


def _pruned(dense: IntWeight) -> Sparse24IntWeight:
    """Two in every four of its weights."""
    (outputs, inputs), bits, group = dense.shape, dense.bits, dense.group_size
    scores = torch.rand(outputs, inputs // 4, 4, generator=_seeded(2))
    keep = (scores.argsort(-1).argsort(-1) < 2).flatten(1)
    zero_point = 2 ** (bits - 1) if dense.zero_point is None else dense.zero_point.repeat_interleave(group, 1)
    codes = torch.where(keep, dense.codes(), zero_point)
    pruned = IntWeight(pack(codes.to(torch.uint8), bits), dense.scale, dense.zero_point, bits, group, inputs)
    return Sparse24IntWeight.from_int(pruned, keep)


def run_codebook(config: KernelConfig) -> Outcome:
    """Sums of vectors from codebooks."""
    from compress.kernels.codebook.layout import SlicedCodebookWeight
    from compress.kernels.codebook.triton import matmul

    constants, launch, inputs = config.constexprs, _launch(config), _inputs(config)
    sizes, generator = (constants["CODEBOOKS"], constants["VECTORS"], constants["VECTOR"]), _seeded(3)
    codes = torch.randint(sizes[1], (launch.block_n, inputs // sizes[2], sizes[0]), generator=generator)
    scale = (torch.rand(launch.block_n, 1, generator=generator) + 0.5).half()
    weight = CodebookWeight.from_codes(codes, torch.randn(sizes, generator=generator).to(dtype_of(config)), scale)
    x = _tokens(config, inputs)
    return _product(matmul(x, SlicedCodebookWeight.from_codebook(weight), launch=launch), x, weight.dequantize())


def run_w8a8(config: KernelConfig) -> Outcome:
    """8-bit inputs and weights."""
    from compress.kernels.w8a8.layout import Int8Weight
    from compress.kernels.w8a8.triton import matmul

    launch, inputs, generator = _launch(config), _inputs(config), _seeded(4)
    weight = random_int_weight((launch.block_n, inputs), 8, inputs, "zero_ptr" not in config.signature)
    dtype = torch.bfloat16 if " bf16 " in config.name else torch.float16
    x = torch.randint(-128, 128, (launch.block_m - 3, inputs), generator=generator, dtype=torch.int8)
    offset = torch.randn(launch.block_n, generator=generator)
    scale = torch.rand(len(x), 1, generator=generator) / 64 if "token_scale_ptr" in config.signature else None
    result = matmul(x, scale, Int8Weight.from_int(weight), offset, dtype, launch)
    product = x.double() @ weight.dequantize().double().T
    exact = (product if scale is None else product * scale.double()) + offset.double()
    return Outcome(result, exact.to(dtype), exact, launch.block_n * inputs)


def random_int_weight(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> IntWeight:
    """Any codes and zero points, scales about 0.01; always the same."""
    generator, groups = _seeded(0), (shape[0], shape[1] // group_size)
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(2**bits, groups, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(groups, generator=generator) * 0.02 + 0.005).half()
    return IntWeight(pack(codes, bits), scale, None if symmetric else zero_point, bits, group_size, shape[1])


def dtype_of(config: KernelConfig) -> torch.dtype:
    """Of the inputs."""
    return torch.bfloat16 if config.signature["x_ptr"] == "*bf16" else torch.float16


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _launch(config: KernelConfig) -> Launch:
    constants = config.constexprs
    splits = 1 if constants["SPLIT"] in ("none", False) else SPLITS
    return Launch(constants["BLOCK_M"], constants["BLOCK_N"], config.num_warps, config.num_stages, splits)


def _inputs(config: KernelConfig) -> int:
    """Of the weight: a few turns of the main loop, whole groups."""
    least = math.lcm(config.constexprs["BLOCK_K"], config.constexprs.get("GROUP") or 1)
    return least * STEPS * _launch(config).splits


def _tokens(config: KernelConfig, inputs: int) -> Tensor:
    """A ragged tile of inputs."""
    return torch.randn(_launch(config).block_m - 3, inputs, generator=_seeded(1)).to(dtype_of(config))


def _product(result: Tensor, x: Tensor, dense: Tensor) -> Outcome:
    return Outcome(result, x @ dense.to(x.dtype).T, x.double() @ dense.double().T, dense.numel())
