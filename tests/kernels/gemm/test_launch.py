"""Launches are decided without a GPU and without Triton; what cannot be served says why."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import codebook_weight, int_weight, sparse_weight

from compress.errors import InputError
from compress.kernels.codebook import ops as codebook
from compress.kernels.codebook.layout import SlicedCodebookWeight
from compress.kernels.gemm import launch
from compress.kernels.gemm.launch import Epilogue, Launch, default_launch
from compress.kernels.inputs import InputQuantizer
from compress.kernels.sparse24 import ops as sparse24
from compress.kernels.sparse24.layout import SlicedSparse24Weight
from compress.kernels.w8a8 import ops as w8a8
from compress.kernels.wna16 import ops as wna16
from compress.kernels.wna16.layout import SlicedWeight

CPU, HALF = torch.device("cpu"), torch.float16


@given(tokens=st.integers(1, 300), out_features=st.integers(1, 20000), blocks=st.integers(1, 500))
def test_splits_are_the_same_for_any_number_of_tokens(tokens, out_features, blocks):
    launch.multiprocessors.cache_clear()
    found = default_launch((tokens, out_features, blocks), CPU, True)
    alone = default_launch((1, out_features, blocks), CPU, True)
    assert (found.splits, found.block_n) == (alone.splits, alone.block_n)
    assert found.block_m <= 32


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_large_gpu_is_kept_busy_and_splits_keep_some_work(monkeypatch, deterministic):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 108)
    for out_features, blocks in ((128, 400), (4096, 32), (4096, 8), (11008, 32), (262144, 5)):
        found = default_launch((1, out_features, blocks), CPU, deterministic)
        programs = -(-out_features // found.block_n) * found.splits
        assert found.splits == 1 or blocks // found.splits >= launch.LEAST_BLOCKS
        assert programs >= 4 * 108 * 0.9 or blocks // (found.splits + 1) < launch.LEAST_BLOCKS or found.splits > 1


def test_pipelines_are_short_on_amd(monkeypatch):
    assert default_launch((1, 128, 8), CPU).num_stages > launch.AMD_STAGES
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert default_launch((1, 128, 8), CPU).num_stages == launch.AMD_STAGES


def test_tiles_are_shared_among_as_many_waves_as_amd_has_registers_for():
    large, small, narrow = Launch(64, 128), Launch(16, 64, num_warps=8), Launch(16, 128)
    assert [launch.on_amd(tile, 32).num_warps for tile in (large, small, narrow)] == [8, 4, 4]
    assert [launch.on_amd(tile, 64).num_warps for tile in (large, small, narrow)] == [4, 4, 4]


def test_what_a_kernel_cannot_serve_it_says():
    integers = int_weight((4, 128), 4, 32, True)
    without = "need a GPU" if find_spec("triton") else "install the extra"
    assert without in (wna16.supports(integers, CPU, HALF) or "")
    assert "float32" in (wna16.supports(integers, CPU, torch.float32) or "")
    assert "IntWeight" in (wna16.supports(sparse_weight((4, 128), 4, 64, True), CPU, HALF) or "")
    assert "6 bits" in (wna16.supports(int_weight((4, 96), 6, 32, True), CPU, HALF) or "")
    assert "groups of 24" in (wna16.supports(int_weight((4, 96), 4, 24, True), CPU, HALF) or "")
    assert "groups of 96" in (wna16.supports(int_weight((4, 192), 4, 96, True), CPU, HALF) or "")
    assert "groups of 32" in (sparse24.supports(sparse_weight((4, 128), 4, 32, True), CPU, HALF) or "")
    assert "vectors have 3" in (codebook.supports(codebook_weight((4, 96), 1, 4, 3), CPU, HALF) or "")
    assert "groups of 32" in (w8a8.supports(integers, CPU, HALF) or "")


def test_a_kernel_that_is_asked_for_without_a_gpu_fails():
    pytest.importorskip("triton")
    x = torch.randn(1, 128).half()
    dense, sparse = int_weight((4, 128), 4, 64, True), sparse_weight((4, 128), 4, 64, True)
    vectors = codebook_weight((4, 128), 1, 4, 8)
    asked = (
        lambda: wna16.matmul(x, SlicedWeight.from_int(dense)),
        lambda: sparse24.matmul(x, SlicedSparse24Weight.from_sparse(sparse), Epilogue()),
        lambda: codebook.matmul(x, SlicedCodebookWeight.from_codebook(vectors)),
        lambda: w8a8.quantize(x, InputQuantizer(8)),
    )
    for run in asked:
        with pytest.raises(InputError, match="need a GPU"):
            run()
