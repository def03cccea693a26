import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.packing import pack, pack_mask, unpack, unpack_mask, words_for

SEEDS = st.integers(0, 2**31)


@given(st.sampled_from([2, 3, 4, 5, 8]), st.integers(1, 4), st.integers(1, 100), SEEDS)
def test_unpack_inverts_pack(bits, rows, length, seed):
    codes = torch.randint(0, 2**bits, (rows, length), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, words_for(length, bits))
    assert torch.equal(unpack(words, bits, length), codes)


@given(st.sampled_from([1, 2, 3, 4, 5, 8, 12]), st.integers(0, 4), st.integers(1, 40), SEEDS)
def test_words_are_unpacked_wherever_they_lie(bits, rows, length, seed):
    codes = torch.randint(0, 2**bits, (rows, length), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    apart = torch.zeros(2 * rows + 1, 3 * words.shape[1], dtype=torch.int32)[: 2 * rows : 2, ::3].copy_(words)
    for each in (words.T.contiguous().T, apart):
        kept = each.clone()
        assert unpack(each, bits, length).tolist() == codes.tolist() and torch.equal(each, kept)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), SEEDS)
def test_code_i_is_bits_i_times_b_of_one_little_endian_stream(bits, length, seed):
    codes = torch.randint(0, 2**bits, (1, length), generator=torch.Generator().manual_seed(seed))
    stream = int.from_bytes(pack(codes, bits)[0].numpy().astype("<i4").tobytes(), "little")
    assert [(stream >> (i * bits)) & (2**bits - 1) for i in range(length)] == codes[0].tolist()


def test_four_bit_words_are_what_gptq_files_hold():
    assert pack(torch.full((1, 8), 7), 4).item() == 0x77777777


@given(st.integers(1, 4), st.integers(1, 40), SEEDS)
def test_masks(rows, length, seed):
    keep = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) > 0.5
    assert torch.equal(unpack_mask(pack_mask(keep), length), keep)
