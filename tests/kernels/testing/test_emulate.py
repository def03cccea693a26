"""Triton kernels compiled for GPUs that are not there, and launched on CPU tensors."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.testing.aot import amd_resources, build_folder, compile_kernel
from compress.kernels.testing.emulate import emulated
from compress.kernels.testing.ptx import Trap
from compress.kernels.testing.sass import read_code

SPEC = importlib.util.spec_from_file_location("small_kernels", Path(__file__).with_name("small_kernels.py"))
small_kernels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small_kernels)


@pytest.fixture(scope="module", autouse=True)
def build(tmp_path_factory):
    with build_folder(tmp_path_factory.mktemp("build")):
        yield


def test_bfloat16_elementwise():
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, y = torch.arange(3).bfloat16(), torch.zeros(3, 128, dtype=torch.bfloat16)
    with emulated(80) as launches:
        small_kernels.scale_rows[(3,)](x, scale, y, 3, BLOCK=128)
    assert torch.equal(y, x[:3] * scale[:, None])
    assert (launches[0].kernel, launches[0].grid) == ("scale_rows", (3, 1, 1))
    assert launches[0].report.efficiency("x_ptr") == 1
    with emulated(80), pytest.raises(Trap, match="of y_ptr, which has 768"):
        small_kernels.scale_rows[(4,)](x, torch.ones(4).bfloat16(), y, 4, BLOCK=128)


@pytest.mark.parametrize("arch", [80, 90])
def test_matrix_product_with_asynchronous_copies(arch):
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).half()
    y = torch.zeros(16, 16)
    with emulated(arch) as launches:
        small_kernels.gram[(1,)](x, y, 128, BLOCK=16, num_warps=1)
    assert torch.allclose(y, x.float() @ x.float().T, rtol=1e-5, atol=1e-5)
    report = launches[0].report
    assert report.instructions["mma"] == 16
    assert report.fetched_bits("x_ptr") == 8 * x.nbytes


def test_the_driver_is_put_back():
    from triton.runtime import driver

    before = driver._active
    with emulated(80):
        assert driver.active.get_current_target().arch == 80
    assert driver._active is before


def config():
    signature = {"x_ptr": "*bf16", "y_ptr": "*fp32", "K": "i32"}
    return KernelConfig("gram", small_kernels.gram, signature, {"BLOCK": 16}, 1, 3, 32 * 16, aligned=("K",))


def test_ahead_of_time_for_nvidia(tmp_path):
    compiled = compile_kernel(config(), 80)
    found = read_code(compiled)
    assert "sm_80" in compiled.text
    assert found.matrix == "HMMA.16816.F32.BF16"
    assert (found.spills, found.wide_loads()) == (0, True)
    assert 0 < found.registers < 128
    assert compile_kernel(config(), 80).sass == compiled.sass


@pytest.mark.slow
def test_ahead_of_time_for_amd():
    found = amd_resources(compile_kernel(config(), "gfx942"))
    assert found["spills"] == 0
    assert found["registers"] > 0
