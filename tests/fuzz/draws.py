"""What a fuzzer's bytes decide: the same damage comes from hypothesis, from atheris and from random bytes."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Numbers taken off the front of some bytes; zeros once they have come to their end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def below(self, limit: int) -> int:
        """A whole number in 0 .. limit - 1."""
        size = ((limit - 1).bit_length() + 7) // 8
        part = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(part, "little") % max(1, limit)

    def pick(self, options: Sequence[T]) -> T:
        """One of several."""
        return options[self.below(len(options))]
