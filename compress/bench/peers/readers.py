"""Do others read what we write, and we what they write? Each form by an independent reader, compared with ours."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from compress.bench.peers.bench import PeersBench
from compress.bench.peers.rows import LLAMA_CPP, PEERS, READERS, TRANSFORMERS, VLLM, Peer, Row
from compress.bench.peers.scripts.protocol import LOGPROBS
from compress.errors import CompressError, RunError
from compress.files import write_json
from compress.report import table
from compress.run_dir import read_json

OURS, LLM_COMPRESSOR, GPTQMODEL = PEERS[:3]


@dataclass(frozen=True)
class Form:
    """A checkpoint that is read by others: who writes it, and what."""

    name: str
    writer: Peer
    setting: dict[str, Any]
    readers: tuple[Peer, ...]  # beside ours


def _ours(form: str, wbits: int, symmetric: bool, *readers: Peer) -> Form:
    target = {"wbits": wbits, "group_size": 64 if wbits == 2 else 128, "symmetric": symmetric}
    name = f"{form} W{wbits} {'symmetric' if symmetric else 'asymmetric'}"
    return Form(name, OURS, {"quantizer": "rtn", "format": form, "target": target}, readers)


def _theirs(form: str, wbits: int, symmetric: bool) -> Form:
    setting = {"method": "gptq", "wbits": wbits, "group_size": 64 if wbits == 2 else 128, "symmetric": symmetric}
    name = f"{form} W{wbits} {'symmetric' if symmetric else 'asymmetric'}"
    return Form(name, GPTQMODEL, {**setting, "format": form}, (GPTQMODEL,))


def _native(name: str, target: dict[str, Any], **setting: Any) -> Form:
    """A layout of our own, which others read by our plug-ins."""
    setting = {"quantizer": "rtn", "format": "native", **setting, "target": target}
    return Form(f"native {name}", OURS, setting, (TRANSFORMERS, VLLM))


GROUPS = {"wbits": 4, "group_size": 128}
QUICK = {"options": {"codebook": {"iterations": 0, "beam_size": 1}}}
VLLM_FORMS = (
    _ours("compressed-tensors", 4, True, VLLM),
    _native("W4 symmetric", GROUPS),
    _native("W3 asymmetric", {"wbits": 3, "group_size": 64, "symmetric": False}),
    _native("W8A8", {"wbits": 8, "abits": 8, "group_size": -1}),
    _native("W4 2:4, head W8", {**GROUPS, "pattern": "2:4", "head_bits": 8}, pruner="magnitude"),
    _native("W2 codebook", {"wbits": 2}, quantizer="codebook", **QUICK),
)
FORMS = (
    *(_ours("compressed-tensors", bits, True, LLM_COMPRESSOR) for bits in (2, 3, 8)),
    *(_ours("compressed-tensors", bits, False, LLM_COMPRESSOR) for bits in (2, 3, 4, 8)),
    _ours("compressed-tensors", 4, True, LLM_COMPRESSOR, LLAMA_CPP),
    *(_ours("gptq", bits, True, GPTQMODEL, LLAMA_CPP) for bits in (4, 8)),
    *(_theirs("gptq", bits, True) for bits in (2, 3, 4, 8)),
    *(_theirs("gptq_v2", bits, False) for bits in (2, 3, 4)),
)


def chosen_forms(only: list[str]) -> tuple[Form, ...]:
    """The forms to be read: vLLM's if `only` names it, the others' if it names readers or nothing."""
    return (FORMS if not only or READERS in only else ()) + (VLLM_FORMS if VLLM.name in only else ())


def read_forms(bench: PeersBench, forms: Sequence[Form], again: bool) -> list[dict[str, Any]]:
    """For each form and reader, how far what it reads is from what we read; what went well is not done again.

    Each is {"form", "writer", "reader", "weights": largest difference of two decoded weights, "logprobs": of two
    log-probabilities of a short text}, with what the reader shows of these; or its line in `failed`.
    """
    return [found for form in forms for found in _read(bench, form, again)]


def _read(bench: PeersBench, form: Form, again: bool) -> Iterator[dict[str, Any]]:
    ours = Row("read", form.writer, form.name, form.setting)
    where = bench.out / "rows" / ours.folder
    file = where / "readers.json"
    asked = {**bench.asked, "setting": form.setting, "readers": [[r.name, *r.requirements] for r in form.readers]}
    kept = read_json(file) if file.exists() and not again else {}
    if kept.get("asked") != asked:
        bench.reporter.say(f"readers: {form.name} by {form.writer.name}")
        kept = {"asked": asked, "found": list(_compared(bench, form, ours))}
        shutil.rmtree(where / "checkpoint", ignore_errors=True)
        if not any("failed" in each for each in kept["found"]):
            write_json(file, kept)
    yield from kept["found"]


def _compared(bench: PeersBench, form: Form, ours: Row) -> Iterator[dict[str, Any]]:
    """What each reader of one checkpoint finds in it, beside what we find."""
    where = bench.out / "rows" / ours.folder
    names = {"form": form.name, "writer": form.writer.name}
    own: Path | None = None
    try:
        shutil.rmtree(where / "checkpoint", ignore_errors=True)
        bench.ask(ours, "quantize")
        own = _tensors(bench, ours, OURS)
        for reader in form.readers:
            try:
                theirs = _tensors(bench, ours, reader)
                yield {**names, "reader": reader.name, **differences(own, theirs)}
                theirs.unlink()
            except CompressError as error:
                yield {**names, "reader": reader.name, "failed": str(error)}
    except CompressError as error:
        yield {**names, "reader": OURS.name, "failed": str(error)}
    finally:
        if own is not None:
            own.unlink()


def _tensors(bench: PeersBench, ours: Row, reader: Peer) -> Path:
    """A file of what one reader finds in the row's checkpoint."""
    checkpoint = bench.out / "rows" / ours.folder / "checkpoint"
    by = Row(ours.column, reader, f"reads {ours.method} by {ours.peer.name}", ours.setting)
    return Path(bench.ask(by, "read", checkpoint=str(checkpoint))["tensors"])


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Largest absolute differences between tensors of the same names in two files: of weights, and of log-probabilities.

    The second file's are rounded to the dtype of the first's: a reader may hold float32 of what is bfloat16 in a model.
    Raises RunError if the second file has some of the weights but not all.
    """
    gaps: dict[str, list[float]] = {}
    with safe_open(ours, framework="pt") as own, safe_open(theirs, framework="pt") as other:
        there, wanted = set(other.keys()), set(own.keys())
        lacking = sorted(wanted - there - {LOGPROBS})
        if lacking and there != {LOGPROBS}:
            raise RunError(f"the reader has no weight of {lacking[0]}")
        for name in wanted & there:
            tensor = own.get_tensor(name)
            gap = (tensor.float() - other.get_tensor(name).to(tensor.dtype).float()).abs().max().item()
            gaps.setdefault(name if name == LOGPROBS else "weights", []).append(gap)
    return {kind: max(found) for kind, found in gaps.items()}


def readers_table(found: list[dict[str, Any]]) -> list[Any]:
    """A line for each form and reader; nothing if none was asked for."""
    columns = ["form", "written by", "read by", "weights differ by", "log-probabilities differ by"]
    rows = []
    for each in found:
        gaps = [f"{each[kind]:.3g}" if kind in each else "" for kind in ("weights", LOGPROBS)]
        rows.append([each["form"], each["writer"], each["reader"], *(["failed", ""] if "failed" in each else gaps)])
    failed = [f"{each['reader']} on {each['form']} failed: {each['failed']}" for each in found if "failed" in each]
    return [table("the same checkpoints by other readers", columns, rows), *failed, ""] if rows else []
