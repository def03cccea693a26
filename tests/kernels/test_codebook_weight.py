import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.packing import pack, unpack

SHAPES = {
    "out": st.integers(1, 6),
    "groups": st.integers(1, 9),
    "n_codebooks": st.integers(1, 4),
    "code_bits": st.integers(1, 12),
    "vector_size": st.integers(1, 8),
    "seed": st.integers(0, 2**31),
}


def random_weight(out, groups, n_codebooks, code_bits, vector_size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**code_bits, (out, groups, n_codebooks), generator=generator)
    codebooks = torch.randn(n_codebooks, 2**code_bits, vector_size, generator=generator).half()
    scale = torch.rand(out, 1, generator=generator).half()
    return codes, codebooks, scale


@given(**SHAPES)
def test_a_weight_is_its_scale_times_the_sum_of_its_vectors(**shape):
    codes, codebooks, scale = random_weight(**shape)
    weight = CodebookWeight.from_codes(codes, codebooks, scale)
    assert torch.equal(weight.codes().long(), codes)
    values = weight.dequantize().unflatten(1, (shape["groups"], shape["vector_size"]))
    for row in range(shape["out"]):
        for group in range(shape["groups"]):
            total = sum(codebooks[m, code].float() for m, code in enumerate(codes[row, group]))
            assert torch.equal(values[row, group], scale[row].float() * total)


@given(**SHAPES)
def test_tensors_and_description_are_all_of_it(**shape):
    weight = CodebookWeight.from_codes(*random_weight(**shape))
    again = CodebookWeight.from_tensors(weight.tensors(), weight.description())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(weight.rows(slice(0, 2)).dequantize(), weight.dequantize()[:2])
    facts = weight.description()
    planned = CodebookWeight.planned(weight.shape, facts["n_codebooks"], facts["code_bits"], facts["vector_size"])
    assert planned.nbytes == weight.nbytes and planned.description() == facts
    for part, (sizes, dtypes) in CodebookWeight.expected(weight.shape[0], facts).items():
        assert weight.tensors()[part].shape == sizes and weight.tensors()[part].dtype in dtypes


def test_bits_a_weight():
    """Two codes of 8 bits for 8 inputs are 2 bits; 8 KiB of codebooks and a scale a row come on top."""
    weight = CodebookWeight.planned((640, 2048), 2, 8, 8)
    assert weight.nbytes == 640 * 2048 * 2 // 8 + 2 * 256 * 8 * 2 + 640 * 2


def test_sixteen_bit_codes():
    codes = torch.tensor([[0, 65535, 32768, 1]])
    assert torch.equal(unpack(pack(codes, 16), 16, 4), codes.int())
