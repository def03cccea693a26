"""Codes of b bits as one little-endian bit stream of int32 words.

Code i of a row occupies bits [i*b, (i+1)*b) of the row's stream, least significant bit first. For 2, 4 and 8 bits no
code crosses a word; for 3 bits 32 codes fill 3 words. compressed-tensors (0.19 and later) and GPTQ checkpoints both
hold this stream, along different dimensions.
"""

import math

import torch
from torch import Tensor

WORD = 32


def words_for(length: int, bits: int) -> int:
    """How many int32 words hold `length` codes of `bits` bits."""
    return math.ceil(length * bits / WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension.

    `codes`: integers in [0, 2**bits), [..., n]. Returns int32 [..., ceil(n * bits / 32)]; the last word is filled up
    with zeros.
    """
    period = math.lcm(bits, WORD)  # after this many bits the stream is aligned to words again
    codes_per_period, words_per_period = period // bits, period // WORD
    n = codes.shape[-1]
    padded = -n % codes_per_period
    if padded:
        codes = torch.nn.functional.pad(codes, (0, padded))
    groups = codes.unflatten(-1, (-1, codes_per_period))
    words = torch.zeros(*groups.shape[:-1], words_per_period, dtype=torch.int64, device=codes.device)
    for i in range(codes_per_period):
        word, shift = divmod(i * bits, WORD)
        value = groups[..., i].to(torch.int64)
        words[..., word] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= value >> (WORD - shift)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.flatten(-2)[..., : words_for(n, bits)].contiguous()


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack`: int32 [..., words] to uint8 [..., length], or int32 where codes have more than 8 bits."""
    codes = _in_bytes(words, bits) if 8 % bits == 0 else _across_bytes(words, bits)
    return codes.flatten(-2)[..., :length].contiguous()


def _in_bytes(words: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2, 4 or 8 bits, none of which crosses a byte, [..., words, codes of a word]."""
    octets = words.unsqueeze(-1).view(torch.uint8).unsqueeze(-1)  # [..., words, 4, 1]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return (octets >> shifts).bitwise_and_(2**bits - 1).flatten(-2)


def _across_bytes(words: Tensor, bits: int) -> Tensor:
    """Codes of any number of bits, [..., periods, codes of a period]."""
    period = math.lcm(bits, WORD)
    codes_per_period, words_per_period = period // bits, period // WORD
    padded = -words.shape[-1] % words_per_period
    if padded:
        words = torch.nn.functional.pad(words, (0, padded))
    groups = words.unflatten(-1, (-1, words_per_period))
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.empty(*groups.shape[:-1], codes_per_period, dtype=dtype, device=words.device)
    mask = 2**bits - 1
    for i in range(codes_per_period):
        word, shift = divmod(i * bits, WORD)
        value = (groups[..., word].to(torch.int64) & 0xFFFFFFFF) >> shift
        if shift + bits > WORD:
            value |= (groups[..., word + 1].to(torch.int64) & 0xFFFFFFFF) << (WORD - shift)
        codes[..., i] = (value & mask).to(dtype)
    return codes


def pack_mask(keep: Tensor) -> Tensor:
    """Eight booleans a byte, along the last dimension: bool [..., n] to uint8 [..., ceil(n / 8)]."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_mask`: uint8 [..., ceil(length / 8)] to bool [..., length]."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :length].bool()
