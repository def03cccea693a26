"""Which implementation multiplies by a layer's weight, for few tokens and for many, and why."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compress.errors import InputError
from compress.kernels.gemm.launch import Tiling
from compress.kernels.implementation import Case, Implementation
from compress.kernels.timings import TOKENS, Times, Timings, measure

IMPLEMENTATIONS = (  # where none was measured, the first that serves a case takes it
    "compress.kernels.w8a8.cpu:Int8Product",
    "compress.kernels.wna16.cpu:Int4Pack",
    "compress.kernels.wna16.cpu_bytes:Int8Pack",
    "compress.kernels.wna16.cpu_bytes:NibblePairs",
    "compress.kernels.wna16.cpu_bytes:Digits",
    "compress.kernels.codebook.cpu:Lookup",
    "compress.kernels.wna16.cpu:DecodedNibbles",
    "compress.kernels.wna16.cpu_bytes:DecodedBytes",
    "compress.kernels.gpu:TritonW8A8",
    "compress.kernels.gpu:GluonFragments",
    "compress.kernels.gpu:TritonInt",
    "compress.kernels.gpu:TritonSparse24",
    "compress.kernels.gpu:TritonCodebook",
    "compress.kernels.gpu:TritonIntDequantized",
    "compress.kernels.gpu:TritonSparse24Dequantized",
    "compress.kernels.gpu:TritonCodebookDequantized",
    "compress.kernels.dense:Reference",
    "compress.kernels.dense:Dense",
)
FORCE = "COMPRESS_KERNEL"  # the name of the one implementation that may be used
DECLINE = "COMPRESS_NO_MEASURING"  # set: the defaults decide
WORTH = 1.1  # a second layout for many tokens has to be faster by this factor

Prompts = Literal["dense", "decode", "packed"]


@dataclass(frozen=True)
class Preferences:
    """What a choice depends on beside the case."""

    prompts: Prompts = "decode"  # what may be kept for many tokens: a dense copy, codes to decode, or nothing more
    forced: str | None = None  # the implementation that serves every layer, or the load fails
    measuring: bool = True  # whether layers of a kind not seen on this machine are timed

    @classmethod
    def from_environment(cls, prompts: str = "decode") -> "Preferences":
        """The variables COMPRESS_KERNEL and COMPRESS_NO_MEASURING, and `prompts`. Raises InputError for another word."""
        if prompts not in get_args(Prompts):
            raise InputError(f'prompts cannot be served "{prompts}": choose {", ".join(get_args(Prompts))}')
        known: dict[str, Prompts] = {word: word for word in get_args(Prompts)}
        return cls(known[prompts], os.environ.get(FORCE) or None, not os.environ.get(DECLINE))


@dataclass(frozen=True)
class Choice:
    """Who serves a layer."""

    few: type[Implementation]
    many: type[Implementation] | None  # None: `few` serves any number of tokens
    many_from: int  # tokens in one call from which `many` takes over
    why: str
    few_tilings: tuple[Tiling, ...] = ()  # what was measured of the tiles of `few`
    many_tilings: tuple[Tiling, ...] = ()

    def made(self, case: Case) -> tuple[Implementation, Implementation | None]:
        """Both, with `case`'s weight laid out for them."""
        few = self.few(case)
        few.tilings = self.few_tilings
        if self.many is None:
            return few, None
        many = self.many(case)
        many.tilings = self.many_tilings
        return few, many

    @property
    def names(self) -> str:
        """For people: "cpu-int4; cpu-decode4 from 16 tokens"."""
        return self.few.NAME if self.many is None else f"{self.few.NAME}; {self.many.NAME} from {self.many_from} tokens"


def implementations() -> dict[str, type[Implementation]]:
    """Every implementation by name, in order of preference."""
    found = {}
    for place in IMPLEMENTATIONS:
        module, _, name = place.partition(":")
        kind: type[Implementation] = getattr(importlib.import_module(module), name)
        found[kind.NAME] = kind
    return found


def refusals(case: Case) -> dict[str, str | None]:
    """Of each implementation, why it cannot serve `case`; None: it can."""
    return {name: kind.supports(case) for name, kind in implementations().items()}


def choose(case: Case, preferences: Preferences = Preferences(), timings: Timings | None = None) -> Choice:
    """Who serves `case`: by what was measured on this machine, or by default where nothing may be.

    Weights without values are never measured. Raises InputError if the forced implementation cannot serve the case.
    """
    if preferences.forced is not None:
        return _forced(case, preferences.forced)
    kinds = [kind for kind in implementations().values() if kind.supports(case) is None]
    packed = [kind for kind in kinds if kind.ROLE == "packed"]
    roles = {"packed"} if preferences.prompts == "packed" and packed else {"packed", "decode"}
    roles |= {"dense"} if preferences.prompts == "dense" else set()
    first = next((kind for kind in kinds if kind.ROLE == "decode"), None)  # the others decode more slowly
    kinds = [kind for kind in kinds if kind.ROLE in roles and (kind.ROLE != "decode" or kind is first)]
    if len(kinds) == 1 and not kinds[0].TILED:
        return Choice(kinds[0], None, 0, "nothing else serves it")
    times = _times(case, kinds, preferences, timings or Timings())
    return _by_default(kinds, preferences) if times is None else _by_time(kinds, times)


def _forced(case: Case, name: str) -> Choice:
    known = implementations()
    if name not in known:
        raise InputError(f'{FORCE} asks for "{name}", which there is not: choose {", ".join(known)}')
    if reason := known[name].supports(case):
        raise InputError(f"{name} cannot serve a layer of {case.key}: {reason}; unset {FORCE}, or choose another")
    return Choice(known[name], None, 0, "as asked")


def _times(
    case: Case, kinds: Sequence[type[Implementation]], preferences: Preferences, timings: Timings
) -> Times | None:
    """What was or is now measured for all `kinds`; None: nothing is to be."""
    known = timings.of(case) or {}
    new = [kind for kind in kinds if kind.NAME not in known]
    if not new:
        return known
    if not preferences.measuring or case.device.type not in ("cpu", "cuda") or _without_values(case):
        return None
    known = measure(case, kinds) | {name: times for name, times in known.items() if name not in {k.NAME for k in kinds}}
    timings.add(case, known)
    return known


def _without_values(case: Case) -> bool:
    return any(tensor.is_meta for tensor in case.weight.tensors().values())


def _by_time(kinds: Sequence[type[Implementation]], times: Times) -> Choice:
    """The fastest for one token, and another from where it is faster for all that many."""
    never = float("inf")

    def seconds(kind: type[Implementation], tokens: int) -> float:
        timing = times[kind.NAME].get(tokens)
        return never if timing is None else timing.seconds

    few = min(kinds, key=lambda kind: seconds(kind, TOKENS[0]))
    many = min(kinds, key=lambda kind: seconds(kind, TOKENS[-1]))
    better = [tokens for tokens in TOKENS if seconds(many, tokens) * WORTH < seconds(few, tokens)]
    if many is few or TOKENS[-1] not in better:
        return Choice(few, None, 0, "fastest here", _tilings(times, few))
    worse = [tokens for tokens in TOKENS if tokens not in better]
    from_tokens = min(tokens for tokens in better if tokens > max(worse, default=0))
    gain = seconds(few, TOKENS[-1]) / seconds(many, TOKENS[-1])
    said = f"{gain:.1f} x" if gain < never else f"more than {TOKENS[-1] // from_tokens} x"
    why = f"fastest here, the second {said} as fast for {TOKENS[-1]} tokens"
    return Choice(few, many, from_tokens, why, _tilings(times, few), _tilings(times, many))


def _tilings(times: Times, kind: type[Implementation]) -> tuple[Tiling, ...]:
    """Those measured of `kind`, in ascending tokens."""
    return tuple(timing.tiling for _, timing in sorted(times[kind.NAME].items()) if timing.tiling is not None)


def _by_default(kinds: Sequence[type[Implementation]], preferences: Preferences) -> Choice:
    """By what is known of each implementation, on no machine in particular."""
    few = kinds[0]
    others = [kind for kind in kinds if kind.ROLE == ("dense" if preferences.prompts == "dense" else "decode")]
    if few.ROLE != "packed" or not others or few.BEATEN_FROM > TOKENS[-1]:
        return Choice(few, None, 0, "by default, nothing was measured")
    return Choice(few, others[0], few.BEATEN_FROM, "by default, nothing was measured")
