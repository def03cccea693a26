"""What a budget chooses from and what it may spend, as they are typed: 4g128+2:4, and 0.25x, 150MiB or 3.2bits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHOICES = ("2g64", "2g-1", "3g-1", "3g128", "4g-1", "4g128", "8g128")
BYTES = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}

_CHOICE = re.compile(r"(\d+)(?:g(-1|\d+))?(?:\+(?:(\d+):(\d+)|(\d+(?:\.\d+)?)%))?")
_BUDGET = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(x|bits|MiB|GiB|MB|GB)")


@dataclass(frozen=True)
class Choice:
    """What one layer may become."""

    text: str
    wbits: int  # 16: not quantized
    group_size: int | None  # None: as the recipe says
    pattern: tuple[int, int] | None  # (n kept, of m)
    sparsity: float

    @classmethod
    def read(cls, text: str) -> "Choice":
        """BITS[gGROUP][+N:M or +SHARE%]. Raises ValueError with a line that says so."""
        found = _CHOICE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text} should be BITS[gGROUP][+N:M or +SHARE%], such as 4g128, 3g64+2:4 or 4g128+50%")
        bits, group, n, m, percent = found.groups()
        wbits = int(bits)
        if wbits != 16 and not 2 <= wbits <= 8:
            raise ValueError(f"{text} has {wbits} bits: choose 2 to 8, or 16 for weights as they are")
        if group is not None and (wbits == 16 or (group != "-1" and int(group) < 8)):
            raise ValueError(f"{text}: groups are of at least 8 inputs, or -1, and 16 bits have none")
        if n is not None and not 0 < int(n) < int(m):
            raise ValueError(f"{text} should keep some weights and not all, such as 4g128+2:4")
        sparsity = 0.0 if n is None else 1 - int(n) / int(m)
        sparsity = sparsity if percent is None else float(percent) / 100
        if not sparsity < 1:
            raise ValueError(f"{text} removes everything: a share is below 100%")
        pattern = None if n is None else (int(n), int(m))
        return cls(text, wbits, None if group is None else int(group), pattern, sparsity)


def read_choices(given: Any) -> list[Choice]:
    """A list of choices, or one text with commas between them. Raises ValueError for what is none."""
    texts = given.split(",") if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{given!r} should be a list such as ["2g64", "3g64", "4g128+2:4"]')
    return [Choice.read(text.strip()) for text in dict.fromkeys(texts)]


@dataclass(frozen=True)
class Budget:
    """What a checkpoint, or the layers of its blocks, may take."""

    amount: float
    unit: str  # "x": of the dense model's bytes; "bits": a weight of the blocks' layers; or one of BYTES

    @classmethod
    def read(cls, text: str) -> "Budget":
        """NUMBER and a unit. Raises ValueError with a line that says so."""
        found = _BUDGET.fullmatch(text)
        if found is None or not float(found[1]):
            raise ValueError(
                "should be 0.25x (of the dense model's bytes), 150MiB (also GiB, MB, GB), or 3.2bits (mean bits a weight "
                "of the blocks' layers)"
            )
        return cls(float(found[1]), found[2])

    def nbytes(self, dense_bytes: int) -> int:
        """The bytes of a whole checkpoint, of a model that takes `dense_bytes`; not for a budget in bits."""
        return int(self.amount * (dense_bytes if self.unit == "x" else BYTES[self.unit]))
