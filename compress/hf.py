"""The plug-in for transformers (`quant_method: compress`), and checkpoints of every format loaded to serve.

Importing this file is what makes `AutoModelForCausalLM.from_pretrained` know native checkpoints. `load_model` goes the
same way with every format that is read here: packed linear layers and embeddings multiply as they are
(kernels/inference.py); Conv1D layers and experts' slices are decoded.
"""

import copy
import math
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.calib.model_files import first_line
from compress.calib.skeleton import load_config, quiet, skeleton
from compress.calib.weight_files import WeightFiles
from compress.checkpoint.dense_view import PackedFiles
from compress.checkpoint.formats import open_weights
from compress.checkpoint.native import QUANT_METHOD
from compress.errors import CompressError, InputError
from compress.kernels.dispatch import Choice, Preferences, choose
from compress.kernels.inference import CompressedLinear, LayerParts, PackedEmbedding
from compress.kernels.joint import JointLinear, JointPart, joinable, joined
from compress.kernels.weights import PackedWeight
from compress.model_folder import check_kind

SLACK = 1 << 20  # weights that a file may lack before it is said how many, and not which


@register_quantization_config(QUANT_METHOD)
class CompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint: the manifest of its layers, which the loader reads by itself."""

    def __init__(self, prompts: str = "decode", **settings: Any):
        """`prompts`: what may be kept for many tokens (kernels/dispatch.py)."""
        self.quant_method = QUANT_METHOD
        self.prompts = prompts
        self.settings = settings


class _Waiting(nn.Module):
    """Stands for a packed linear layer while transformers loads the rest; its bias is loaded into it. Gives zeros."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias, self.out_features = linear.bias, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


@register_quantizer(QUANT_METHOD)
class CompressQuantizer(HfQuantizer):
    """Takes packed layers out of a model before transformers fills it, and puts layers that serve them in afterwards."""

    requires_calibration = True  # it loads, and never makes, quantized weights

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("a packed model is loaded from a folder of safetensors: pass no state_dict")
        folder = Path(checkpoint_files[0]).parent
        files = open_weights(folder)
        if not isinstance(files, PackedFiles):
            raise InputError(f"config.json of {folder} does not say that it is packed: restore it")
        self.packed = Packed(files, model)
        self.packed.take_out(model)
        check_room(model, files, files.plain)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.packed.put_in(model, Preferences.from_environment(self.quantization_config.prompts))
        del self.packed
        return model

    def is_serializable(self) -> bool:
        """Never: what the kernels read is no format of files. The folder it came from is already what would be saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Never: its layers have no gradients."""
        return False


@dataclass(frozen=True)
class _Place:
    """Where a packed parameter belongs in the model."""

    param: str  # as the files call it
    name: str  # the module's
    attribute: str


class Packed:
    """The packed parameters of a checkpoint, and their places in a model. Raises InputError for one without a place."""

    def __init__(self, files: PackedFiles, model: PreTrainedModel):
        self.files = files
        self.places = list(self._places(model))
        self.tied = dict(getattr(model, "all_tied_weights_keys", {}))  # of the head, say -> of the embedding

    def _places(self, model: PreTrainedModel) -> Iterator[_Place]:
        known = model.state_dict()
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        ignored = tuple(model._keys_to_ignore_on_load_unexpected or ())
        for param in self.files.packed:
            name, _ = rename_source_key(param, renamings, [], model.base_model_prefix, known)
            name = param if name not in known and param in known else name
            if name in known:
                module, _, attribute = name.rpartition(".")
                yield _Place(param, module, attribute)
            elif not any(re.search(pattern, name) for pattern in ignored):
                raise InputError(
                    f"{self.files.folder} packs {param}, which a {model.config.model_type} of transformers holds as a part "
                    "of another tensor: run it with the tool that wrote it"
                )

    def take_out(self, model: PreTrainedModel) -> None:
        """Leave nothing of the packed parameters that transformers would look for in the files."""
        for place in self.places:
            module = model.get_submodule(place.name)
            if isinstance(module, nn.Linear):
                model.set_submodule(place.name, _Waiting(module))
            elif isinstance(module, nn.Embedding):
                for other in (place.name, *self._heads(place)):
                    empty = nn.Parameter(torch.empty(0), requires_grad=False)
                    vars(empty)["_is_hf_initialized"] = True  # or transformers sets the row of padding to zero
                    model.get_submodule(other).weight = empty
            else:
                setattr(module, place.attribute, nn.Parameter(torch.empty(0), requires_grad=False))
        parts = {f"{n}.{part}" for names in self.files.packed.values() for n in names for part in self.files.PARTS}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(
                rf"^{name}$".replace(".", r"\.")
                for name in (parts | self.files.packed.keys()) & self.files.entries.keys()
            ),
        }

    def put_in(self, model: PreTrainedModel, preferences: Preferences) -> None:
        """Put layers that serve packed weights in their places; decode what no such layer stands for."""
        waiting = {}
        for place in self.places:
            module = model.get_submodule(place.name)
            if isinstance(module, _Waiting):
                waiting[place.name] = place
            elif isinstance(module, nn.Embedding):
                self._embedding(place, module, model, preferences)
            else:
                weight = self.files.read(place.param).to(model.device, model.dtype)
                setattr(module, place.attribute, nn.Parameter(weight, requires_grad=False))
        for names in _readers(model, list(waiting)):
            self._linears([waiting[name] for name in names], model, preferences)

    def _linears(self, places: list[_Place], model: PreTrainedModel, preferences: Preferences) -> None:
        """Layers that read one input; those that agree in what joins them become one."""
        alike: dict[Hashable, list[tuple[str, LayerParts, Choice]]] = {}
        for place in places:
            bias = model.get_submodule(place.name).bias
            parts = self._parts(place, bias)
            if parts is None:
                model.set_submodule(place.name, self._dense(place, bias, model))
                continue
            choice = choose(parts.case(model.dtype, model.device), preferences)
            key = joinable(parts, choice)
            alike.setdefault(place.name if key is None else key, []).append((place.name, parts, choice))
        for group in alike.values():
            names, parts_of_each, choices = zip(*group, strict=True)
            sizes = [parts.weight.shape[0] for parts in parts_of_each]
            choice = choices[sizes.index(max(sizes))]
            layer = CompressedLinear(joined(parts_of_each), model.dtype, model.device, choice)
            joint = JointLinear(layer, sizes)
            for index, name in enumerate(names):
                model.set_submodule(name, layer if len(names) == 1 else JointPart(joint, index))

    def _dense(self, place: _Place, bias: torch.Tensor | None, model: PreTrainedModel) -> nn.Linear:
        """A layer whose groups lie in no order that is packed here."""
        weight = self.files.read(place.param).to(model.device, model.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return linear

    def _parts(self, place: _Place, bias: torch.Tensor | None) -> LayerParts | None:
        """All that a layer computes with; None: its weight comes decoded."""
        layer = self.files.packed[place.param][0]
        weight = self.files.unpacked(layer)
        if not isinstance(weight, PackedWeight):
            return None
        correction = self.files.adapter.of(layer, weight.shape)
        return LayerParts(weight, bias, correction, self.files.input_quantizer(place.param))

    def _embedding(self, place: _Place, module: nn.Embedding, model: PreTrainedModel, preferences: Preferences) -> None:
        """An embedding, and the heads that are tied to it."""
        parts = self._parts(place, None)
        if parts is None or parts.correction is not None:
            raise InputError(
                f"{self.files.folder} packs {place.param} in a way that is not looked up: evaluate it instead"
            )
        preferences = replace(preferences, prompts="packed")  # a head is asked for one token, whatever the prompt
        for name in self._heads(place):
            bias = getattr(model.get_submodule(name), "bias", None)
            head = CompressedLinear(LayerParts(parts.weight, bias), model.dtype, model.device, preferences)
            model.set_submodule(name, head)
        PackedEmbedding.take_over(module, parts.weight, model.dtype, model.device)

    def _heads(self, place: _Place) -> list[str]:
        """Modules whose weight is tied to that of an embedding."""
        weight = f"{place.name}.{place.attribute}"
        return [tied.rpartition(".")[0] for tied, source in self.tied.items() if source == weight]


@torch.no_grad()
def _readers(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    """Which of the waiting layers read the same tensor, in the order of their calls; found by a pass of one token."""
    seen: list[tuple[torch.Tensor, list[str]]] = []  # holding the tensors keeps their identity from being reused

    def see(name: str, x: torch.Tensor) -> None:
        for other, readers in seen:
            if other is x:
                readers.append(name)
                return
        seen.append((x, [name]))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name in names
    ]
    model.base_model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    called = {name for _, readers in seen for name in readers}
    return [readers for _, readers in seen] + [[name] for name in names if name not in called]


def load_model(
    folder: Path, prompts: str = "decode", device: str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A checkpoint of any format that is read here, or a dense model, ready to generate.

    `prompts`: "dense" keeps a decoded copy of each layer for many tokens, "decode" its codes, "packed" nothing more.
    Raises InputError where transformers cannot load it or a tensor is missing.
    """
    files, config = open_weights(folder), load_config(folder)
    check_kind({file.name for file in folder.iterdir()}, str(folder))
    empty = skeleton(copy.deepcopy(config), torch.float32, len(files.entries))  # which notes its dtype there
    if isinstance(files, PackedFiles):
        config.quantization_config = {"quant_method": QUANT_METHOD, "prompts": prompts}
    else:
        check_room(empty, files, files.entries)
    try:
        with quiet():
            model, about = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except CompressError:
        raise
    except Exception as error:  # configurations and loaders raise their own
        raise InputError(f"transformers does not load {folder} ({first_line(error)}): restore its files") from error
    if missing := sorted(about["missing_keys"]):
        raise InputError(f"{folder} lacks {missing[0]} ({len(missing)} tensors): restore or download it again")
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    if isinstance(head := loaded.get_output_embeddings(), nn.Linear):
        head.register_forward_pre_hook(_whole)
    return loaded


def check_room(model: nn.Module, files: WeightFiles, names: Iterable[str]) -> None:
    """Raise InputError where a model has far more parameters than the tensors `names` of its files have elements.

    transformers makes room for what is missing, however large config.json says that it is, and then says what is missing.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(files.entries[name].shape) for name in names)
    if wanted > 2 * held + SLACK:
        raise InputError(
            f"config.json of {files.folder} describes {wanted} weights, and the files hold {held}: download them again"
        )


def _whole(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Give a dense head its input with plain strides: for a slice of the last token torch copies the head's weight."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """The layers of a loaded model that multiply by packed weights, by name; several may be one that stands for them."""
    layers: dict[str, CompressedLinear] = {}
    joint: set[CompressedLinear] = set()
    for name, module in model.named_modules():
        if isinstance(module, JointPart):
            layers[name] = module.joint.layer
            joint.add(module.joint.layer)
        elif isinstance(module, CompressedLinear) and module not in joint:
            layers[name] = module
    return layers
