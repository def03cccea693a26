"""The Triton rows of the registry, run by Triton's interpreter in a process of its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_weights import codebook_weight, int_weight, sparse_weight

from compress.kernels.dispatch import refusals
from compress.kernels.implementation import Case
from compress.kernels.inputs import InputQuantizer

WEIGHTS = {
    "triton-wna16": "int_weight((32, 128), 4, 64)",
    "triton-sparse24": "sparse_weight((32, 128), 4, 64)",
    "triton-codebook": "codebook_weight((32, 64))",
    "triton-w8a8": "int_weight((32, 128), 8, 128)",
}
PROGRAM = """
import torch
from packed_weights import codebook_weight, int_weight, sparse_weight
from compress.kernels.dispatch import Preferences
from compress.kernels.inference import CompressedLinear, LayerParts
from compress.kernels.inputs import InputQuantizer
for name, weight in {WEIGHTS}.items():
    inputs = InputQuantizer(8) if name == "triton-w8a8" else None
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).half()
    for kernel in (name, name + "-dequantize")[: 1 if inputs else 2]:
        parts = LayerParts(weight, torch.ones(32), inputs=inputs)
        y = CompressedLinear(parts, torch.float16, torch.device("cpu"), Preferences(forced=kernel))(x)
        seen = x.double() if inputs is None else inputs.fake(x.double())
        expected = seen @ weight.dequantize().double().T + 1
        print(kernel, float((y.double() - expected).norm() / expected.norm()))
"""


def test_without_a_gpu_they_say_so():
    for name, made in WEIGHTS.items():
        weight = eval_weight(made)
        inputs = InputQuantizer(8) if name == "triton-w8a8" else None
        reasons = refusals(Case(weight, torch.device("cpu"), torch.bfloat16, inputs))
        assert "GPU" in reasons[name] or "not installed" in reasons[name]


def eval_weight(made):
    name, _, arguments = made.removesuffix(")").partition("(")
    makers = {"int_weight": int_weight, "sparse_weight": sparse_weight, "codebook_weight": codebook_weight}
    return makers[name](*ast.literal_eval(f"({arguments},)"))


def test_through_the_interpreter():
    pytest.importorskip("triton")
    made = "{" + ", ".join(f"{name!r}: {weight}" for name, weight in WEIGHTS.items()) + "}"
    path = str(Path(__file__).parents[1] / "models")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    program = [sys.executable, "-c", PROGRAM.replace("{WEIGHTS}", made)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    errors = {name: float(error) for name, error in (line.split() for line in done.stdout.splitlines())}
    assert len(errors) == 7 and max(errors.values()) < 2e-3, (errors, done.stderr[-2000:])
