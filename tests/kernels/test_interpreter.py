"""Triton kernels under TRITON_INTERPRET=1, which has to be set before Triton is imported: in a process of their own.

The cases are in `interpreted.py` of each family; `TRITON_INTERPRET=1 pytest <file>` runs one by itself. Only float16 and
int8: the interpreter gets bfloat16 arithmetic wrong without a word.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wna16", "w8a8", "sparse24", "codebook"])
def test_interpreted(family):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / family / "interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
