"""The folder OUT/adapter: what is added to a checkpoint's packed layers, in files beside theirs.

Where every correction is a product of low rank in floats of the model's dtype, the folder is a LoRA adapter as PEFT
saves one (adapter_model.safetensors, adapter_config.json; its scale is 1), and `PeftModel.from_pretrained` puts it on
the model. Otherwise (codes of fewer bits, single weights, experts' slices) it is corrections.safetensors: NAME.a, NAME.b
or their codes, NAME.index, NAME.value, with a line of JSON for each layer in its metadata. `config.json` names the file
(KEY): a checkpoint that has lost its adapter is damaged, not another model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.calib.model_files import check_file, read_object
from compress.calib.weight_files import Entry, WeightFiles
from compress.checkpoint.manifest import CorrectionEntry
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError, RunError
from compress.files import disk_errors, write_json, write_tensors
from compress.kernels.correction import Correction

KEY = "compress_adapter"  # in config.json: the file, from the checkpoint's folder
FOLDER = "adapter"
FOR_DENSE = "adapter-for-dense"  # the folder of adapters that the dense model takes (`--scatter`)
PEFT, PEFT_CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "corrections.safetensors"
PEFT_PREFIX = "base_model.model."  # PEFT's model, and the model in it
LORA = {"a": "lora_A.weight", "b": "lora_B.weight"}
VERSION = 1


class Lines(BaseModel):
    """The metadata of corrections.safetensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = VERSION
    layers: dict[str, CorrectionEntry]


def write_adapter(out: Path, layers: Sequence[StoredLayer]) -> dict[str, str]:
    """Write the corrections of `layers`, all of which have one, in place of an adapter that was there.

    Returns what config.json is to say of them, nothing without layers; config.json must not be there yet.
    """
    remove_adapter(out)
    if not layers:
        return {}
    folder = out / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    corrections = {layer.name: layer.correction for layer in layers if layer.correction is not None}
    if all(layer.index is None for layer in layers) and all(map(_plain, corrections.values())):
        write_peft(folder, corrections, all(layer.transposed for layer in layers))
        return {KEY: f"{FOLDER}/{PEFT}"}
    lines = Lines(layers={name: CorrectionEntry.of(each) for name, each in corrections.items()})
    tensors = {f"{name}.{part}": t for name, each in corrections.items() for part, t in each.tensors().items()}
    write_tensors(folder / OWN, tensors, {"corrections": lines.model_dump_json(exclude_defaults=True)})
    return {KEY: f"{FOLDER}/{OWN}"}


def write_peft(
    folder: Path, corrections: Mapping[str, Correction], transposed: bool = False, base_model: str | None = None
) -> None:
    """Write products of low rank in floats as a LoRA adapter that PEFT loads. `transposed`: on Conv1D layers."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT, _peft_tensors(corrections))
    ranks = {name: each.rank for name, each in corrections.items()}
    write_json(folder / PEFT_CONFIG, peft_config(ranks, transposed) | {"base_model_name_or_path": base_model})


def _plain(correction: Correction) -> bool:
    return correction.bits == 16 and correction.rank > 0 and not correction.single


def _peft_tensors(corrections: Mapping[str, Correction]) -> dict[str, Tensor]:
    return {
        f"{PEFT_PREFIX}{name}.{called}": each.tensors()[part]
        for name, each in corrections.items()
        for part, called in LORA.items()
    }


def peft_config(ranks: Mapping[str, int], transposed: bool = False) -> dict[str, Any]:
    """adapter_config.json of layers of these ranks: alpha is the rank, so nothing is scaled.

    `transposed`: all of them are Conv1D layers.
    """
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def peft_bytes(folder: Path) -> int:
    """Bytes of the files of a PEFT adapter in `folder`; of one that is not there, none."""
    files = (folder / name for name in (PEFT, PEFT_CONFIG))
    return sum(file.stat().st_size for file in files if file.is_file())


def remove_adapter(out: Path, name: str = FOLDER) -> None:
    """Take away an adapter's files, and its folder if nothing else is in it; config.json must be gone already."""
    folder = out / name
    with disk_errors(folder):
        for file in (PEFT, PEFT_CONFIG, OWN):
            (folder / file).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class AdapterFiles:
    """The corrections of a checkpoint, read one at a time. Raises RunError where a file is missing or damaged."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.entries: dict[str, Entry] = {}
        self.lines: dict[str, CorrectionEntry] = {}
        if KEY not in config:
            return
        self.file = _file(folder, config[KEY])
        try:
            self._files = WeightFiles(self.file.parent)
        except InputError as error:
            raise RunError(str(error)) from error
        self.entries = {name: entry for name, entry in self._files.entries.items() if entry.file == self.file}
        self.lines = self._peft_lines() if self.file.name == PEFT else self._own_lines()
        names = {name for layer, line in self.lines.items() for name in self._names(layer, line).values()}
        if odd := names ^ self.entries.keys():
            raise RunError(f"{self.file} has one tensor too many or too few ({min(odd)}): restore it")

    def of(self, layer: str, shape: tuple[int, int]) -> Correction | None:
        """What is added to a layer of `shape` (out, in); None: nothing."""
        if layer not in self.lines:
            return None
        line = self.lines[layer]
        tensors = {part: self._files.stored(name) for part, name in self._names(layer, line).items()}
        return line.build(layer, tensors, shape)

    def _names(self, layer: str, line: CorrectionEntry) -> dict[str, str]:
        """What the file calls each part of a layer's correction."""
        if self.file.name == PEFT:
            return {part: f"{PEFT_PREFIX}{layer}.{called}" for part, called in LORA.items()}
        return {part: f"{layer}.{part}" for part in line.parts()}

    def _own_lines(self) -> dict[str, CorrectionEntry]:
        try:
            with safe_open(self.file, framework="pt", backend="pread") as file:
                said = (file.metadata() or {}).get("corrections", "")
            lines = Lines.model_validate_json(said)
        except (SafetensorError, OSError, ValidationError) as error:
            raise RunError(f"the metadata of {self.file} is damaged: restore this file") from error
        if lines.version > VERSION:
            raise InputError(f"{self.file} is of version {lines.version}, which is not read yet: update compress")
        return lines.layers

    def _peft_lines(self) -> dict[str, CorrectionEntry]:
        end = f".{LORA['a']}"
        ranks = {
            name.removeprefix(PEFT_PREFIX).removesuffix(end): entry.shape[0]
            for name, entry in self.entries.items()
            if name.endswith(end) and entry.shape
        }
        if not ranks:
            raise RunError(f"{self.file} holds no layer: restore it")
        config, wanted = read_object(self.file.with_name(PEFT_CONFIG), RunError), peft_config(ranks)
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
            if config.get(key) != wanted[key]:
                raise RunError(f"{self.file.with_name(PEFT_CONFIG)} says another {key} than {PEFT} has: restore both")
        return {name: CorrectionEntry(rank=rank) for name, rank in ranks.items()}


def _file(folder: Path, named: Any) -> Path:
    known = [f"{FOLDER}/{name}" for name in (PEFT, OWN)]
    if named not in known:
        raise RunError(f"config.json of {folder} says {KEY} is {named!r}, which is not one of {', '.join(known)}")
    if not check_file(folder / str(named), folder, RunError).is_file():
        raise RunError(f"{folder} lacks {named}, which belongs to its weights: restore or download it again")
    return folder / str(named)
