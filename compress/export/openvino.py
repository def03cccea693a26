"""OpenVINO: openvino_model.xml with its weights.

The model goes through torch.export in float32, and each packed layer's constant becomes its codes (u2, u4 or u8), less
the zero point, times the scale, all as OpenVINO's own compressed weights are written; the CPU plug-in keeps them packed.
Corrections are part of the graph. There is no cache of keys and values in it yet: it gives the logits of whole texts.
By default the plug-in rounds activations (bfloat16, or 8 bits by group): INFERENCE_PRECISION_HINT f32 is exact.
"""

import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.checkpoint.save import copy_along
from compress.errors import InputError
from compress.export.reference import Logits, probe, reference_logits, reference_model
from compress.export.source import ExportLayer, Source, zero_points
from compress.export.targets import Comparison, Exported, check_layers, input_refusal, notes_of
from compress.files import disk_errors, write_json
from compress.kernels.packing import pack
from compress.kernels.weights import IntWeight

NEEDS = {"openvino": "openvino"}
EXTRA = "export-openvino"
SUFFIX = ""
NAME = "openvino_model.xml"
WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of a code -> of OpenVINO's type
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
LONGEST = 2**20  # tokens, where the model's settings do not say


def refusal(layer: ExportLayer) -> str | None:
    """Why OpenVINO does not do exactly what a layer does; None if it does."""
    return _unheld(layer) or input_refusal(layer, "OpenVINO")


def _unheld(layer: ExportLayer) -> str | None:
    """Why OpenVINO does not hold a layer's weight; None if it does."""
    if layer.integers is None:
        return f"OpenVINO has no {layer.kind}: quantize with gptq or rtn, inputs in order"
    if torch.float16 not in layer.scales:
        return "its scales are written in float16, which does not hold them: quantize again, with compress"
    return None


def write(source: Source, out: Path, lossy: bool) -> Exported:
    """Write the folder OUT: the model, and the tokenizer's files.

    What is refused is float32 with `lossy`. Raises InputError for what is not exact otherwise, and for a model that torch
    or OpenVINO cannot export.
    """
    import openvino

    reasons = check_layers(source.layers, refusal, lossy)
    model = _exported(source)
    kept, kinds = _pack(model, source)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as name, disk_errors(out):
        folder = Path(name) / "openvino"
        folder.mkdir()
        openvino.save_model(model, folder / NAME, compress_to_fp16=False)
        copy_along(source.folder, folder)
        write_json(folder / "config.json", source.dense_config)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    del kept  # OpenVINO's tensors look into these arrays until the model is written
    kinds["float32"] = len(source.names()) - sum(kinds.values())
    return Exported([out], kinds, notes_of(reasons))


def verify(source: Source, exported: Exported) -> Comparison:
    """Every packed weight as OpenVINO decompresses it, and logits in float32, beside the checkpoint's."""
    import openvino

    core, result = openvino.Core(), Comparison()
    model = core.read_model(exported.files[0] / NAME)
    decoded = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    for layer in _held(source):
        node = decoded[f"{layer.name}.weight/decompressed"]
        part = openvino.Model([openvino.opset13.result(node)], [])
        weight = core.compile_model(part, "CPU", EXACT)([])[0]
        result.add(True, source.integers(layer.name).dequantize(), torch.from_numpy(weight))
    reference = reference_model(source)
    ids = probe(reference.config.vocab_size)
    logits = torch.from_numpy(core.compile_model(model, "CPU", EXACT)(ids.numpy())[0])
    result.logits = (logits - reference_logits(reference, ids)).abs().max().item()
    return result


def _held(source: Source) -> list[ExportLayer]:
    """The layers whose codes stay codes."""
    return [layer for layer in source.layers if layer.alone and _unheld(layer) is None]


def _exported(source: Source) -> Any:
    """The model in float32, tokens of any number in, logits out."""
    import openvino

    model = reference_model(source)
    longest = getattr(model.config, "max_position_embeddings", None) or LONGEST
    tokens = torch.export.Dim("tokens", min=2, max=longest)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.export.export(
                Logits(model),
                (probe(model.config.vocab_size),),
                dynamic_shapes={"input_ids": {1: tokens}},
                strict=False,
            )
            return openvino.convert_model(program)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{source.folder} does not go through torch.export and OpenVINO: {reason}") from error


def _pack(model: Any, source: Source) -> tuple[list[Any], Counter[str]]:
    """Put codes in the place of packed layers' constants: arrays that have to outlive the model, and how many of each type."""
    constants: dict[tuple[tuple[int, ...], bytes], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and len(node.shape) == 2:
            constants.setdefault((tuple(node.shape), node.data[0].tobytes()), []).append(node)
    kept: list[Any] = []
    kinds: Counter[str] = Counter()
    for layer in _held(source):
        weight = source.integers(layer.name)
        dense = weight.dequantize().numpy()
        same = constants.get((dense.shape, dense[0].tobytes()), [])
        for node in (node for node in same if np.array_equal(node.data, dense)):
            codes, array = _decompressed(weight, f"{layer.name}.weight/decompressed")
            kept.append(array)
            kinds[f"u{WIDTHS[weight.bits]}"] += 1
            for place in list(node.output(0).get_target_inputs()):
                place.replace_source_output(codes.output(0))
            break
        else:
            raise InputError(f"OpenVINO's graph does not hold {layer.name} as it is: it is not exported")
        same.remove(node)
    return kept, kinds


def _decompressed(weight: IntWeight, name: str) -> tuple[Any, Any]:
    """The graph of a packed weight, float32 [out, in], and the array that its codes lie in."""
    import openvino
    from openvino import opset13 as ops

    bits, groups = WIDTHS[weight.bits], weight.in_features // weight.group_size
    shape = [weight.out_features, groups, weight.group_size]
    array = _bytes(weight, bits)
    codes = ops.constant(openvino.Tensor(array, shape, getattr(openvino.Type, f"u{bits}")))
    zeros = zero_points(weight)
    zero, scale = (ops.constant(each.half().numpy()[..., None]) for each in (zeros, weight.scale))
    values = ops.subtract(ops.convert(codes, "f32"), ops.convert(zero, "f32"))  # in half, the product would be rounded
    values = ops.multiply(values, ops.convert(scale, "f32"))
    values = ops.reshape(values, ops.constant(np.array([weight.out_features, weight.in_features])), False)
    values.set_friendly_name(name)
    return values, array


def _bytes(weight: IntWeight, bits: int) -> Any:
    """Codes of all rows as one stream, lowest bits first: uint8 [bytes]."""
    return pack(weight.codes().flatten()[None], bits).view(torch.uint8).flatten().numpy()
