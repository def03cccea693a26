import pytest
import torch

from compress.bench import kernels
from compress.bench.kernels import KernelBench, bench_kernels
from compress.errors import InputError
from compress.kernels.dense import Dense

SMALL = KernelBench((32, 128), (1, 3), group_size=64)


def test_each_is_right_and_beside_the_dense_product(monkeypatch):
    monkeypatch.setattr(kernels, "SECONDS", 1e-3)
    rows = bench_kernels(SMALL, "cpu").data["kernels"]
    assert {row["weight"] for row in rows} == set(kernels.WEIGHTS)
    assert {"cpu-int4", "dense"} <= {row["implementation"] for row in rows}
    for row in rows:
        assert row["error"] <= 1.25 and [timed["tokens"] for timed in row["times"]] == [1, 3]
        assert all(timed["speedup"] > 0 and timed["roofline"] is None for timed in row["times"])


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(kernels, "SECONDS", 1e-3)
    right = Dense.forward
    monkeypatch.setattr(Dense, "forward", lambda self, x: right(self, x) * 1.1)
    rows = bench_kernels(KernelBench((32, 128), (1,), group_size=64, only=("dense",)), "cpu").data["kernels"]
    assert rows and all(row["error"] > 1.25 and not row["times"] for row in rows)


@pytest.mark.parametrize(
    ("asked", "line"),
    [(KernelBench((32, 100), group_size=64), "do not divide"), (KernelBench(only=("nobody",)), "no implementation")],
)
def test_what_cannot_be_asked(asked, line):
    with pytest.raises(InputError, match=line):
        bench_kernels(asked, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu():
    rows = bench_kernels(KernelBench((256, 512), (1, 17)), "cuda").data["kernels"]
    assert {"triton-wna16", "triton-sparse24"} <= {row["implementation"] for row in rows}
    assert all(row["error"] <= 1.25 for row in rows)
