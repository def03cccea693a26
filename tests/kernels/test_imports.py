"""What decides about kernels is imported without Triton, which comes with the extra `gpu` alone."""

import subprocess
import sys

import pytest

MODULES = [f"compress.kernels.{family}.ops" for family in ("wna16", "w8a8", "sparse24", "codebook", "fragments")]


@pytest.mark.parametrize("modules", [MODULES, ["compress.kernels.dispatch", "compress.kernels.gpu"]])
def test_no_triton_is_loaded(modules):
    code = f"import sys, {', '.join(modules)}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
