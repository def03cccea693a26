"""Damage to files, as a broken download has it or as somebody who means harm would write it."""

import json
import os
import shutil
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from draws import Draws

LARGE = 32 << 20  # bytes; a file that is larger was not made by `damage_bytes`
RAW = {  # JSON texts that json.dumps does not write
    "@deep@": "[" * 20_000 + "]" * 20_000,
    "@digits@": "9" * 5_000,
    "@infinite@": "1e999",
    "@nan@": "NaN",
    "@minus@": "-0.0",
    "@lone@": '"\\ud800"',
}
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 64, 255, 10**5, 10**9, 2**31, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    0.0, 0.5, -1.5, 1e-300, 1e300, "", "x", "0", "4", "..", "../outside/model.safetensors", "/etc/passwd", "a/b", "\0",
    "x" * 5_000, "\u202e\x1b[31m", "two\nlines", "re:(a+)+$", "re:(((", "float16", "torch.load", "kernels-community/x",
    "flash_attention_2", "evil.Evil", None, True, False, [], {}, [0], [None], ["x"] * 3, [[]], {"": 0}, {"a": {"b": []}},
    [10**9] * 3, *RAW,
)  # fmt: skip
WORDS = (0, 1, 2, 3, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damage_bytes(data: bytes, draws: Draws, near: int = 1 << 20) -> bytes:
    """A few bytes changed, taken out, put in, doubled or cut off; `near`: most of it happens before this offset."""
    at = draws.below(max(1, min(len(data), near)))
    length = draws.pick((1, 2, 4, 8, 64, 4096))
    match draws.below(7):
        case 0:
            return data[:at] + bytes([draws.below(256)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        case 4:
            return data[:at] + bytes(length) + data[at:]
        case 5:
            word = draws.pick(WORDS)
            raw = struct.pack("<Q", word) if draws.below(2) else struct.pack("<I", word % 2**32)
            return data[:at] + raw + data[at + len(raw) :]
        case _:
            bit = 1 << draws.below(8)
            return data[:at] + bytes([data[at] ^ bit] if data else []) + data[at + 1 :]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of JSON."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def damage_tree(tree: Any, draws: Draws) -> Any:
    """One value of a tree of JSON replaced, taken out, renamed or added."""
    paths = list(places(tree))
    path = draws.pick(paths)
    if not path:
        return draws.pick(VALUES)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    last, action = path[-1], draws.below(8)
    if action == 0:
        del parent[last]
    elif action == 1 and isinstance(parent, dict):
        parent[str(draws.pick(VALUES))[:300]] = parent.pop(last)
    elif action == 2 and isinstance(parent, dict):
        parent[str(draws.pick([p[-1] for p in paths if p]))] = parent[last]
    elif action == 3 and isinstance(parent[last], int):
        parent[last] += draws.pick((-1, 1, 10**6))
    elif action == 4 and isinstance(parent[last], int):
        parent[last] *= draws.pick((-1, 2, 10**3, 10**9))
    elif action == 5 and isinstance(parent, list):
        parent.insert(last, draws.pick(VALUES))
    else:
        parent[last] = draws.pick(VALUES)
    return tree


def json_text(tree: Any) -> str:
    """A tree as JSON, with what stands for texts of its own replaced by them."""
    text = json.dumps(tree)
    for word, raw in RAW.items():
        text = text.replace(json.dumps(word), raw)
    return text


def damage_json(data: bytes, draws: Draws) -> bytes:
    """A JSON file with one of its values damaged, or a few bytes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return damage_bytes(data, draws)
    return json_text(damage_tree(tree, draws)).encode() if draws.below(8) else damage_bytes(data, draws)


def damage_toml(data: bytes, draws: Draws) -> bytes:
    """A TOML file with one of its values damaged, or a few bytes."""
    try:
        return tomli_w.dumps(damage_tree(tomllib.loads(data.decode()), draws)).encode()
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError):
        return damage_bytes(data, draws)


def damage_safetensors(data: bytes, draws: Draws) -> bytes:
    """A safetensors file whose header lies, with the header's length right, or a few bytes damaged."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        text, body = _damage_header(header, data[8 + length :], draws)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # it was damaged before
        return damage_bytes(data, draws, near=4096)
    if not draws.below(4):
        return damage_bytes(data, draws, near=4096)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _damage_header(header: dict[str, Any], body: bytes, draws: Draws) -> tuple[bytes, bytes]:
    """The damaged header as JSON, and the bytes after it."""
    names = [name for name in header if name != "__metadata__"]
    metadata = header.get("__metadata__")
    if names and draws.below(2):
        body = _change_tensor(header, draws.pick(names), body, draws)
    elif metadata and draws.below(2):
        key = draws.pick(list(metadata))
        metadata[key] = damage_json(str(metadata[key]).encode(), draws).decode(errors="replace")
    else:
        header = damage_tree(header, draws)
    return json_text(header).encode(), body


def _change_tensor(header: dict[str, Any], name: str, body: bytes, draws: Draws) -> bytes:
    """A change to one tensor after which the file is whole: another dtype or shape of as many bytes, name, or values."""
    sizes = {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4}
    sizes |= {"U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
    entry = header[name]
    start, end = entry["data_offsets"]
    match draws.below(6):
        case 0:
            entry["dtype"] = kind = draws.pick(list(sizes))
            entry["shape"] = [(end - start) // sizes[kind]]
        case 1:
            shape = entry["shape"]
            entry["shape"] = draws.pick([shape[::-1], [*shape, 1], [1, *shape], [-1], [0, 2**40], [2**63, 0]])
            if 0 in entry["shape"]:
                header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start, start]}
                return _cut(header, body, start, end)
        case 2:
            header[draws.pick([f"x.{name}", name.replace("0", "x"), name.replace("1", "7"), "", "-1"])] = header.pop(
                name
            )
        case 3:
            header.pop(name)
            return _cut(header, body, start, end)
        case 4:
            other = draws.pick(list(header))
            header[other], header[name] = header[name], header[other]
        case _:
            return body[:start] + bytes([draws.pick((0, 255, 127, 128))]) * (end - start) + body[end:]
    return body


def _cut(header: dict[str, Any], body: bytes, start: int, end: int) -> bytes:
    """The body without some bytes, and the header moved after them."""
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return body[:start] + body[end:]


DAMAGES = {".json": damage_json, ".toml": damage_toml, ".safetensors": damage_safetensors}


def damage_file(file: Path, draws: Draws) -> None:
    """One file's content, by its kind; a journal line by line."""
    data = file.read_bytes()[:LARGE]
    if file.suffix == ".jsonl":
        lines = data.splitlines(keepends=True)
        at = draws.below(max(1, len(lines)))
        lines[at : at + 1] = [damage_json(line, draws) + b"\n" for line in lines[at : at + 1]]
        file.write_bytes(b"".join(lines))
        return
    file.write_bytes(DAMAGES.get(file.suffix, damage_bytes)(data, draws))


def damage_folder(folder: Path, draws: Draws, outside: Path) -> None:
    """One to three files of a folder damaged, taken away, or replaced by what no reader expects there.

    `outside`: a folder beside it, for links that leave.
    """
    for _ in range(1 + draws.below(3)):
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        if not files:
            return
        file = draws.pick(files)
        if draws.below(10):
            damage_file(file, draws)
        else:
            _replace(file, draws, outside, files)


def _replace(file: Path, draws: Draws, outside: Path, others: list[Path]) -> None:
    action = draws.below(8)
    content = file.read_bytes()
    file.unlink()
    if action == 1:
        file.write_bytes(b"")
    elif action == 2:
        file.mkdir()
    elif action == 3:
        file.symlink_to(outside / "model.safetensors")
    elif action == 4:
        file.symlink_to("/dev/zero")
    elif action == 5:
        os.mkfifo(file)
    elif action == 6:
        other = draws.pick(others)
        if other.exists():
            shutil.copyfile(other, file)
    elif action == 7:
        file.with_suffix(".bin").write_bytes(content)
