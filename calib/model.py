"""A causal LM seen as embed -> blocks -> head, with the weights of one block in memory at a time.

With its neighbours layers.py and skeleton.py the only one that knows how Hugging Face models are built, and it knows no
architecture: the blocks are the longest ModuleList of the model, and how each is called is recorded from the model's own
forward.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from compress.calib.layers import Layer, linear_layers
from compress.calib.skeleton import load_config, load_tokenizer, quiet, skeleton
from compress.calib.weight_files import WeightFiles
from compress.errors import InputError
from compress.kernels.inputs import InputQuantizer

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")

UNKNOWN = -1
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # to compute in, as files spell them

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is handed after the hidden states: arguments, keywords
Seen = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # the hidden states as well


class Block:
    """One transformer block with its weights loaded."""

    def __init__(self, model: "Model", index: int):
        self.index = index
        self.name = f"{model.path}.{index}"
        self.module = model.modules[index]
        self.layers = model.layers_of(index)
        self._model = model

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states in, hidden states out: [1, tokens, hidden_size]."""
        return self.forward(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same, recorded by autograd where it is on."""
        args, kwargs = self._model.calls[hidden.shape[1]][self.index]
        out = self.module(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the block that a checkpoint holds, by its full name."""
        return {f"{self.name}.{name}": tensor for name, tensor in self.module.state_dict().items()}


class _Passer(nn.Module):
    """Stands where a block stands: records how it is called and passes the hidden states on, or puts others in."""

    def __init__(self, model: "Model", index: int, hidden: Tensor | None = None):
        super().__init__()
        self._parts = (model, index, hidden)  # a tuple, so that torch registers nothing

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model, index, _ = self.__dict__["_parts"]
            return getattr(model.modules[index], name)  # attention_type and the like, which some models ask blocks for

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, _, hidden = self._parts
        if hidden is None:
            kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
            seen = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            model.seen.append((seen, args[1:], kwargs))
            if model.tuple_length == UNKNOWN or len(model.seen) == model.n_blocks:
                raise _SeenEnough
            hidden = seen
        return hidden if model.tuple_length is None else (hidden, *[None] * (model.tuple_length - 1))


class _SeenEnough(Exception):
    """Ends the model's forward once it has shown how it calls its blocks: the head is far from free."""


class Model:
    """A causal LM, streamed: embeddings, norms outside the blocks and the head stay in memory, blocks come and go.

    Raises InputError if the folder's config, tokenizer or weights do not make a causal LM that can be split in blocks.
    """

    def __init__(self, folder: Path, files: WeightFiles, dtype: torch.dtype | None = None, device: str = "cpu"):
        self.folder, self.files, self.device = folder, files, device
        self.config = load_config(folder)
        self.config._experts_implementation = "eager"  # one matrix product per expert, which can be watched
        stored = (DTYPES[entry.dtype] for entry in files.entries.values() if entry.dtype in DTYPES)
        self.dtype: torch.dtype = dtype or self.config.dtype or next(stored, torch.float32)
        if self.dtype not in DTYPES.values():
            raise InputError(f"config.json of {folder} says dtype {self.dtype}: set bfloat16, float16 or float32")
        self.lm = skeleton(self.config, self.dtype, len(files.entries))
        lists = [(n, m) for n, m in self.lm.base_model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        if not lists:
            raise InputError(f"{self.config.model_type}: found no list of transformer blocks in this architecture")
        name, self.modules = max(lists, key=lambda pair: len(pair[1]))
        prefix = "" if self.lm.base_model is self.lm else self.lm.base_model_prefix + "."
        self.path = prefix + name
        parent, _, self._slot = name.rpartition(".")
        self._parent = self.lm.base_model.get_submodule(parent)
        self.n_blocks = len(self.modules)
        self._meta = {n: t.to("meta") for n, t in self.lm.state_dict().items()}
        self.unused: list[str] = []  # tensors of the files that the model has no place for
        self.input_quantizers: dict[str, InputQuantizer] = {}  # of the files' layers, by the name of the weight
        self._keys = self._sort_keys()
        self.calls: dict[int, list[Call]] = {}  # by sequence length: how each block is called
        self.seen: list[Seen] = []
        self._checked: set[int] = set()
        self.tuple_length: int | None = UNKNOWN  # of what blocks return; None: a bare tensor
        missing = self._load(-1)
        with quiet():  # a head that differs from the embeddings is not tied to them, whatever config.json says
            self.lm.tie_weights(missing_keys=missing)
        self._require_loaded(self._outside())

    # ---- weights ----

    def _sort_keys(self) -> dict[int, list[str]]:
        """Which of the files' tensors belong to which block; -1 is all that lies outside the blocks."""
        mapping = get_model_conversion_mapping(self.lm)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        ignored = self.lm._keys_to_ignore_on_load_unexpected or ()
        keys: dict[int, list[str]] = {index: [] for index in range(-1, self.n_blocks)}
        numbers = {str(index): index for index in range(self.n_blocks)}
        for key in self.files.names():
            name, _ = rename_source_key(key, renamings, converters, self.lm.base_model_prefix, self._meta)
            if name not in self._meta and key in self._meta:
                name = key
            inside = name.startswith(self.path + ".")
            index = numbers.get(name.removeprefix(self.path + ".").partition(".")[0]) if inside else -1
            if name not in self._meta and not any(re.search(pattern, name) for pattern in ignored):
                self.unused.append(key)  # such as a block for predicting several tokens at once
            if index is not None:
                keys[index].append(key)
            if (quantizer := self.files.input_quantizer(key)) is not None:
                self.input_quantizers[name] = quantizer
        if empty := [index for index in range(self.n_blocks) if not keys[index]]:
            wanted = f"config.json says {self.n_blocks} blocks"
            raise InputError(f"{self.folder} holds nothing of block {empty[0]}, but {wanted}: download it again")
        return keys

    def _load(self, index: int) -> set[str]:
        """Put the weights of one block (-1: everything outside) into the model, through transformers' own loader.

        Returns the names of the model's tensors that these weights did not fill.
        """
        mapping = get_model_conversion_mapping(self.lm)
        state = {key: self.files.read(key) for key in self._keys[index]}
        plan = LoadStateDictConfig(dtype=self.dtype, weight_mapping=mapping, device_map={"": self.device})
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.lm, state, plan)
        self.lm.requires_grad_(False)
        if info.mismatched_keys:
            name, found, wanted = sorted(info.mismatched_keys)[0]
            raise InputError(
                f"{name} is {list(found)} in {self.folder} but config.json says {list(wanted)}: restore it"
            )
        if info.conversion_errors:
            raise InputError(f"{self.folder}: {next(iter(info.conversion_errors.values()))}")
        return set(info.missing_keys)

    def _require_loaded(self, named: Iterator[tuple[str, Tensor]]) -> None:
        missing = [name for name, tensor in named if tensor.is_meta]
        if missing:
            raise InputError(f"{self.folder} lacks {missing[0]} ({len(missing)} tensors): download it again")

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors outside the blocks, each once even if tied."""
        seen: set[int] = set()
        for name, tensor in [*self.lm.named_parameters(remove_duplicate=False), *self._outside_buffers()]:
            if not name.startswith(self.path + ".") and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def _outside_buffers(self) -> list[tuple[str, Tensor]]:
        return [(n, b) for n, b in self.lm.named_buffers() if n in self._meta and not n.startswith(self.path + ".")]

    def outside(self) -> dict[str, Tensor]:
        """Every tensor outside the blocks that a checkpoint holds, by name."""
        return {name: tensor.detach() for name, tensor in self._outside()}

    def as_stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names, and in the pieces, that this architecture's checkpoints have on the hub."""
        self.lm._weight_conversions = None  # what the last load used; a block of another kind may need others
        return revert_weight_conversion(self.lm, dict(state))

    def blocks(self) -> Iterator[Block]:
        """Each block in turn, loaded; the one before is freed."""
        for index in range(self.n_blocks):
            with self.loaded(index) as block:
                yield block

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[Block]:
        """One block with its weights in memory, until the context ends."""
        block = self.load_block(index)
        try:
            yield block
        finally:
            self._free(index)

    def load_block(self, index: int) -> Block:
        """One block with its weights in memory."""
        self._load(index)
        self._require_loaded(self.modules[index].named_parameters(prefix=f"{self.path}.{index}"))
        block = Block(self, index)
        for layer in block.layers:
            layer.quantize_inputs(self.input_quantizers.get(layer.param))
        return block

    def _free(self, index: int) -> None:
        for module in self.modules[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    # ---- structure ----

    def layers_of(self, index: int) -> list[Layer]:
        """The linear layers of one block, in the order the block defines them."""
        return linear_layers(f"{self.path}.{index}", self.modules[index])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer, loaded anew: one of 262,144 words takes as much memory as many a block, so none is kept."""
        return load_tokenizer(self.folder)

    def linear_names(self) -> list[str]:
        """Names of all nn.Linear modules of the model, in and outside the blocks."""
        return [name for name, module in self.lm.named_modules() if isinstance(module, nn.Linear)]

    # ---- forward, in parts ----

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first block: token ids [tokens] to hidden states [1, tokens, hidden_size].

        The first call of each sequence length records how the model calls its blocks.
        """
        if (top := int(tokens.max())) >= (rows := len(self.lm.get_input_embeddings().weight)):
            raise InputError(f"{self.folder}: its tokenizer gave token {top} of {rows} embeddings: restore its files")
        if self.tuple_length == UNKNOWN:
            self.tuple_length = self._probe_block(tokens)
        seen = self._record_calls(tokens)
        calls = [(args, kwargs) for _, args, kwargs in seen]
        length = len(tokens)
        if length not in self.calls:
            self.calls[length] = calls
        elif length not in self._checked:
            self._checked.add(length)
            if not all(_same(a, b) for a, b in zip(calls, self.calls[length], strict=True)):
                raise InputError(
                    f"{self.config.model_type} hands its blocks more than hidden states that depends on the text: "
                    "this architecture cannot be compressed block by block"
                )
        return seen[0][0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """What leaves the last block, [1, tokens, hidden_size], to logits [1, tokens, vocab_size].

        Final norm and head treat each position alone, so any slice of positions may be given.
        """
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """The same, recorded by autograd where it is on."""
        tokens = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=self.device)
        return self._run(tokens, [_Passer(self, 0, hidden)]).logits

    @torch.no_grad()
    def last_hidden(self, hidden: Tensor) -> Tensor:
        """What leaves the last block, [1, tokens, hidden_size], to what enters the head: through the final norm."""
        tokens = torch.zeros(1, hidden.shape[1], dtype=torch.long)
        return self._run(tokens, [_Passer(self, 0, hidden)], self.lm.base_model).last_hidden_state

    def _run(self, tokens: Tensor, stand_ins: list[nn.Module], part: nn.Module | None = None) -> Any:
        """The model's forward, or that of a part of it, with others in the blocks' place."""
        setattr(self._parent, self._slot, nn.ModuleList(stand_ins))
        try:
            return (part or self.lm)(tokens.to(self.device), use_cache=False)
        except IndexError as error:  # a table of learned positions has come to its end
            raise InputError(f"{self.folder} cannot take {tokens.shape[1]} tokens at once: lower --seqlen") from error
        finally:
            setattr(self._parent, self._slot, self.modules)

    def _record_calls(self, tokens: Tensor) -> list[Seen]:
        """(hidden states, further arguments, keywords) of each block's call; of the first alone until one was probed."""
        self.seen = []
        with contextlib.suppress(_SeenEnough):
            self._run(tokens.unsqueeze(0), [_Passer(self, index) for index in range(self.n_blocks)])
        seen, self.seen = self.seen, []
        return seen

    def _probe_block(self, tokens: Tensor) -> int | None:
        """Whether blocks return a tuple, and of what length: run the first one, as the model itself calls it."""
        hidden, args, kwargs = self._record_calls(tokens)[0]
        out = self.load_block(0).module(hidden, *args, **kwargs)
        self._free(0)
        return len(out) if isinstance(out, tuple) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two calls hand over equal tensors."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return all(_same(value, b.get(key)) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return True
