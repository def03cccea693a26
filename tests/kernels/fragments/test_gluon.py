"""The compiled kernel on CPU tensors: what it computes, and what it reads."""

import pytest
import torch
from packed_weights import int_weight, sparse_weight
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from compress.errors import InputError
from compress.kernels.fragments import ops
from compress.kernels.fragments.gluon import TILES, input_pairs, matmul
from compress.kernels.fragments.layout import FragmentWeight
from compress.kernels.gemm.launch import Epilogue, Launch
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded
from compress.kernels.packing import pack
from compress.kernels.testing.aot import build_folder
from compress.kernels.testing.emulate import emulated
from compress.kernels.weights import IntWeight

HALF, BRAIN = torch.float16, torch.bfloat16
MAKES = (int_weight, sparse_weight)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def build(tmp_path_factory):
    with build_folder(tmp_path_factory.mktemp("build")):
        yield


def inputs(tokens, in_features, dtype=HALF):
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(7)).to(dtype)


def tile(columns, splits=1, deterministic=False):
    return Launch(8 * columns, 128, splits=splits, deterministic=deterministic)


def laid(weight):
    return FragmentWeight.from_int(weight) if isinstance(weight, IntWeight) else FragmentWeight.from_sparse(weight)


def run(x, weight, epilogue=Epilogue(), launch=None, arch=80):
    with emulated(arch):
        return matmul(x, laid(weight), epilogue, launch=launch)


CASES = [  # make, (bits, group size, symmetric, scale dtype), dtype, tokens, in_features, splits
    (int_weight, (4, 128, True, HALF), HALF, 1, 640, 2),
    (int_weight, (4, 128, False, BRAIN), BRAIN, 11, 256, 2),
    (int_weight, (4, 256, True, BRAIN), HALF, 32, 256, 1),
    (int_weight, (4, 32, False, HALF), HALF, 8, 128, 1),
    (int_weight, (4, 64, True, HALF), BRAIN, 27, 256, 3),
    (int_weight, (2, 64, False, HALF), BRAIN, 3, 128, 1),
    (int_weight, (3, 128, True, HALF), HALF, 9, 384, 2),
    (int_weight, (3, 64, False, BRAIN), HALF, 20, 128, 1),
    (int_weight, (3, 32, False, HALF), BRAIN, 5, 256, 2),
    (int_weight, (3, 256, True, HALF), BRAIN, 32, 256, 1),
    (int_weight, (8, 128, True, HALF), HALF, 16, 128, 2),
    (int_weight, (8, 320, False, HALF), BRAIN, 33, 320, 1),
    (sparse_weight, (4, 128, True, HALF), HALF, 13, 384, 2),
    (sparse_weight, (4, 128, False, BRAIN), BRAIN, 32, 256, 2),
    (sparse_weight, (4, 32, True, HALF), HALF, 3, 128, 1),
    (sparse_weight, (2, 256, False, HALF), HALF, 8, 256, 1),
    (sparse_weight, (8, 64, True, BRAIN), BRAIN, 1, 128, 1),
]


@pytest.mark.parametrize(("make", "facts", "dtype", "tokens", "in_features", "splits"), CASES)
def test_numerics(make, facts, dtype, tokens, in_features, splits):
    weight, x = make((150, in_features), *facts), inputs(tokens, in_features, dtype)
    columns = next((t.block_m // 8 for t in TILES if t.block_m >= tokens), 4)
    for deterministic in (False, True)[:splits]:
        y = run(x, weight, launch=tile(columns, splits, deterministic))
        assert (y.dtype, y.shape) == (dtype, (tokens, 150))
        assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("arch", [80, 90])
def test_any_number_of_tokens(make, dtype, arch):
    weight = make((40, 256), 4, 128, True)
    for tokens in (*range(1, 34), 48, 65, 128, 257):
        x = inputs(tokens, 256, dtype)
        y = run(x, weight, arch=arch)
        assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


@pytest.mark.parametrize(
    ("make", "bits", "symmetric", "dtype"),
    [
        *((make, *each) for make in MAKES for each in ((4, False, HALF), (2, True, BRAIN), (8, False, BRAIN))),
        *((int_weight, 3, symmetric, dtype) for symmetric in (True, False) for dtype in (HALF, BRAIN)),
    ],
)
def test_identity_inputs_give_the_weight_itself(make, bits, symmetric, dtype):
    weight = make((40, 128), bits, 64, symmetric)
    assert torch.equal(run(torch.eye(128, dtype=dtype), weight).T, weight.dequantize().to(dtype))


def test_groups_of_zeros_give_zeros_and_a_huge_channel_spoils_no_other():
    weight, x = int_weight((40, 256), 4, 64, False), inputs(3, 256)
    zeros = weight.zero_point.repeat_interleave(64, dim=1)
    nothing = IntWeight(pack(zeros, 4), weight.scale, weight.zero_point, 4, 64, 256)
    assert run(x, nothing).count_nonzero() == 0
    x[:, 100] = 3000
    scale = weight.scale.clone()
    scale[7] *= 100
    huge = IntWeight(weight.packed, scale, weight.zero_point, 4, 64, 256)
    y, exact, rounded = run(x, huge), linear64(x, huge), linear_rounded(x, huge)
    ordinary = torch.arange(40) != 7
    assert excess_error(y[:, ordinary], rounded[:, ordinary], exact[:, ordinary]) <= 1.25
    assert excess_error(y[:, 7], rounded[:, 7], exact[:, 7]) <= 2  # three numbers: chance counts


@pytest.mark.parametrize("launch", [tile(1), tile(1, 2), tile(1, 2, True)])
def test_a_bias_and_a_correction_come_at_the_end(launch):
    weight, x = int_weight((40, 256), 4, 128, True), inputs(3, 256)
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random).to(HALF) for shape in ((21, 256), (40, 21)))
    bias = torch.randn(40, generator=random)
    for epilogue in (Epilogue(bias, a, b), Epilogue(bias)):
        y = run(x, weight, epilogue, launch)
        assert excess_error(y, linear_rounded(x, weight, epilogue), linear64(x, weight, epilogue)) <= 1.25


@pytest.mark.parametrize("tokens", [3, 11])
def test_all_tiles_that_are_timed_are_right(tokens):
    weight, x = int_weight((150, 1024), 4, 128, True), inputs(tokens, 1024)
    with emulated(80):
        tilings = ops.tilings(laid(weight), tokens)
        assert len({each.waves for each in tilings}) == 3
        for tiling in tilings:
            y = ops.matmul(x, laid(weight), tilings=[tiling])
            assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


@pytest.mark.parametrize("make", MAKES)
def test_deterministic_outputs_do_not_depend_on_the_batch(make):
    weight, x = laid(make((40, 256), 4, 32, False)), inputs(33, 256)
    with emulated(80):
        together = matmul(x, weight, deterministic=True)
        assert torch.equal(
            matmul(x, weight, launch=tile(2, 2, True))[:8], matmul(x[:8], weight, launch=tile(1, 2, True))
        )
        for first, last in ((0, 1), (20, 33)):
            assert torch.equal(matmul(x[first:last], weight, deterministic=True), together[first:last])


def test_inputs_may_have_more_dimensions_strides_and_no_tokens():
    weight = int_weight((40, 128), 4, 128, True)
    x = inputs(6, 200)
    flat = run(x[:, 8:136], weight)
    assert torch.equal(run(x[:, 8:136].contiguous(), weight), flat)
    assert torch.equal(run(x[:, 8:136].unflatten(0, (2, 3)), weight), flat.unflatten(0, (2, 3)))
    assert torch.equal(run(x.T.contiguous().T[:, 8:136], weight), flat)
    assert run(x[:0, :128], weight).shape == (0, 40)


def test_every_byte_of_a_weight_is_fetched_once_and_every_sector_used():
    weight, x = laid(sparse_weight((128, 512), 4, 128, False)), inputs(16, 512)
    with emulated(80) as launches:
        matmul(x, weight, launch=tile(2, 2))
    report = launches[0].report
    for name in ("words_ptr", "beside_ptr", "scale_ptr", "zero_ptr"):
        assert report.fetched_bits(name) == 8 * report.stored_bytes[name]
    assert all(report.efficiency(name) == 1 for name in report.stored_bytes)
    assert not report.banks


def test_a_mistake_in_the_layout_shows():
    weight, x = int_weight((128, 128), 4, 128, True), inputs(8, 128)
    right = laid(weight)
    for wrong in (right.words.roll(1, 3), right.words.flip(2), right.words.roll(1, -1)):
        mutant = FragmentWeight(wrong.contiguous(), None, None, right.scale, None, 4, 128, 128, 128)
        with emulated(80):
            y = matmul(x, mutant)
        assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) > 100


def test_pairs_of_inputs_for_2_of_4_are_transposed_four_by_four():
    x = torch.arange(64).half().unsqueeze(0)
    pairs = input_pairs(x, sparse=True).view(HALF).flatten().tolist()
    assert pairs[:8] == [0, 1, 8, 9, 16, 17, 24, 25]
    assert sorted(pairs[:32]) == list(range(32))


@pytest.mark.parametrize(
    ("weight", "dtype", "reason"),
    [
        (int_weight((8, 128), 5, 128, True), HALF, "5 bits"),
        (sparse_weight((8, 128), 3, 128, True), HALF, "3 if dense"),
        (int_weight((8, 200), 4, 200, True), HALF, "no whole blocks of 128"),
        (sparse_weight((8, 64), 8, 64, True), HALF, "no whole blocks of 128"),
        (int_weight((8, 384), 4, 192, True), HALF, "groups of 192"),
        (int_weight((8, 128), 4, 16, True), HALF, "groups of 16"),
        (int_weight((8, 128), 4, 128, True), torch.float32, "float32"),
        (int_weight((8, 128), 4, 128, True), HALF, "need a GPU"),
    ],
)
def test_what_it_cannot_serve_has_a_reason(weight, dtype, reason):
    assert reason in ops.supports(weight, CPU, dtype)


def test_what_it_can_serve():
    with emulated(80):
        for bits, group_size in ((4, 128), (4, 32), (2, 64), (8, 384)):
            for make in MAKES:
                assert ops.supports(make((8, 384), bits, group_size, False), CPU, BRAIN) is None
        assert ops.supports(int_weight((8, 384), 3, 128, True), CPU, BRAIN) is None


def test_the_operator_tells_compilers_what_it_returns():
    weight, x = laid(int_weight((24, 128), 4, 128, False)), inputs(2, 128)
    with emulated(80):
        y = ops.matmul(x, weight, Epilogue(torch.zeros(24)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.matmul(x, weight)
    assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())
    with pytest.raises(InputError, match="32 features"), emulated(80):
        ops.matmul(x[:, :32], weight)
