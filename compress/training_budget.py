"""How long a training goes on, as it is typed: 15min, 90s or 200000tokens."""

import re
from dataclasses import dataclass

_TYPED = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(s|min|h|tokens)")
SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class TrainingBudget:
    """What a training may take: exactly one of the two is given."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def read(cls, text: str) -> "TrainingBudget":
        """AMOUNT and s, min, h or tokens. Raises ValueError with a line that says so."""
        found = _TYPED.fullmatch(text.strip())
        if found is None or not float(found[1]):
            raise ValueError(f"{text} should be a time or a number of tokens, such as 15min, 90s or 200000tokens")
        amount, unit = float(found[1]), found[2]
        return cls(tokens=int(amount)) if unit == "tokens" else cls(seconds=amount * SECONDS[unit])
