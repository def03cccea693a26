"""A product with a `FragmentWeight`: weights go from memory to tensor cores through registers alone.

Written in Gluon, which is Triton with the layout of registers spelled out; `program.py` writes what a lane does with
those it has loaded.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compress.kernels.fragments.layout import LANES, TILE, VECTOR, FragmentWeight, block_inputs
from compress.kernels.fragments.program import Program
from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.gemm.launch import Epilogue, Launch, Tiling, check_inputs, choose_launch
from compress.kernels.gemm.triton import FLAT, sum_splits

WARPS = 4
OUTPUTS = WARPS * TILE  # of a program
REGISTERS = 168  # of a thread at most, so that a multiprocessor has room for three programs
TILES = tuple(Launch(tokens, OUTPUTS, WARPS, num_stages=1) for tokens in (8, 16, 32))
INVARIANT = TILES[:2]  # add up the sums of a token in the same order


@gluon.jit
def fragment_gemm(
    x_ptr,  # [M, K / 2] int32, pairs of inputs; rows stride_xm apart
    words_ptr,  # [tiles, blocks, WORDS] int32
    beside_ptr,  # [tiles, blocks, BESIDE] int32, places of 2:4 weights or third bits, or None
    zero_ptr,  # [tiles, groups, 8] int32, four zero points each, or None
    scale_ptr,  # [tiles, groups, 16] int32, two scales each
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], or float32 [splits, M, N]
    M,
    N,
    K,
    stride_xm,
    blocks_per_split,
    PROGRAM: gl.constexpr,  # the text
    CONSTRAINTS: gl.constexpr,  # of its operands
    GROUP: gl.constexpr,  # inputs; 0: a group is a whole row
    BLOCK_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    WORDS: gl.constexpr,  # of a block and a tile
    BESIDE: gl.constexpr,
    X: gl.constexpr,  # layouts
    W: gl.constexpr,
    P: gl.constexpr,
    S: gl.constexpr,
    Z: gl.constexpr,
    Y: gl.constexpr,
):
    """y = x Wᵀ + bias: one warp a tile of 32 outputs, and the next block's words are on their way meanwhile.

    Tokens and tiles beyond the last repeat it, and are not written.
    """
    WARPS: gl.constexpr = BLOCK_N // 32
    GROUPS: gl.constexpr = BLOCK_K // GROUP if 0 < GROUP and GROUP < BLOCK_K else 1  # of a block
    groups = 1 if GROUP == 0 else K // GROUP
    blocks = K // BLOCK_K
    begin = gl.program_id(2) * blocks_per_split
    end = gl.minimum(begin + blocks_per_split, blocks)
    words = tile_offsets(N, blocks * WORDS, WARPS, WORDS, W)
    scales = tile_offsets(N, groups * 16, WARPS, GROUPS * 16, S)
    row = gl.minimum(gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, X)), M - 1)
    pairs = row.to(gl.int64)[:, None] * stride_xm
    pairs += gl.arange(0, BLOCK_K // 2, layout=gl.SliceLayout(0, X))[None, :]
    if beside_ptr is not None:
        besides = tile_offsets(N, blocks * BESIDE, WARPS, BESIDE, P)
        e = gl.load(beside_ptr + begin * BESIDE + besides, cache_modifier=".cg")
    if zero_ptr is not None:
        zeros = tile_offsets(N, groups * 8, WARPS, GROUPS * 8, Z)

    sums = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, Y)
    w = gl.load(words_ptr + begin * WORDS + words, cache_modifier=".cg")
    for block in range(begin, end):
        group = 0 if GROUP == 0 else block * BLOCK_K // GROUP
        x = gl.load(x_ptr + block * (BLOCK_K // 2) + pairs)
        s = gl.load(scale_ptr + group * 16 + scales)
        left = (w, e) if beside_ptr is not None else (w,)
        right = (x, s, sums)
        if zero_ptr is not None:
            z = gl.load(zero_ptr + group * 8 + zeros)
            right = (x, s, z, sums)
        more = gl.full([WARPS, WORDS], block + 1 < end, gl.int1, W)
        w = gl.load(words_ptr + (block + 1) * WORDS + words, mask=more, cache_modifier=".cg")
        if beside_ptr is not None:
            more = gl.full([WARPS, BESIDE], block + 1 < end, gl.int1, P)
            e = gl.load(beside_ptr + (block + 1) * BESIDE + besides, mask=more, cache_modifier=".cg")
        sums = gl.inline_asm(PROGRAM, CONSTRAINTS, left + right, sums.type, is_pure=True)
    write_sums(sums, bias_ptr, y_ptr, M, N, SPLIT, Y)


@gluon.jit
def tile_offsets(N, size, WARPS: gl.constexpr, LENGTH: gl.constexpr, LAYOUT: gl.constexpr):
    """[WARPS, LENGTH] places in a tensor [tiles, size], from where each warp's tile starts; 64 bits, so that the loads
    of a thread share an address.
    """
    tile = gl.program_id(0) * WARPS + gl.arange(0, WARPS, layout=gl.SliceLayout(1, LAYOUT))
    tile = gl.minimum(tile, (N + 31) // 32 - 1).to(gl.int64)
    return tile[:, None] * size + gl.arange(0, LENGTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def write_sums(sums, bias_ptr, y_ptr, M, N, SPLIT: gl.constexpr, Y: gl.constexpr):
    """SPLIT "none" writes y [M, N], "buffer" a split's own slice of [splits, M, N], "atomic" adds to [M, N]."""
    n = gl.program_id(0) * sums.shape[0] + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, Y))
    m = gl.program_id(1) * sums.shape[1] + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, Y))
    inside = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(gl.int64)[None, :] * N + n[:, None]
    if bias_ptr is not None:
        sums += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    if SPLIT == "atomic":
        gl.atomic_add(y_ptr + at, sums, mask=inside, sem="relaxed")
    else:
        if SPLIT == "buffer":
            at += gl.program_id(2).to(gl.int64) * M * N
        gl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=inside)


def _layout(shape, registers, lanes, warps):
    return gl.DistributedLinearLayout(registers, lanes, warps, [], list(shape))


def _along(axis: int, *steps: int) -> list[list[int]]:
    return [[0, step] if axis else [step, 0] for step in steps]


def _doubled(first: int, end: int) -> list[int]:
    """first, 2 first, ... below `end`."""
    return [first << i for i in range((end // first).bit_length() - 1)]


@cache
def constants(program: Program) -> dict[str, object]:
    """What the kernel is compiled for: the text, and which register of which lane holds what."""
    block, words, groups = program.block, LANES * program.words, program.groups
    vectors, own = _along(1, *_doubled(VECTOR, LANES * VECTOR)), _along(0, *_doubled(1, WARPS))
    quads = [[0, 0], [0, 0]]  # the four lanes of a quad have the same
    tokens = _along(0, *_doubled(8, 8 * program.columns))
    rows = _along(0, 1, 2, 4)
    return {
        "PROGRAM": program.text(),
        "CONSTRAINTS": program.constraints(),
        "BLOCK_K": block,
        "BLOCK_M": 8 * program.columns,
        "BLOCK_N": OUTPUTS,
        "WORDS": words,
        "BESIDE": LANES * program.beside,
        "X": _layout(
            (8 * program.columns, block // 2),
            [*_along(1, 1, 2, *_doubled(16, block // 2)), *tokens],
            [*_along(1, 4, 8), *rows],
            _along(0, 0, 0),
        ),
        "W": _layout((WARPS, words), _along(1, 1, 2, *_doubled(128, words)), vectors, own),
        "P": _beside(program),
        "S": _layout((WARPS, 16 * groups), _along(1, 1, *_doubled(16, 16 * groups)), quads + _along(1, 2, 4, 8), own),
        "Z": _layout((WARPS, 8 * groups), _along(1, *_doubled(8, 8 * groups)), quads + _along(1, 1, 2, 4), own),
        "Y": _layout(
            (OUTPUTS, 8 * program.columns),
            [[0, 1], [8, 0], [16, 0], *_along(1, *_doubled(8, 8 * program.columns))],
            [*_along(1, 2, 4), *rows],
            _along(0, 32, 64),
        ),
    }


def _beside(program: Program) -> object:
    """Places of fours in one plane of a block, third bits in halves of it."""
    pair, own = 4 if program.sparse else 2, _along(0, *_doubled(1, WARPS))
    words = LANES * max(program.beside, pair)
    registers = _along(1, *_doubled(1, pair), *_doubled(LANES * pair, words))
    return _layout((WARPS, words), registers, _along(1, *_doubled(pair, LANES * pair)), own)


def tiles(weight: FragmentWeight) -> tuple[Launch, ...]:
    """What a product may be cut into."""
    return TILES


def matmul(
    x: Tensor,
    weight: FragmentWeight,
    epilogue: Epilogue = Epilogue(),
    deterministic: bool = False,
    launch: Launch | None = None,
    tilings: Sequence[Tiling] = (),
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x [..., in]; see `ops.matmul`."""
    out_features, in_features = weight.shape
    check_inputs(x, in_features, weight.words.device, epilogue, out_features)
    flat = x.reshape(-1, in_features)
    y = flat.new_empty(len(flat), out_features)
    if not len(flat):
        return y.unflatten(0, x.shape[:-1])
    blocks = in_features // block_inputs(weight.bits, weight.sparse)
    sizes, allowed = (len(flat), out_features, blocks), INVARIANT if deterministic else tiles(weight)
    launch = launch or choose_launch(sizes, x.device, deterministic, allowed, tilings)
    whole = weight.group_size == in_features
    program = Program(
        bits=weight.bits,
        group=in_features if whole else weight.group_size,
        columns=launch.block_m // 8,
        sparse=weight.sparse,
        symmetric=weight.zero_point is None,
        bfloat16=x.dtype == torch.bfloat16,
        bfloat16_scale=weight.scale.dtype == torch.bfloat16,
    )
    blocks = in_features // program.block
    blocks_per_split = triton.cdiv(blocks, launch.splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    target, how = _target(y, splits, low_rank(flat, epilogue), launch.deterministic)
    pairs = input_pairs(flat, weight.sparse)
    grid = (triton.cdiv(out_features, OUTPUTS), triton.cdiv(len(flat), launch.block_m), splits)
    fragment_gemm[grid](
        pairs,
        weight.words,
        weight.places if weight.sparse else weight.high,
        None if weight.zero_point is None else weight.zero_point.view(torch.int32),
        weight.scale.view(torch.int32),
        epilogue.bias if how == "none" else None,
        target,
        len(flat),
        out_features,
        in_features,
        pairs.stride(0),
        blocks_per_split,
        GROUP=0 if whole else weight.group_size,
        SPLIT=how,
        num_warps=WARPS,
        maxnreg=REGISTERS,
        **constants(program),
    )
    if how != "none":
        flat_grid = (triton.cdiv(y.numel(), FLAT),)
        sum_splits[flat_grid](target, epilogue.bias, y, out_features, y.numel(), len(target), FLAT)
    return y.unflatten(0, x.shape[:-1])


def low_rank(flat: Tensor, epilogue: Epilogue) -> Tensor | None:
    """(x Aᵀ) Bᵀ, float32 [tokens, out]: a second small product, which the splits are added to."""
    if epilogue.a is None or epilogue.b is None or not epilogue.rank:
        return None
    return (flat @ epilogue.a.T).float() @ epilogue.b.float().T


def _target(y: Tensor, splits: int, correction: Tensor | None, deterministic: bool) -> tuple[Tensor, str]:
    """What the kernel writes to, and how: y itself, its own slice of a buffer of float32, or sums of them."""
    if splits == 1 and correction is None:
        return y, "none"
    if splits == 1 or not deterministic:
        start = torch.zeros(y.shape, dtype=torch.float32, device=y.device) if correction is None else correction
        return start.unsqueeze(0), "atomic"
    more = 0 if correction is None else 1
    buffer = torch.empty(splits + more, *y.shape, dtype=torch.float32, device=y.device)
    if correction is not None:
        buffer[splits] = correction
    return buffer, "buffer"


def input_pairs(flat: Tensor, sparse: bool) -> Tensor:
    """x [tokens, in] as int32 [tokens, in / 2], rows at multiples of 16 bytes; for 2:4 weights transposed 4 by 4."""
    aligned = flat.stride(1) == 1 and flat.stride(0) % 32 == 0 and flat.data_ptr() % 16 == 0
    pairs = (flat if aligned else flat.clone(memory_format=torch.contiguous_format)).view(torch.int32)
    return pairs.unflatten(1, (-1, 4, 4)).transpose(2, 3).flatten(1) if sparse else pairs


def _config(weight: tuple[int, int, str], dtype: str, columns: int, sparse: bool = False) -> KernelConfig:
    """The product as `matmul` launches it, splits added atomically; `weight`: bits, group size, zero points."""
    bits, group, kind = weight
    program = Program(bits, group or 2**30, columns, sparse, kind == "sym", dtype == "bf16", False)
    pointers = {"x": "i32", "words": "i32", "scale": "i32", "y": "fp32"}
    pointers |= {"beside": "i32"} if program.beside else {}
    pointers |= {} if program.symmetric else {"zero": "i32"}
    absent = {f"{name}_ptr": None for name in ("beside", "zero", "bias") if name not in pointers}
    sizes = dict.fromkeys(("M", "N", "K", "stride_xm", "blocks_per_split"), "i32")
    asymmetric = "" if program.symmetric else " asym"
    return KernelConfig(
        name=f"fragments {'2:4 ' if sparse else ''}w{bits}a16 g{group or 'row'}{asymmetric} {dtype} m{8 * columns}",
        function=fragment_gemm,
        signature={f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | sizes,
        constexprs=absent | {"GROUP": group, "SPLIT": "atomic"} | constants(program),
        num_warps=WARPS,
        num_stages=1,
        max_registers=REGISTERS,
        weights_per_loop=program.block * OUTPUTS,
        mma=("HMMA.SP.16832.F32" if sparse else "HMMA.16816.F32") + (".BF16" if program.bfloat16 else ""),
        aligned=("N", "K", "stride_xm"),
    )


W4, ASYMMETRIC, W4_32, W4_ROW = (4, 128, "sym"), (4, 128, "asym"), (4, 32, "sym"), (4, 0, "sym")
CONFIGS = (
    *(_config(W4, dtype, columns) for dtype in ("fp16", "bf16") for columns in (1, 2, 4)),
    *(_config(ASYMMETRIC, dtype, 2) for dtype in ("fp16", "bf16")),
    _config(W4_32, "fp16", 2),
    _config(W4_ROW, "fp16", 2),
    *(_config((3, 128, "sym"), dtype, columns) for dtype in ("fp16", "bf16") for columns in (1, 2, 4)),
    _config((3, 64, "asym"), "fp16", 2),
    *(_config((2, 64, "sym"), "fp16", columns) for columns in (1, 2)),
    _config((8, 128, "sym"), "fp16", 2),
    _config((8, 0, "asym"), "bf16", 2),
    *(_config(W4, dtype, columns, True) for dtype in ("fp16", "bf16") for columns in (1, 2, 4)),
    _config(ASYMMETRIC, "fp16", 2, True),
)
