"""ExecuTorch: one .pte file whose linear layers XNNPACK computes.

The model goes through torch.export in float32; torchao's tensors carry the codes of packed layers, which XNNPACK takes as
they are: 4 bits in groups (2 and 3 bits fit, their codes less the zero point), or 8 bits by output channel. XNNPACK keeps
the scales of groups in bfloat16, so those of a float16 model are not exact. It rounds what enters these layers to 8 bits,
as torchao's layers here do. Corrections are part of the graph. There is no cache of keys and values in it yet.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.export.reference import Corrected, Logits, probe, reference_model
from compress.export.source import ExportLayer, Source, zero_points
from compress.export.targets import Comparison, Exported, check_layers, input_refusal, notes_of
from compress.files import replace_file
from compress.kernels.weights import IntWeight

NEEDS = {"executorch": "executorch", "torchao": "torchao"}
EXTRA = "export-executorch"
SUFFIX = ".pte"
TOKENS = 512  # at most in one call: what memory is planned for
BLOCK = 32  # inputs of a group: a multiple
LOW, HIGH = -8, 7  # a 4-bit code less its zero point


def refusal(layer: ExportLayer) -> str | None:
    """Why XNNPACK does not hold a layer exactly, and what it does hold; None if it does."""
    return _unheld(layer) or input_refusal(layer, "XNNPACK")


def _unheld(layer: ExportLayer) -> str | None:
    """Why XNNPACK does not hold a layer's weight; None if it does."""
    weight = layer.integers
    if weight is None:
        return f"XNNPACK has no {layer.kind}: quantize with gptq or rtn, inputs in order"
    if weight.bits == 8 and weight.symmetric and weight.group_size == weight.in_features:
        return None
    lowest, highest = (-(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1)
    if not weight.symmetric:
        lowest, highest = 1 - 2**weight.bits, 2**weight.bits - 1
    if lowest < LOW or highest > HIGH:
        return f"XNNPACK has no {layer.kind}: --wbits 4 --symmetric, 2 or 3 bits, or --wbits 8 --group-size -1 is held"
    if weight.group_size % BLOCK:
        return f"groups of XNNPACK have a multiple of {BLOCK} inputs, and {layer.kind} do not: --group-size 32 does"
    if torch.bfloat16 not in layer.scales:
        return "XNNPACK keeps scales of groups in bfloat16, and these are not: compress the model with --dtype bfloat16"
    return None


def write(source: Source, out: Path, lossy: bool) -> Exported:
    """Write OUT, tokens in and logits out.

    What is refused is float32 with `lossy`. Raises InputError for what is not exact otherwise, and for a model that torch
    or ExecuTorch cannot export.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    reasons = check_layers(source.layers, refusal, lossy)
    model, kinds = _quantized(source)
    longest = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
    tokens = torch.export.Dim("tokens", min=2, max=longest)
    example = (probe(model.config.vocab_size),)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.export.export(
                Logits(model), example, dynamic_shapes={"input_ids": {1: tokens}}, strict=False
            )
            settings = EdgeCompileConfig(_check_ir_validity=False)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=settings)
            buffer = lowered.to_executorch().buffer
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{source.folder} does not go through torch.export and ExecuTorch: {reason}") from error
    replace_file(out, lambda aside: aside.write_bytes(buffer))
    kinds["float32"] = len(source.names()) - sum(kinds.values())
    return Exported([out], kinds, notes_of(reasons))


def verify(source: Source, exported: Exported) -> Comparison:
    """What torchao decodes of what the file was made of, and logits of the file beside torchao's, both with rounded inputs."""
    from executorch.runtime import Runtime

    result = Comparison()
    model, _ = _quantized(source)
    for layer in _held(source):
        theirs = _linear(model, layer.name).weight
        assert isinstance(theirs, Tensor)
        result.add(True, source.integers(layer.name).dequantize(), theirs.dequantize())
    ids = probe(model.config.vocab_size)
    with torch.no_grad():
        ours = Logits(model)(ids)
    method = Runtime.get().load_program(str(exported.files[0])).load_method("forward")
    result.logits = (method.execute([ids])[0] - ours).abs().max().item()
    result.notes.append("both sides' logits have inputs of packed layers rounded to 8 bits, a code apart in places")
    return result


def _held(source: Source) -> list[ExportLayer]:
    """The layers whose codes stay codes: linear ones, not embeddings."""
    return [layer for layer in source.layers if layer.alone and _unheld(layer) is None and not _looked_up(layer)]


def _looked_up(layer: ExportLayer) -> bool:
    return layer.name.rpartition(".")[2] == "embed_tokens"


def _quantized(source: Source) -> tuple[Any, Counter[str]]:
    """The model with torchao's tensors in the place of packed weights, and how many there are of each kind."""
    model, kinds = reference_model(source), Counter[str]()
    for layer in _held(source):
        weight = source.integers(layer.name)
        _put(_linear(model, layer.name), weight)
        kinds["int8 by channel" if weight.bits == 8 else "int4 in groups"] += 1
    return model, kinds


def _linear(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base if isinstance(module, Corrected) else module


def _put(linear: nn.Module, weight: IntWeight) -> None:
    """Give a layer torchao's tensor of a weight, with our codes and scales in place of those it finds."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    whole = weight.bits == 8
    settings = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8 if whole else torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerAxis(0) if whole else PerGroup(weight.group_size),
    )
    quantize_(linear, settings, filter_fn=lambda module, _: module is linear)
    zeros = zero_points(weight)
    groups = weight.codes().to(torch.int16).unflatten(1, (-1, weight.group_size))
    stored: Any = linear.weight
    stored.qdata.copy_((groups - zeros.to(torch.int16).unsqueeze(-1)).flatten(1))
    stored.scale.copy_(weight.scale.float().reshape(stored.scale.shape))
    if stored.zero_point is not None:
        stored.zero_point.zero_()
