"""Launches are decided without a GPU and without Triton; what cannot be served says why."""

from dataclasses import replace
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
from compress.kernels.gemm.launch import (
    TILES,
    Epilogue,
    Launch,
    Tiling,
    as_numbers,
    candidates,
    choose_launch,
    from_numbers,
)
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
    found = choose_launch((tokens, out_features, blocks), CPU, True)
    alone = choose_launch((1, out_features, blocks), CPU, True)
    assert (found.splits, found.block_n) == (alone.splits, alone.block_n)
    assert found.block_m <= 32


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_large_gpu_is_kept_busy_and_splits_keep_some_work(monkeypatch, deterministic):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 108)
    for out_features, blocks in ((128, 400), (4096, 32), (4096, 8), (11008, 32), (262144, 5)):
        found = choose_launch((1, out_features, blocks), CPU, deterministic)
        programs = -(-out_features // found.block_n) * found.splits
        assert found.splits == 1 or blocks // found.splits >= launch.LEAST_BLOCKS
        assert programs >= 4 * 108 * 0.9 or blocks // (found.splits + 1) < launch.LEAST_BLOCKS or found.splits > 1


MORE = (TILES[0], Launch(16, 64), *TILES[1:])  # two for 16 tokens


@given(tokens=st.integers(1, 300), out_features=st.integers(1, 5000), blocks=st.integers(1, 200))
def test_what_is_timed_is_what_is_launched_once_it_was_measured(tokens, out_features, blocks):
    sizes = tokens, out_features, blocks
    rule, *others = candidates(tokens, MORE)
    assert choose_launch(sizes, CPU, tiles=MORE, tilings=[rule]) == choose_launch(sizes, CPU, tiles=MORE)
    assert {each.waves for each in others} > {rule.waves} and len(set(others) | {rule}) == len(others) + 1
    for each in others:
        found = choose_launch(sizes, CPU, tiles=MORE, tilings=[each])
        assert replace(found, splits=1) == each.tile and found.block_m <= rule.block_m
        assert choose_launch(sizes, CPU, True, MORE, [each]) == choose_launch(sizes, CPU, True, MORE)


def test_more_waves_are_more_splits(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 100)
    few, many = (choose_launch((1, 1280, 400), CPU, tilings=[Tiling.of(1, TILES[0], waves)]) for waves in (2, 8))
    assert (few.splits, many.splits) == (20, 80)


def test_what_was_measured_serves_up_to_its_tokens_and_beyond_the_largest_tile():
    narrow, waves = Tiling.of(4, MORE[1]), Tiling.of(64, TILES[1])
    measured = [narrow, waves, Tiling.of(256, TILES[2])]
    taken = {m: choose_launch((m, 128, 8), CPU, tiles=MORE, tilings=measured) for m in (1, 4, 5, 40, 65, 256, 999)}
    assert {m: (each.block_m, each.block_n) for m, each in taken.items()} == {
        **dict.fromkeys((1, 4), (16, 64)),
        5: (16, 128),  # never a larger tile than takes all tokens
        40: (32, 128),
        **dict.fromkeys((65, 256, 999), (64, 128)),
    }
    assert choose_launch((999, 128, 8), CPU, tiles=MORE, tilings=measured[:2]).block_m == 128  # not measured


def test_a_tile_that_is_not_known_is_left():
    strange = Tiling(16, 16, 4096, 64, 9)
    assert choose_launch((1, 128, 8), CPU, tilings=[strange]) == choose_launch((1, 128, 8), CPU)


@given(st.lists(st.builds(Tiling, *[st.integers(1, 512)] * 6)))
def test_tilings_are_numbers_to_an_operator(tilings):
    assert from_numbers(as_numbers(tilings)) == tilings


def test_pipelines_are_short_on_amd(monkeypatch):
    assert choose_launch((1, 128, 8), CPU).num_stages > launch.AMD_STAGES
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_launch((1, 128, 8), CPU).num_stages == launch.AMD_STAGES


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
