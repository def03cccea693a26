"""Which kernels are checked, and what each is held to.

A kernel gets in by the `CONFIGS` of its module, an example in examples.py and a line here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.testing.examples import (
    Outcome,
    run_codebook,
    run_fragments,
    run_sparse24,
    run_w8a8,
    run_wna16,
)

PORTABLE = {  # plain Triton cannot keep weights in the order of fragments; few tokens have kernels that do
    "issue": "tl.dot reorders weights on the way; vectors are gathered",
    "banks": "Triton chooses the layout in shared memory",
    "registers": "few tokens have fragments instead",
}
CODEBOOK = "the assembler keeps to 72 registers, for seven programs at a time: two words are stored, one loaded"
SPILLS: Mapping[str, Mapping[str, str]] = {  # by kernel
    "2:4 w2 g128 asym bf16 16x64": {"spills gfx1100": "its registers do not hold a block of 512 inputs"},
    "w4a16 g128 fp16 128x128": {"spills sm_120": "ten words of a tile for 65 to 128 tokens, which others hold"},
    **{
        f"codebook 2x8 {dtype} 16x64": {f"spills sm_{arch}": CODEBOOK for arch in (86, 89)}
        for dtype in ("fp16", "bf16")
    },
}
SHARE = (0.5, 0.75)  # of the issue budget that a kernel for up to 16 or 32 tokens in fragments may take
THIN = (0.8, 1.1)  # the same with codes of two or three bits: they arrive faster, and take as long to decode

CORE = (  # one of each kind, for `make test`
    "fragments w4a16 g128 fp16 m8",
    "fragments w4a16 g128 asym bf16 m16",
    "fragments w2a16 g64 fp16 m16",
    "fragments w3a16 g128 fp16 m16",
    "fragments 2:4 w4a16 g128 bf16 m16",
    "w4a16 g128 bf16 16x128",
    "w8a8 per token asym fp16 16x128",
    "2:4 w4 g128 fp16 16x64",
    "codebook 2x8 fp16 16x64",
)


@dataclass(frozen=True)
class Subject:
    """A kernel, and what it is held to."""

    config: KernelConfig
    bits: float  # of a weight as it is stored, scales and zero points included
    example: Callable[[], Outcome]  # launches the kernel on CPU tensors
    tensors: tuple[str, ...] = ()  # arguments of which each byte should be fetched once
    share: float | None = None  # of the issue budget that the main loop may take; None: not made for few tokens
    waived: Mapping[str, str] = field(default_factory=dict)  # gates it need not pass, "issue" or "spills sm_86": why


def subjects() -> tuple[Subject, ...]:
    """All kernels that are checked; imports Triton."""
    from compress.kernels.codebook import triton as codebook
    from compress.kernels.fragments import gluon as fragments
    from compress.kernels.sparse24 import triton as sparse24
    from compress.kernels.w8a8 import triton as w8a8
    from compress.kernels.wna16 import triton as wna16

    return (
        *(_decoding(c) for c in fragments.CONFIGS),
        *(_portable(c, _wna16_bits(c), run_wna16, "low_ptr", "high_ptr") for c in wna16.CONFIGS),
        *(_portable(c, 8, run_w8a8, "codes_ptr") for c in w8a8.CONFIGS),
        *(_portable(c, _sparse24_bits(c), run_sparse24, "values_ptr", "places_ptr") for c in sparse24.CONFIGS),
        *(_portable(c, _codebook_bits(c), run_codebook, "codes_ptr") for c in codebook.CONFIGS),
    )


def _decoding(config: KernelConfig) -> Subject:
    """A kernel for few tokens, which memory is to set the pace of; two and three bits arrive faster than others."""
    constants, beside = config.constexprs, "beside_ptr" in config.signature  # places or third bits: one a weight
    bits = constants["WORDS"] / constants["BLOCK_K"] + beside + _side_bits(config)
    tensors = ("words_ptr", "beside_ptr") if beside else ("words_ptr",)
    thin = constants["WORDS"] < 4 * constants["BLOCK_K"] and " 2:4 " not in config.name
    share = (THIN if thin else SHARE)[constants["BLOCK_M"] > 16]
    return Subject(config, bits, partial(run_fragments, config), tensors, share)


def _portable(config: KernelConfig, bits: float, run: Callable[[KernelConfig], Outcome], *tensors: str) -> Subject:
    present = tuple(name for name in tensors if name in config.signature)
    share = 0.75 if config.constexprs["BLOCK_M"] <= 32 else None
    waived = {**PORTABLE, **SPILLS.get(config.name, {})}
    if config.constexprs.get("FIELD") == 8 and " bf16 " in config.name:
        waived["conversions"] = (
            "bfloat16 has 7 bits for a code of 8: differences are rounded from float32, some one by one"
        )
    return Subject(config, bits, partial(run, config), present, share, waived)


def _side_bits(config: KernelConfig) -> float:
    """Of a weight's share in its group's scale and zero point."""
    group = config.constexprs["GROUP"]
    return (16 + 8 * ("zero_ptr" in config.signature)) / group if group else 0


def _wna16_bits(config: KernelConfig) -> float:
    return float(config.constexprs["BITS"]) + _side_bits(config)


def _sparse24_bits(config: KernelConfig) -> float:
    return float(config.constexprs["FIELD"]) / 2 + 1 + _side_bits(config)


def _codebook_bits(config: KernelConfig) -> float:
    constants = config.constexprs
    return float(constants["CODEBOOKS"] * (constants["VECTORS"] - 1).bit_length()) / constants["VECTOR"]
