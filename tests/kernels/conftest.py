import sys
from unittest.mock import patch

import pytest
import torch


def refuse_bfloat16(arguments):
    """Triton's interpreter adds and multiplies the bit patterns of bfloat16 values, and says nothing."""
    if any(isinstance(each, torch.Tensor) and each.dtype == torch.bfloat16 for each in arguments):
        pytest.fail("bfloat16 in Triton's interpreter is silently wrong: use compress.kernels.testing.emulate")


@pytest.fixture(autouse=True)
def _no_bfloat16_in_the_interpreter():
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    launch = interpreter.GridExecutor.__call__

    def guarded(self, *arguments, **named):
        refuse_bfloat16([*arguments, *named.values()])
        return launch(self, *arguments, **named)

    with patch.object(interpreter.GridExecutor, "__call__", guarded):
        yield
