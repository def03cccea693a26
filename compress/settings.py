"""Settings as they are typed: METHOD.KEY=VALUE of --set, and a sweep's PRUNER+REFINE@ALLOCATE:KEY=VALUE."""

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from compress.errors import InputError
from compress.recipe import Recipe, merged
from compress.steps import STAGES, methods

GRAMMAR = "PRUNER[+REFINE][+QUANTIZER][+ACTIVATIONS][@ALLOCATE][:KEY=VALUE,...]"
FIELD = {
    "prune": "pruner",
    "refine": "refine",
    "quantize": "quantizer",
    "activations": "activations",
}  # where a recipe names a stage's method
THE_SAME = ("model", "revision")  # in every run of a sweep
CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}


def read_value(text: str) -> Any:
    """A value as TOML has it, or the text itself where it is none: 0.05, true, [1, 2], "2:4", 2:4."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def typed(value: Any) -> str:
    """A value as it may be typed after METHOD.KEY=."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def method_options(pairs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`gptq.damping=0.05` as nested options. Raises InputError for what is not METHOD.KEY=VALUE."""
    options: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        method, dot, name = key.partition(".")
        if not (equals and method and dot and name):
            raise InputError(f"--set {pair}: write METHOD.KEY=VALUE, such as gptq.damping=0.05")
        options.setdefault(method, {})[name.replace("-", "_")] = read_value(text)
    return options


def split_settings(texts: Iterable[str]) -> list[str]:
    """The settings in options that may be repeated and hold several each; every setting once.

    A comma also stands between the keys of one setting: a piece such as `alpha=2` goes on with the setting before it.
    """
    settings: list[str] = []
    for text in texts:
        for index, piece in enumerate(_split(text)):
            if index and "=" in piece.partition(":")[0]:
                settings[-1] += f",{piece}"
            else:
                settings.append(piece)
    if "" in settings:
        raise InputError(f"an empty setting: write {GRAMMAR}")
    return list(dict.fromkeys(settings))


def read_setting(text: str) -> dict[str, Any]:
    """A sweep's setting as recipe values: `wanda+dsnot@owl:calib.nsamples=64,owl.limit=0.1`.

    KEY is METHOD.OPTION, or a recipe's key such as calib.nsamples or sequential. Raises InputError naming what cannot
    be meant.
    """
    head, colon, pairs = text.partition(":")
    names, at, allocate = head.partition("@")
    if (at and not allocate) or (colon and not pairs):
        raise InputError(f"setting {text}: write {GRAMMAR}")
    values: dict[str, Any] = {}
    for name in names.split("+"):
        field = FIELD[_stage_of(name, text)]
        if field in values:
            raise InputError(f"setting {text}: {values[field]} and {name} are both a {field}: take one")
        values[field] = name
    if allocate:
        values["target"] = {"allocate": allocate}
    for pair in _split(pairs) if pairs else []:
        _put(values, pair, text)
    return values


def _stage_of(name: str, text: str) -> str:
    """The stage of a method that works on weights."""
    known = {stage: methods(stage) for stage in FIELD}
    for stage, found in known.items():
        if name in found:
            return stage
    names = [each for found in known.values() for each in found]
    close = get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"
    raise InputError(f"setting {text}: there is no method {name!r}; {hint}")


def _put(values: dict[str, Any], pair: str, text: str) -> None:
    """Add KEY=VALUE of a setting to its recipe values."""
    key, equals, value = pair.partition("=")
    path = key.replace("-", "_").split(".")
    if not equals or "" in path:
        raise InputError(f"setting {text}: {pair} should be KEY=VALUE, such as gblm.alpha=2 or calib.nsamples=64")
    if path[0] in THE_SAME:
        raise InputError(f"setting {text}: {path[0]} is the same in every run of a sweep")
    if path[0] not in Recipe.model_fields:
        method = key.partition(".")[0]
        if len(path) != 2 or not any(method in methods(stage) for stage in STAGES):
            raise InputError(f"setting {text}: {key} is neither METHOD.OPTION nor a recipe's key")
        path = ["options", method, path[1]]
    if taken(values, path):
        raise InputError(f"setting {text}: {key} is there already")
    nested = read_value(value)
    for part in reversed(path):
        nested = {part: nested}
    values.update(merged(values, nested))


def taken(values: dict[str, Any], path: list[str]) -> bool:
    """Whether nested values have something at a path."""
    here: Any = values
    for part in path:
        if not isinstance(here, dict) or part not in here:
            return False
        here = here[part]
    return True


def _split(text: str) -> list[str]:
    """Pieces between the commas that stand outside of brackets and quotes, without blanks around them."""
    pieces, start, closing = [], 0, list[str]()
    for index, letter in enumerate(text):
        quoted = closing[-1:] in (['"'], ["'"])
        if closing and letter == closing[-1]:
            closing.pop()
        elif letter in CLOSING and not quoted:
            closing.append(CLOSING[letter])
        elif letter == "," and not closing:
            pieces.append(text[start:index])
            start = index + 1
    return [piece.strip() for piece in [*pieces, text[start:]]]
