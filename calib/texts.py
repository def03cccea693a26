"""Where text comes from: a named data set, a file, or Python itself. Nothing is ever taken instead of what was asked for."""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compress.calib import builtin_text
from compress.errors import InputError

Part = Literal["calibration", "evaluation"]

ENDINGS = (".txt", ".jsonl", ".parquet")
LARGEST = 32 << 20  # bytes of a text file: tokenizing whole takes about 80 bytes of memory a byte
SHUFFLED_AHEAD = 10_000  # documents of a stream that are held to be shuffled
SECONDS = 10  # to wait for the hub's first answer


@dataclass(frozen=True)
class HubText:
    """One data set of the hub, as `datasets.load_dataset` is asked for it."""

    repository: str
    calibration: dict[str, Any]
    evaluation: dict[str, Any] | None = None  # None: too big, or without a text held out
    shared: dict[str, Any] = field(default_factory=dict)
    joined_by: str | None = None  # the rows are lines of one text; None: rows are documents
    empty: str = ""  # what an empty line was before the hub's copy lost it


DATASETS = {
    "c4": HubText(
        "allenai/c4",
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
    ),
    "wikitext2": HubText(
        "Salesforce/wikitext",
        {"split": "train"},
        {"split": "test"},
        {"name": "wikitext-2-raw-v1"},
        joined_by="",
        empty=" \n",
    ),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        {"data_files": {"train": "penn_treebank/train/0000.parquet"}, "split": "train"},
        {"data_files": {"test": "penn_treebank/test/0000.parquet"}, "split": "test"},
        {"revision": "refs/convert/parquet"},  # the repository itself is a script, which datasets no longer runs
        joined_by="\n",
    ),
    "pileval": HubText("mit-han-lab/pile-val-backup", {"split": "validation"}),
    "ultrachat": HubText("HuggingFaceH4/ultrachat_200k", {"split": "train_sft"}, {"split": "test_sft"}),
}


def read_text(source: str, part: Part = "calibration", seed: int | None = None) -> str | Iterable[str]:
    """The text of a source: one string if it is a running text, or its documents, shuffled if a seed is given.

    `source` is c4, wikitext2, ptb, pileval, ultrachat, builtin, or a .txt, .jsonl or .parquet file; `part` says which
    half of a source that has two. Documents of a hub data set are streamed.
    Raises InputError if the source is unknown, unreadable or out of reach, naming what to use instead.
    """
    check_source(source, part)
    if source == "builtin":
        return builtin_text.calibration_text() if part == "calibration" else builtin_text.evaluation_text()
    if source in DATASETS:
        return _hub_text(source, DATASETS[source], part, seed)
    path = Path(source).expanduser()
    if path.suffix.lower() == ".txt":
        return _plain(path)
    documents = _documents(_json_rows(path) if path.suffix.lower() == ".jsonl" else _parquet_rows(path), str(path))
    if seed is None:
        return documents
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def check_source(source: str, part: Part = "calibration") -> None:
    """Raise InputError if a source is unknown, is a file that is not there, or has no such part. Reads nothing."""
    if source == "builtin":
        return
    if source == "self":
        raise InputError(
            "self is text that a model samples to be calibrated with: to measure, give a text file or builtin"
        )
    if source in DATASETS:
        if part == "evaluation" and DATASETS[source].evaluation is None:
            raise InputError(f"{source} has no held-out part to measure on: use wikitext2, ptb, builtin or a text file")
        return
    path = Path(source).expanduser()
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"no text source {source}: use {', '.join(DATASETS)}, builtin, or a {', '.join(ENDINGS)} file")
    if not path.is_file():
        raise InputError(f"no file {path}: check the path, or use builtin, which needs no file")


def _plain(path: Path) -> str:
    """A text file as it is, line endings included."""
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} is too long to be tokenized whole: cut it, for example `head -c 10M`")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it with iconv"
        ) from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"line {number} of {path} is not JSON ({error}): mend or remove it") from error
            if not isinstance(row, dict):
                raise InputError(f'line {number} of {path} is no JSON object: write {{"text": ...}}')
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole parquet file ({error}): download it again") from error


def _documents(rows: Iterable[dict[str, Any]], where: str) -> Iterator[str]:
    """The text of each row; empty ones are left out."""
    column = None
    for row in rows:
        column = column or _text_column(row, where)
        text = _rendered(row.get(column))
        if text.strip():
            yield text


def _text_column(row: dict[str, Any], where: str) -> str:
    """Which column holds the text: `text`, a conversation's `messages`, or the only column of strings."""
    for name in ("text", "messages"):
        if name in row:
            return name
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    raise InputError(f"which column of {where} is the text? It has {', '.join(row)}: rename one to text")


def _rendered(value: Any) -> str:
    """A cell as plain text: a conversation is what was said, turn by turn, without roles or template."""
    if isinstance(value, list):
        return "\n\n".join(str(turn["content"]) for turn in value if isinstance(turn, dict) and turn.get("content"))
    return value if isinstance(value, str) else ""


def _hub_text(name: str, text: HubText, part: Part, seed: int | None) -> str | Iterable[str]:
    """A hub data set's running text, or a stream of its documents."""
    split = text.calibration if part == "calibration" else text.evaluation
    assert split is not None  # check_source
    rows = _hub_rows(name, text.repository, {**text.shared, **split, "streaming": text.joined_by is None}, seed)
    if text.joined_by is None:
        return _documents(rows, name)
    column, lines = None, []
    for row in rows:
        column = column or _text_column(row, name)
        lines.append(row[column] or text.empty)
    return text.joined_by.join(lines)


def _hub_rows(name: str, repository: str, options: dict[str, Any], seed: int | None) -> Iterator[dict[str, Any]]:
    """Rows from the hub. Whatever goes wrong on the way, now or in the middle of the stream, is one line."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(repository, timeout=SECONDS)  # says no at once, where load_dataset tries for 23 s
        rows = load_dataset(repository, **options)
        if options["streaming"] and seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED_AHEAD)
        yield from rows
    except Exception as error:  # the hub, the network, the disk and the decompressor each raise their own
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise InputError(
            f"cannot get {name} ({repository}) from {constants.ENDPOINT.partition('://')[2]}: {reason}; use a local "
            ".txt, .jsonl or .parquet file, builtin, or self (text the model samples; only to calibrate)"
        ) from error
