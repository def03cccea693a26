"""What a run will take: seconds by the stages of its journal, and bytes at its peak.

Seconds come from what a part of the same work takes on this machine: a block is read and run on one sequence, matrices
are multiplied, and the steps go over small layers (rehearsal.py).
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from compress.calib.gradients import FIELDS, LOGITS_AT_ONCE
from compress.calib.model import Model
from compress.calib.observe import TOKENS_AT_ONCE, shared_inputs, stages
from compress.calib.products import products_of
from compress.checkpoint.writer import SHARD_BYTES
from compress.distill import POSITIONS, WORDS
from compress.plan import PlannedLayer
from compress.recipe import Recipe
from compress.rehearsal import FACTOR, Rehearsal
from compress.steps import Step, find_drift, find_steps
from compress.whole_recovery import trained_options

IMPORTS = 560 * 2**20  # resident bytes of python, torch, transformers, and what calibration text leaves behind
TOKENIZER = 10  # resident bytes for each byte of tokenizer.json
TRIED = 512  # tokens of the sequence that a block is tried on
DISK = 4e8  # bytes a second, of files that are written and synced
CHUNK = 12 * 4 * 2**22  # bytes that a step holds of the weights it solves together

Seconds = dict[str, float]  # by stage, as `compress inspect` names them


@dataclass(frozen=True)
class Costs:
    """A recipe, what it makes of each layer, and the model it is for."""

    model: Model
    recipe: Recipe
    layers: list[PlannedLayer]

    def seconds(self) -> Seconds:
        """What each stage will take, without what an allocation measures and without training."""
        recipe, n_blocks, tried = self.recipe, self.model.n_blocks, self._tried
        found: Seconds = {"gradients": self._gradients()} if self._needs & FIELDS else {}
        found["load"] = n_blocks * tried.load
        if self._needs:
            through = self._tokens * tried.forward  # once through one block
            passes = (2 if self._drift else 1) * (tried.n_stages if recipe.sequential else 1)
            found["observe"] = n_blocks * (passes * through + recipe.calib.seqlen * tried.forward + self._products())
        solving = self._solving()
        found["solve"] = sum(solving.values())
        found |= {f"  solve: {name}": value for name, value in solving.items() if name}
        masked = sum(layer.n_weights for layer in self.layers if layer.plan.sparsity)
        found["save"] = 2 * (self._packed_bytes + masked / 8) / DISK + 4 * self._speeds.element * masked
        if self._needs:
            found["forward"] = (n_blocks - 1) * through
        found["checkpoint"] = (2 * self._packed_bytes + self._outside) / DISK
        if self.recipe.format != "native":  # a run keeps 2:4 without its zeros, which come back
            filled = sum(layer.n_weights for layer in self.layers if layer.plan.pattern == (2, 4))
            found["checkpoint"] += 12 * self._speeds.element * filled
        return found

    def peak_bytes(self) -> int:
        """Resident bytes at the peak: what stays, one block, and the largest of observing, solving and gradients."""
        vocabulary = self.model.folder / "tokenizer.json"
        tokenizer = TOKENIZER * vocabulary.stat().st_size if self._needs and vocabulary.exists() else 0
        largest = max(self._solving_bytes(), self._observing_bytes(), self._gradient_bytes())
        writing = min(SHARD_BYTES, self._packed_bytes) + self._packed_bytes // self.model.n_blocks
        working = max(self._hidden_bytes + self._block_bytes + largest, writing)
        return int(IMPORTS + tokenizer + self._outside + working)

    def gradient_disk_bytes(self) -> int:
        """What gradients take on disk: what enters every block and what comes back to two, and they themselves."""
        fields, weights = len(self._needs & FIELDS), sum(layer.n_weights for layer in self.layers)
        return (self.model.n_blocks + 2) * self._states + 4 * fields * weights if fields else 0

    def training_bytes(self, compressed: int) -> int:
        """About what training holds beside what a method learns: the compressed model, a block's activations, logits."""
        longest = most(options.seqlen * options.micro_batch_size for _, options in trained_options(self.recipe))
        inside = sum(sum(layer.shape) for layer in self.layers) // self.model.n_blocks
        entering = self.model.n_blocks * self.model.config.get_text_config().hidden_size
        decoded = 8 * most(layer.n_weights for layer in self.layers)
        states = longest * self._width * (2 * inside + entering)
        return int(IMPORTS + compressed + decoded + states + 24 * POSITIONS * WORDS)

    # ---- seconds ----

    def _products(self) -> float:
        """Of one block's sums of products, and of the matrices made of them."""
        if "hessian" not in self._needs:
            return self._speeds.element * 4 * self._tokens * sum(self._tried.inputs)
        bunches, drift = self._tokens / TOKENS_AT_ONCE, bool(self._drift)
        found = 0.0
        for width in self._tried.inputs:
            summed = width**2 * (0.5 + drift)  # numbers of a symmetric sum, and of the other
            found += 2 * self._tokens * summed / self._speeds.inputs + self._speeds.element * summed * (2 * bunches + 4)
        return found

    def _solving(self) -> Seconds:
        """Of all layers: of each method, and under "" of what is done to a layer whatever the method."""
        flops, element, drift = self._speeds.exact, self._speeds.element, bool(self._drift)
        rehearsal = Rehearsal(self._steps, self.model.dtype, flops, self.model.device)
        found: Seconds = {"": 0.0}
        for layer in self.layers:
            in_features, each = layer.shape[1], rehearsal.seconds(layer)
            for name, value in each.items():
                found[name] = found.get(name, 0.0) + value
            measured = 512 if "hessian" not in self._needs else in_features  # error of the outputs, on a sample or by H
            made_up = 6 * in_features if drift and layer.plan.changes else 0
            products = layer.n_weights * (measured * (1 + len(each)) + made_up)
            fields = 4 * len(self._needs & FIELDS) / DISK
            found[""] += products / flops + layer.n_weights * (element * (12 + 5 * len(each)) + fields)
        solvers = ["" if step is self._reuses else step.name for step in self._steps if step.matrices]
        if drift and self._reuses is None:
            solvers.append("")  # the factor that makes up for it is its own
        for name in solvers:
            factors = sum(FACTOR * width**3 / flops + 20 * element * width**2 for width in self._tried.inputs)
            found[name] = found.get(name, 0.0) + self.model.n_blocks * factors
        return found

    def _gradients(self) -> float:
        """Of all passes; those taken anew go over the blocks that remain."""
        n, tokens, tried = self.model.n_blocks, self._tokens, self._tried
        starts = range(0, n, self.recipe.calib.refresh_gradients or n)
        weights = sum(layer.n_weights for layer in self.layers) / n
        fields = len(self._needs & FIELDS)
        summed = self.recipe.calib.nsamples * weights * (0.5 + fields) * self._speeds.element
        stored = 4 * fields * weights / DISK
        head = 6 * self.model.lm.get_output_embeddings().weight.numel() * tokens / (0.7 * self._speeds.fast)
        a_block = 2 * tried.load + 4 * tokens * tried.forward + summed + stored
        return sum((n - start) * a_block + head for start in starts)

    # ---- bytes ----

    def _solving_bytes(self) -> int:
        """Of the input that takes most, when its turn comes: later ones have their statistics still."""
        drift, fields, inputs = bool(self._drift), len(self._needs & FIELDS), self._tried.inputs
        squares = [4 * width**2 if "hessian" in self._needs else 0 for width in inputs]
        states = [4 * weights for weights in self._tried.readers]
        matrices = sum(step.matrices for step in self._steps) + (drift and self._reuses is None)
        largest = 0
        for place, (own, state) in enumerate(zip(squares, states, strict=True)):
            beginning = (1 + 2 * drift) * own + 2 * state  # while drift is made up for
            solving = (1 + matrices) * own + (4 + fields) * state + min(CHUNK, 12 * state)
            largest = max(largest, (1 + drift) * sum(squares[place + 1 :]) + max(beginning, solving))
        masks = self._block_bytes // self._width if any(layer.plan.sparsity for layer in self.layers) else 0
        return largest + self._packed_bytes // self.model.n_blocks + masks

    def _observing_bytes(self) -> int:
        """Of the sums over tokens: float32 while there is one bunch, then float64."""
        if "hessian" not in self._needs:
            return 0
        number = 4 if self._tokens <= TOKENS_AT_ONCE else 8
        drift = bool(self._drift)
        summed = sum(number * width**2 * (0.5 + drift) for width in self._tried.inputs)
        at_once = min(self._tokens, TOKENS_AT_ONCE) * 8 * (1 + drift) * sum(self._tried.inputs)
        return int(summed + at_once)

    def _gradient_bytes(self) -> int:
        fields = len(self._needs & FIELDS)
        return 4 * fields * self._block_bytes // self._width + 10 * LOGITS_AT_ONCE if fields else 0

    @property
    def _hidden_bytes(self) -> int:
        return (1 + bool(self._drift)) * self._states if self._needs else 0

    # ---- what they are made of ----

    @property
    def _states(self) -> int:
        """Bytes of all sequences' hidden states."""
        return self._tokens * self.model.config.get_text_config().hidden_size * self._width

    @property
    def _tokens(self) -> int:
        return self.recipe.calib.nsamples * self.recipe.calib.seqlen

    @property
    def _width(self) -> int:
        return self.model.dtype.itemsize

    @property
    def _drift(self) -> float:
        return find_drift(self.recipe, self._steps)

    @property
    def _outside(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.outside().values())

    @property
    def _block_bytes(self) -> int:
        """Of the largest block."""
        blocks = range(self.model.n_blocks)
        return self._width * most(sum(x.n_weights for x in self.layers if x.block == index) for index in blocks)

    @property
    def _packed_bytes(self) -> int:
        """Of all layers as they are saved."""
        return sum(
            self._width * layer.n_weights if layer.stored is None else layer.stored.packed.nbytes
            for layer in self.layers
        )

    @cached_property
    def _steps(self) -> list[Step]:
        """Of layers; what inputs go through takes no time beside them."""
        return [step for step in find_steps(self.recipe) if step.stage != "activations"]

    @property
    def _reuses(self) -> Step | None:
        """The step that takes the Hessian's factor from where drift was made up for."""
        if not self._drift or self.recipe.joint:
            return None
        return next((step for step in self._steps if step.stage == "quantize" and step.matrices), None)

    @property
    def _needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(step.needs for step in find_steps(self.recipe)))

    @cached_property
    def _speeds(self) -> "_Speeds":
        return _Speeds.measured(self.model.dtype, self.model.device)

    @cached_property
    def _tried(self) -> "_Tried":
        return _Tried.block(self.model, self.recipe.calib.seqlen)


@dataclass(frozen=True)
class _Tried:
    """What the last block showed."""

    inputs: list[int]  # features of each distinct one, in the order that data reaches them
    readers: list[int]  # weights of the largest layer that reads each
    n_stages: int
    load: float  # seconds to read it
    forward: float  # seconds for a token to pass it

    @classmethod
    def block(cls, model: Model, seqlen: int) -> "_Tried":
        tokens = torch.arange(min(seqlen, TRIED)) % model.config.get_text_config().vocab_size
        hidden = model.embed(tokens)
        started = time.monotonic()
        with model.loaded(model.n_blocks - 1) as block:
            loaded = time.monotonic()
            shared = shared_inputs(block, hidden)
            watched = time.monotonic()
            block(hidden)
            forward = time.monotonic() - watched
            shapes = {layer.name: layer.shape for layer in block.layers}
            first = list(dict.fromkeys(shared.values()))
            readers = [max(math.prod(shapes[name]) for name in shared if shared[name] == each) for each in first]
            inputs = [shapes[name][1] for name in first]
            return cls(inputs, readers, len(stages(block, shared)), loaded - started, forward / len(tokens))


@dataclass(frozen=True)
class _Speeds:
    """Operations a second of matrix products, and what runs through memory."""

    exact: float  # in float32
    fast: float  # in the dtype that the model computes in
    inputs: float  # in float32, of values that the model's dtype holds
    element: float  # seconds of one number's turn in a simple operation

    @classmethod
    def measured(cls, dtype: torch.dtype, device: str) -> "_Speeds":
        exact, fast = (_flops(each, device) for each in (torch.float32, dtype))
        with products_of(dtype):
            return cls(exact, fast, _flops(torch.float32, device), _element(device))


def _element(device: str) -> float:
    numbers, started = torch.ones(1 << 24, device=device), time.monotonic()
    for _ in range(4):
        (numbers + 1.0)[0].item()  # memory that is new costs more than the sum
    return (time.monotonic() - started) / (4 * len(numbers))


def _flops(dtype: torch.dtype, device: str) -> float:
    a, b = torch.ones(512, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
    (a @ b)[0, 0].item()
    started = time.monotonic()
    for _ in range(3):
        (a @ b)[0, 0].item()
    return 3 * 2 * 512 * 1024**2 / (time.monotonic() - started)


def most(values: Iterable[int]) -> int:
    """The largest; 0 of none."""
    return max(values, default=0)
