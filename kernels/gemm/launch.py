"""How a product is cut into tiles, which is decided without Triton, and what may be added to it at the end."""

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import InputError

HALF = (torch.float16, torch.bfloat16)
WAVES = 4  # programs wanted for each multiprocessor, so that memory is kept busy
EMULATED = "COMPRESS_EMULATED"  # set while kernels/testing/emulate.py runs launches on CPU tensors
INVARIANT = 32  # most tokens of a tile that any GPU multiplies with the same instructions as 16
AMD_STAGES = 2  # of a pipeline there: what more of them fetch ahead is kept in registers, which spill
LARGE = 64  # tokens of a tile whose sums do not fit the registers of four waves of 32 threads, on AMD's gfx11
SMALL_WAVES = 4  # of a smaller tile on AMD's GPUs, at most: the fewer there are, the more registers each has
LEAST_BLOCKS = 4  # of the inputs in one split; fewer do not fill a pipeline
NUMBERS = 6  # of a `Tiling`


@dataclass(frozen=True)
class Launch:
    """Tiles of the outputs [tokens, out], and among how many programs the inputs of one tile are divided (split-K).

    Deterministic: the sums of splits are added in their order. Otherwise they are added atomically, as they come.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 4
    splits: int = 1
    deterministic: bool = False


@dataclass(frozen=True)
class Tiling:
    """How a product of up to so many tokens is cut: a tile, and programs wanted for each multiprocessor.

    What is measured on a GPU is one of these, not a number of splits: it goes for more than one size of weight.
    """

    tokens: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    waves: int = WAVES

    @classmethod
    def of(cls, tokens: int, tile: Launch, waves: int = WAVES) -> "Tiling":
        """`tile`, for up to `tokens` tokens."""
        return cls(tokens, tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, waves)

    @property
    def tile(self) -> Launch:
        """Without splits."""
        return Launch(self.block_m, self.block_n, self.num_warps, self.num_stages)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of it, in order."""
        return self.tokens, self.block_m, self.block_n, self.num_warps, self.num_stages, self.waves


def as_numbers(tilings: Sequence[Tiling]) -> list[int]:
    """One after the other, as an operator of torch takes them."""
    return [number for tiling in tilings for number in tiling.numbers]


def from_numbers(numbers: Sequence[int]) -> list[Tiling]:
    """The inverse of `as_numbers`."""
    return [Tiling(*numbers[at : at + NUMBERS]) for at in range(0, len(numbers), NUMBERS)]


@dataclass(frozen=True)
class Epilogue:
    """What comes after x Wᵀ: y = x Wᵀ + (x Aᵀ) Bᵀ + bias, where x Aᵀ is rounded to the dtype of x."""

    bias: Tensor | None = None  # [out], any float dtype
    a: Tensor | None = None  # [rank, in], dtype of x
    b: Tensor | None = None  # [out, rank], dtype of x

    @property
    def rank(self) -> int:
        """Rows of A; 0 without one."""
        return 0 if self.a is None else len(self.a)


TILES = (Launch(16, 128), Launch(32, 128), Launch(64, 128), Launch(128, 128, num_warps=8, num_stages=3))


def choose_launch(
    sizes: tuple[int, int, int],
    device: torch.device,
    deterministic: bool = False,
    tiles: Sequence[Launch] = TILES,
    tilings: Sequence[Tiling] = (),
) -> Launch:
    """The first of `tiles` that takes all tokens, or the largest, or what was measured for so many; with splits.

    `sizes`: tokens, outputs, and steps of the loop over the inputs. `tilings`: what was measured, in ascending tokens. A
    deterministic launch leaves it: there the number of splits does not depend on the tokens, and tiles have at most 32 of
    them, since beyond that some GPUs multiply with other instructions. A token's outputs are then the same in any batch.
    """
    tokens, out_features, blocks = sizes
    allowed = [tile for tile in tiles if tile.block_m <= INVARIANT or not deterministic]
    tile, waves = covering(tokens, allowed), WAVES
    measured = None if deterministic else _measured(tokens, tile, tilings)
    if measured is not None and measured.tile in tiles:
        waves = measured.waves
        tile = measured.tile if measured.block_m <= tile.block_m else tile
    wanted = waves * multiprocessors(device) // -(-out_features // tile.block_n)
    splits = max(1, min(wanted, blocks // LEAST_BLOCKS))
    tile = tile if torch.version.hip is None else on_amd(tile, wave_of(device))
    return replace(tile, splits=splits, deterministic=deterministic)


def _measured(tokens: int, rule: Launch, tilings: Sequence[Tiling]) -> Tiling | None:
    """What was measured for at least so many tokens, or for more than the tile of the rule takes."""
    known = [tiling for tiling in tilings if tiling.tokens >= min(tokens, rule.block_m)]
    return next((tiling for tiling in known if tiling.tokens >= tokens), known[-1] if known else None)


def covering(tokens: int, tiles: Sequence[Launch]) -> Launch:
    """The first of `tiles`, which ascend in tokens, that takes all tokens, or else the largest."""
    most = max(tile.block_m for tile in tiles)
    return next(tile for tile in tiles if tile.block_m >= min(tokens, most))


def candidates(tokens: int, tiles: Sequence[Launch]) -> list[Tiling]:
    """What is worth timing for so many tokens: the default first, then fewer and more splits of it, then other tiles for
    as many tokens or half of them."""
    default = covering(tokens, tiles)
    others = [tile for tile in tiles if default.block_m // 2 <= tile.block_m <= default.block_m and tile != default]
    waves = (WAVES, WAVES // 2, 2 * WAVES)
    return [Tiling.of(tokens, default, each) for each in waves] + [Tiling.of(tokens, tile) for tile in others]


def on_amd(tile: Launch, wave: int) -> Launch:
    """The same tile as the registers of AMD's GPUs hold it, whose waves have 32 (gfx10 to gfx12) or 64 threads."""
    if tile.block_m < LARGE:
        warps = min(tile.num_warps, SMALL_WAVES)
    else:
        warps = tile.num_warps * 64 // wave
    return replace(tile, num_warps=warps, num_stages=min(tile.num_stages, AMD_STAGES))


@functools.cache
def wave_of(device: torch.device) -> int:
    """Threads of a GPU's wave; 32 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs on inputs of `dtype` on `device`; None if they do."""
    if dtype not in HALF:
        return f"inputs are {str(dtype).removeprefix('torch.')}; the kernel takes float16 and bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install the extra `gpu`"
    if device.type == "cpu" and os.environ.get(EMULATED) == "1":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter gets bfloat16 wrong" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"Triton kernels need a GPU, and the inputs are on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def check_inputs(x: Tensor, in_features: int, device: torch.device, epilogue: Epilogue, out_features: int) -> None:
    """Raise InputError unless a Triton kernel can multiply `x` with a weight [out, in] on `device`."""
    if x.shape[-1] != in_features:
        raise InputError(
            f"inputs have {x.shape[-1]} features, the weight {in_features}: pass x of [..., {in_features}]"
        )
    if x.device != device:
        raise InputError(f"inputs are on {x.device}, the weight on {device}: move one of them")
    if reason := unavailable(x.device, x.dtype):
        raise InputError(f"no Triton kernel: {reason}")
    if (epilogue.a is None) != (epilogue.b is None):
        raise InputError("a correction of low rank has two factors: pass a [rank, in] and b [out, rank]")
    wanted = {"bias": (out_features,), "a": (epilogue.rank, in_features), "b": (out_features, epilogue.rank)}
    for name, shape in wanted.items():
        part: Tensor | None = getattr(epilogue, name)
        if part is None:
            continue
        if tuple(part.shape) != shape or part.device != device:
            raise InputError(f"{name} is {list(part.shape)} on {part.device}: pass {list(shape)} on {device}")
        if name != "bias" and part.dtype != x.dtype:
            raise InputError(f"{name} is {part.dtype}, the inputs are {x.dtype}: cast it once, where it is loaded")
