"""Layers of a model that serves: packed weights and who multiplies by them, embeddings decoded a row at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.kernels.correction import Correction
from compress.kernels.dispatch import Choice, Preferences, choose
from compress.kernels.gemm.launch import Epilogue
from compress.kernels.implementation import Case, Implementation
from compress.kernels.inputs import InputQuantizer
from compress.kernels.weights import PackedWeight


@dataclass(frozen=True)
class LayerParts:
    """All that a linear layer computes with."""

    weight: PackedWeight
    bias: Tensor | None = None  # [out]
    correction: Correction | None = None  # what is added to the weight
    inputs: InputQuantizer | None = None  # how what enters is rounded

    def case(self, dtype: torch.dtype, device: torch.device) -> Case:
        """What it asks of an implementation."""
        return Case(self.weight, device, dtype, self.inputs)


class CompressedLinear(nn.Module):
    """A linear layer that multiplies by a packed weight. Not for training: nothing in it has a gradient.

    `weight` is an empty parameter: what some models ask a layer's weight for is its dtype and device.
    """

    constant: Tensor | None  # float32 [out]
    correction_a: Tensor | None
    correction_b: Tensor | None
    correction_single: Tensor | None  # sparse, float32 [out, in]

    def __init__(self, parts: LayerParts, dtype: torch.dtype, device: torch.device, preferences: Preferences | Choice):
        """`preferences`, or a choice that was made. Raises InputError if the forced implementation cannot serve this."""
        super().__init__()
        self.out_features, self.in_features = parts.weight.shape
        case = parts.case(dtype, device)
        self.choice = preferences if isinstance(preferences, Choice) else choose(case, preferences)
        self.few, self.many = self.choice.made(case)
        self._products = self.few, self.many  # a plain attribute: a module finds those that it holds slowly
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.input_quantizer = parts.inputs
        self._keep("constant", _constant(parts), device)
        self._keep_correction(parts.correction, dtype, device)
        self.plain = parts.inputs is None and self.constant is None and parts.correction is None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        rows = x.reshape(-1, self.in_features)
        few, many = self._products
        product = few if many is None or rows.shape[0] < self.choice.many_from else many
        y = product(rows) if self.plain else self._multiplied(product, rows).to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiplied(self, product: Implementation, rows: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out], where there is more to it than a product; in any dtype."""
        quantizer = self.input_quantizer
        if quantizer is None and product.EPILOGUE:
            y = product(rows, Epilogue(self.constant, self.correction_a, self.correction_b))
            return y if self.correction_single is None else y + self._single(rows)
        if quantizer is None:
            y = product(rows)
        else:
            codes, scale = quantizer.codes_and_scale(rows)
            y = product(codes, scale) if product.CODES else product(codes.to(rows.dtype))
            y = y if scale is None or product.CODES else y * scale
        if self.correction_a is not None or self.correction_single is not None:
            y = y + self._corrected(rows if quantizer is None else quantizer.fake(rows))
        return y if self.constant is None else y + self.constant

    def _corrected(self, rows: Tensor) -> Tensor:
        """What the correction adds, [tokens, out] float32 or the model's dtype."""
        total: Tensor | None = None
        if self.correction_a is not None and self.correction_b is not None:
            total = (rows @ self.correction_a.T) @ self.correction_b.T
        if self.correction_single is not None:
            total = self._single(rows) if total is None else total + self._single(rows)
        assert total is not None  # the caller asks only where something is added
        return total

    def _single(self, rows: Tensor) -> Tensor:
        """What corrections of single weights add, float32 [tokens, out]."""
        assert self.correction_single is not None
        return (self.correction_single @ rows.float().T).T

    def _keep(self, name: str, tensor: Tensor | None, device: torch.device) -> None:
        self.register_buffer(name, None if tensor is None else tensor.to(device), persistent=False)

    def _keep_correction(self, correction: Correction | None, dtype: torch.dtype, device: torch.device) -> None:
        ranked = correction is not None and correction.rank > 0
        self._keep("correction_a", correction.a.to(dtype) if correction and ranked else None, device)
        self._keep("correction_b", correction.b.to(dtype) if correction and ranked else None, device)
        self._keep("correction_single", None if correction is None else _sparse(correction), device)

    def extra_repr(self) -> str:
        """As torch prints modules."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.choice.names}"


def _constant(parts: LayerParts) -> Tensor | None:
    """What is added to every output, float32 [out]: the bias, and the weight times what the inputs were shifted by."""
    constant = None if parts.bias is None else parts.bias.float()
    shift = None if parts.inputs is None else parts.inputs.shift
    if shift is None:
        return constant
    dense = parts.weight.dequantize()
    moved = dense @ shift.to(dense.device)
    return moved if constant is None else moved + constant


def _sparse(correction: Correction) -> Tensor | None:
    """Single weights as a sparse matrix, float32 [out, in]; None: there are none."""
    if correction.index is None or correction.value is None or not len(correction.index):
        return None
    index, (_, in_features) = correction.index.long(), correction.shape
    places = torch.stack([index // in_features, index % in_features])
    return torch.sparse_coo_tensor(
        places, correction.value.float(), correction.shape, is_coalesced=True, check_invariants=True
    )


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are decoded as they are looked up.

    It is mixed into whatever class of embedding a model has, so that what that class does beside (Gemma scales rows)
    stays. `weight` is an empty parameter, as in `CompressedLinear`.
    """

    @classmethod
    def take_over(cls, module: nn.Embedding, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> None:
        """Turn `module` into one that looks up rows of `weight`, in place."""
        own = type(module)
        mixed = cls if own is nn.Embedding else type(f"Packed{own.__name__}", (own, cls), {})
        module.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        module.__class__ = mixed
        assert isinstance(module, PackedEmbedding)
        module.kind, module.description = type(weight), weight.description()
        module.names = list(weight.tensors())
        for name, tensor in weight.tensors().items():
            module.register_buffer(f"packed_{name}", tensor.to(device), persistent=False)

    kind: type[PackedWeight]
    description: dict[str, int]
    names: list[str]

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] to rows [..., embedding_dim] in the model's dtype."""
        ids = input.reshape(-1)
        tensors = {}
        for name in self.names:
            whole = getattr(self, f"packed_{name}")
            tensors[name] = whole if name in self.kind.WHOLE else whole[ids]
        rows = self.kind.from_tensors(tensors, self.description).dequantize()
        return rows.to(self.weight.dtype).view(*input.shape, -1)
