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


def default_launch(
    sizes: tuple[int, int, int], device: torch.device, deterministic: bool = False, tiles: Sequence[Launch] = TILES
) -> Launch:
    """The first of `tiles` that takes all tokens, or the last, with splits that keep the device busy.

    `sizes`: tokens, outputs, and steps of the loop over the inputs. The number of splits does not depend on the tokens,
    and a deterministic launch has tiles of at most 32 of them: beyond that, some GPUs multiply with other instructions.
    A token's outputs are then the same in any batch.
    """
    tokens, out_features, blocks = sizes
    allowed = [tile for tile in tiles if tile.block_m <= INVARIANT or not deterministic]
    tile = next((tile for tile in allowed if tile.block_m >= tokens), allowed[-1])
    wanted = WAVES * multiprocessors(device) // -(-out_features // tile.block_n)
    splits = max(1, min(wanted, blocks // LEAST_BLOCKS))
    tile = tile if torch.version.hip is None else on_amd(tile, wave_of(device))
    return replace(tile, splits=splits, deterministic=deterministic)


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
