"""The guard of tests/kernels/conftest.py."""

import pytest
import torch

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from triton.runtime.interpreter import GridExecutor


def test_bfloat16_does_not_reach_the_interpreter():
    launch = GridExecutor(lambda x: None, ["x"], (1,))
    with pytest.raises(pytest.fail.Exception, match="silently wrong"):
        launch(torch.zeros(2, dtype=torch.bfloat16))
