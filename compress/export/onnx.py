"""ONNX, for onnxruntime and onnxruntime-genai.

onnxruntime-genai's own builder knows architectures; it reads GPTQ checkpoints, so the layers are handed to it as one, at 2,
4 or 8 bits (3-bit codes fit 4, others 8, unchanged) and with any zero points. Layers become MatMulNBits. Embeddings, head
and what was not packed are float32. Without --lossy the kernels compute with the inputs as they are (accuracy level 0);
with it, as the builder likes it on CPU, with inputs rounded to 8 bits, which is faster (level 4).
"""

import io
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.save import copy_along
from compress.checkpoint.writer import ShardWriter
from compress.errors import InputError
from compress.export.reference import probe, reference_logits, reference_model
from compress.export.source import ExportLayer, Source, zero_points
from compress.export.targets import Comparison, Exported, check_layers, input_refusal, notes_of
from compress.files import disk_errors, write_json
from compress.kernels.packing import pack, unpack
from compress.kernels.weights import IntWeight

NEEDS = {"onnxruntime_genai": "onnxruntime-genai", "onnxruntime": "onnxruntime", "onnx_ir": "onnx-ir", "onnx": "onnx"}
EXTRA = "export-onnx"
SUFFIX = ""
WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of a code -> of MatMulNBits
BLOCKS = (256, 128, 64, 32, 16)  # inputs that share a scale there
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
KEPT = ("/lm_head/MatMul", "/model/embed_tokens/Gather")  # the builder would round these to 4 bits, unasked
EXACT, FAST = 0, 4  # accuracy levels of MatMulNBits


def refusal(layer: ExportLayer) -> str | None:
    """Why MatMulNBits does not do exactly what a layer does; None if it does."""
    weight = layer.integers
    if weight is None:
        return f"MatMulNBits has no {layer.kind}: quantize with gptq or rtn, inputs in order"
    if _block_size(weight.group_size) is None:
        return f"MatMulNBits shares a scale among 16 inputs or more, and {layer.kind} do not divide into them: take --group-size 32"
    return input_refusal(layer, "onnxruntime")


def write(source: Source, out: Path, lossy: bool) -> Exported:
    """Write the folder OUT: model.onnx with its data, genai_config.json, the tokenizer.

    Raises InputError for what is not exact unless `lossy`, for what no MatMulNBits holds at all, and for an architecture
    that the builder does not know.
    """
    reasons = check_layers(source.layers, refusal, lossy)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as name, disk_errors(out):
        staged = Path(name)
        _stage(source, staged / "gptq")
        _build(source, staged, FAST if lossy else EXACT)
        if any(layer.rank for layer in source.layers):
            _add_corrections(source, staged / "onnx" / "model.onnx")
        if out.is_dir():
            out.rmdir()
        (staged / "onnx").rename(out)
    kinds = Counter(f"MatMulNBits, {WIDTHS[layer.integers.bits]} bits" for layer in _held(source) if layer.integers)
    kinds["float32"] = len(source.names()) - sum(kinds.values())
    return Exported([out], kinds, notes_of(reasons))


def verify(source: Source, exported: Exported) -> Comparison:
    """Every MatMulNBits as onnxruntime decodes it, and logits at accuracy level 0, beside the checkpoint's."""
    import onnx

    result, out = Comparison(), exported.files[0]
    graph = onnx.load(str(out / "model.onnx"))
    held = {layer.name for layer in _held(source)}
    for node in (node for node in graph.graph.node if node.op_type == "MatMulNBits"):
        names = _layers_of(node.name, held)
        for name, rows in zip(
            names, _decoded(node, graph).split([source.shape(f"{n}.weight")[0] for n in names]), strict=True
        ):
            result.add(True, source.integers(name).dequantize(), rows)
    model = reference_model(source)
    ids = probe(model.config.vocab_size)
    window = min(getattr(model.config, "sliding_window", None) or 0, model.config.max_position_embeddings)
    theirs = _run(graph, out, ids, window)
    result.logits = (theirs - reference_logits(model, ids)).abs().max().item()
    return result


def _held(source: Source) -> list[ExportLayer]:
    """The layers that become MatMulNBits: not embeddings and heads, not what it cannot hold."""
    ends = ("embed_tokens", "lm_head")
    return [layer for layer in source.layers if layer.alone and _fits(layer) and not layer.name.endswith(ends)]


def _fits(layer: ExportLayer) -> bool:
    return layer.integers is not None and _block_size(layer.integers.group_size) is not None


def _block_size(group_size: int) -> int | None:
    """The largest block that groups divide into; None: there is none."""
    return next((size for size in BLOCKS if group_size % size == 0), None)


def _stage(source: Source, folder: Path) -> None:
    """The checkpoint as GPTQ, version 1, in any width that the builder reads; what it cannot hold is float32."""
    writer, held = ShardWriter(folder), _held(source)
    for layer in held:
        for part, tensor in _gptq(source.integers(layer.name)).items():
            writer.add(f"{layer.name}.{part}", tensor)
    packed = {layer.param for layer in held}
    for name in source.names():
        if name not in packed:
            writer.add(name, source.read(name).float())
    writer.finish()
    copy_along(source.folder, folder)
    write_json(folder / "config.json", source.dense_config | _quantization_config(held))


def _gptq(weight: IntWeight) -> dict[str, Tensor]:
    """A layer's tensors by part. Scales are repeated where a group is longer than a block may be."""
    bits, size = WIDTHS[weight.bits], _block_size(weight.group_size)
    assert size is not None  # _held
    scales, zeros = (
        each.repeat_interleave(weight.group_size // size, dim=1).T for each in (weight.scale, zero_points(weight))
    )
    return {
        "qweight": pack(weight.codes(), bits).T.contiguous(),
        "qzeros": pack((zeros.to(torch.int16) - 1).remainder(2**bits).to(torch.uint8), bits),
        "scales": scales.float().contiguous(),
        "g_idx": torch.arange(weight.in_features, dtype=torch.int32) // size,
    }


def _quantization_config(held: list[ExportLayer]) -> dict[str, Any]:
    """What config.json says: the commonest width and block, and each layer that has others."""
    kinds = {}
    for layer in held:
        assert layer.integers is not None  # _held
        kinds[layer.name] = WIDTHS[layer.integers.bits], _block_size(layer.integers.group_size)
    if not kinds:
        return {}
    usual, _ = Counter(kinds.values()).most_common(1)[0]
    others = {name: kind for name, kind in kinds.items() if kind != usual}
    return {
        "quantization_config": {
            "quant_method": "gptq",
            "bits": usual[0],
            "group_size": usual[1],
            "sym": False,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "dynamic": {
                f"+:{re.escape(n)}[.]": {"bits": bits, "group_size": size} for n, (bits, size) in others.items()
            },
        }
    }


def _build(source: Source, staged: Path, level: int) -> None:
    """Run the builder on the staged checkpoint. Raises InputError with what it says where it fails."""
    precision = "int4" if _held(source) else "fp32"
    extra = [f"nodes_to_exclude={','.join(KEPT)}", f"accuracy_level={level}"] if _held(source) else []
    if any(layer.rank for layer in source.layers):
        extra.append("fuse_qkv=false")  # each has a correction of its own
    places = [str(staged / name) for name in ("gptq", "onnx", "cache")]
    try:
        with _quiet():
            import onnxruntime_genai.models  # noqa: F401 - puts its folder on the path
            from onnxruntime_genai.models import builder

            asked = (None, places[0], places[1], precision, "cpu", places[2])
            options = builder.parse_extra_options(*asked, extra)
            _flatten_rope(options["hf_details"]["hf_config"])
            builder.create_model(*asked, **options)
    except (KeyError, NotImplementedError, ValueError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"onnxruntime-genai's builder cannot build this model: {type(error).__name__} {reason}"
        ) from error


def _flatten_rope(config: Any) -> None:
    """Gemma 3's rotary settings as the builder expects them: transformers 5 nests them by kind of attention."""
    nested = getattr(config, "rope_parameters", None)
    if isinstance(nested, dict) and "sliding_attention" in nested and config.model_type == "gemma3_text":
        config.rope_local_base_freq = nested["sliding_attention"]["rope_theta"]
        config.rope_theta = nested["full_attention"]["rope_theta"]
        config.rope_parameters = dict(nested["full_attention"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the builder's progress."""
    talker = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        talker.setLevel(level)


def _layers_of(node: str, held: set[str]) -> list[str]:
    """The layers whose rows a node has: "/model/layers.0/attn/qkv_proj/MatMulNBits" has three."""
    parts = node.strip("/").split("/")
    index, last = next(part for part in parts if part.startswith("layers.")), parts[-2]
    ends = (last,) if any(name.endswith(f".{last}") for name in held) else FUSED[last]
    return [next(name for name in held if f".{index}." in f".{name}" and name.endswith(f".{end}")) for end in ends]


def _decoded(node: Any, graph: Any) -> Tensor:
    """float32 [N, K] of a MatMulNBits, by the operator's definition."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    said = {attribute.name: attribute.i for attribute in node.attribute}
    bits, n, k, size = (said[key] for key in ("bits", "N", "K", "block_size"))
    codes, scales, *zeros = (torch.from_numpy(numpy_helper.to_array(stored[name]).copy()) for name in node.input[1:4])
    blocks = -(-k // size)
    whole = unpack(codes.reshape(n, -1).view(torch.int32), bits, blocks * size).float().unflatten(1, (blocks, size))
    zero = torch.full((n, blocks), 2.0 ** (bits - 1))
    if zeros:
        zero = _fields(zeros[0].reshape(n, -1), bits)[:, :blocks].float()
    return ((whole - zero[..., None]) * scales.reshape(n, blocks, 1).float()).flatten(1)[:, :k]


def _fields(packed: Tensor, bits: int) -> Tensor:
    """uint8 [rows, 8 / bits * bytes]: the fields of bytes, lowest first."""
    shifts = torch.arange(0, 8, bits)
    return (packed.int()[..., None] >> shifts & 2**bits - 1).flatten(1)


def _run(graph: Any, folder: Path, ids: Tensor, window: int) -> Tensor:
    """Logits [1, tokens, vocabulary] of onnxruntime-genai at accuracy level 0; `window`: of the model's local attention."""
    import onnx
    import onnxruntime_genai

    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = EXACT
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        exact = Path(name)
        for file in folder.glob("*.json"):
            copyfile(file, exact / file.name)
        onnx.save(graph, str(exact / "model.onnx"), save_as_external_data=True, location="exact.data")
        model = onnxruntime_genai.Model(str(exact))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=max(ids.numel() + 1, window))
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids.numpy())
        return torch.from_numpy(generator.get_output("logits").copy()).float()


def _add_corrections(source: Source, file: Path) -> None:
    """y = x Wᵀ + x Aᵀ Bᵀ for each layer with a correction: two products more, and a sum."""
    import onnx
    from onnx import helper, numpy_helper

    graph = onnx.load(str(file))
    held, nodes = {layer.name for layer in _held(source)}, list(graph.graph.node)
    del graph.graph.node[:]
    for node in nodes:
        graph.graph.node.append(node)
        if node.op_type != "MatMulNBits":
            continue
        [name] = _layers_of(node.name, held)
        correction = source.correction(name)
        if correction is None:
            continue
        given, base = node.output[0], f"{node.output[0]}/packed"
        graph.graph.node[-1].output[0] = base
        factors = {f"{name}.lora_A": correction.a.float().T, f"{name}.lora_B": correction.b.float().T}
        graph.graph.initializer.extend(numpy_helper.from_array(t.contiguous().numpy(), n) for n, t in factors.items())
        low, high = (f"{node.name}/lora_{end}" for end in "AB")
        graph.graph.node.extend(
            [
                helper.make_node("MatMul", [node.input[0], f"{name}.lora_A"], [low], name=low),
                helper.make_node("MatMul", [low, f"{name}.lora_B"], [high], name=high),
                helper.make_node("Add", [base, high], [given], name=f"{node.name}/lora_Add"),
            ]
        )
    onnx.save(graph, str(file), save_as_external_data=True, location=f"{file.name}.data")
