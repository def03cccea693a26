"""A kernel that is right, and the same with one thing wrong: the emulator has to tell them apart."""

import importlib.util
from pathlib import Path

import pytest
import torch

from compress.kernels.gemm.reference import excess_error
from compress.kernels.testing.ptx import Trap, launch

SPEC = importlib.util.spec_from_file_location("sparse_kernel", Path(__file__).with_name("sparse_kernel.py"))
sparse_kernel = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sparse_kernel)


def run(ptx, arguments):
    report = launch(ptx, (1, 1, 1), arguments, shared_bytes=1024, outputs={"y"})
    return arguments["y"], report


def ratio(ptx, arguments, exact):
    """Of the error to that of a float16 result."""
    return excess_error(run(ptx, arguments)[0], exact.half(), exact)


def test_the_kernel_is_right():
    arguments, exact = sparse_kernel.case()
    y, report = run(sparse_kernel.PTX, arguments)
    assert excess_error(y, exact.half(), exact) <= 1.25
    assert report.efficiency("w") == report.efficiency("x") == 1
    assert report.fetched_bits("w") == 8 * 2 * 2 * 32 * 4
    assert report.fetched_bits("e") == 8 * 2 * 32 * 4
    assert report.banks["st"].factor == report.banks["ld"].factor == 1


def test_each_output_depends_on_its_own_row_only():
    arguments, _ = sparse_kernel.case()
    before = run(sparse_kernel.PTX, arguments)[0].clone()
    arguments["w"][0, 1, 13] ^= 1  # a nibble of register 0: row 3 of the second warp
    changed = (run(sparse_kernel.PTX, arguments)[0] != before).any(1)
    assert changed.nonzero().flatten().tolist() == [16 + 3]


DATA = {
    "weights rotated one lane": lambda a: a["w"].copy_(a["w"].roll(1, -1)),
    "metadata of the k halves swapped": lambda a: a["e"].copy_(a["e"].view(-1, 2).flip(1).reshape(2, 32)),
    "metadata of the row halves swapped": lambda a: a["e"].copy_((a["e"] >> 16 & 0xFFFF) | (a["e"] << 16)),
}
TEXT = {
    "zero point 0 of odd nibbles": lambda ptx: ptx.replace("0xd480d480", "0xd400d400"),
    "zero point of even nibbles": lambda ptx: ptx.replace("0x64086408", "0x64076407"),
    "selector stuck": lambda ptx: ptx.replace("%e, 1;", "%e, 0;"),
    "nibbles of another place": lambda ptx: ptx.replace("0x00f000f0", "0x000f000f"),
}


@pytest.mark.parametrize("name", DATA)
def test_mutant_of_the_data(name):
    arguments, exact = sparse_kernel.case()
    DATA[name](arguments)
    assert ratio(sparse_kernel.PTX, arguments, exact) > 100


@pytest.mark.parametrize("name", TEXT)
def test_mutant_of_the_code(name):
    arguments, exact = sparse_kernel.case()
    mutant = TEXT[name](sparse_kernel.PTX)
    assert mutant != sparse_kernel.PTX
    assert ratio(mutant, arguments, exact) > 100


def test_missing_barrier():
    arguments, _ = sparse_kernel.case()
    mutant = sparse_kernel.PTX.replace("bar.sync 0;", "")
    with pytest.raises(Trap, match=r"race: thread 0 reads byte 512 of shared memory, which 32 wrote"):
        run(mutant, arguments)


def test_barrier_of_a_warp_is_not_enough_between_warps():
    arguments, _ = sparse_kernel.case()
    with pytest.raises(Trap, match="race"):
        run(sparse_kernel.PTX.replace("bar.sync 0;", "bar.warp.sync 0xffffffff;"), arguments)


def test_places_that_do_not_ascend():
    arguments, _ = sparse_kernel.case()
    arguments["e"][0, 0] = 0
    with pytest.raises(Trap, match="ascend"):
        run(sparse_kernel.PTX, arguments)


def test_a_read_beyond_the_end():
    arguments, _ = sparse_kernel.case()
    arguments["x"] = arguments["x"].flatten()[:-8].clone()
    with pytest.raises(Trap, match=r"2 threads access 16 bytes, the first at byte 1008 of x, which has 1008"):
        run(sparse_kernel.PTX, arguments)


def test_an_input_is_not_written():
    arguments, _ = sparse_kernel.case()
    with pytest.raises(Trap, match="no output"):
        launch(sparse_kernel.PTX, (1, 1, 1), arguments, shared_bytes=1024, outputs=set())
    assert torch.equal(arguments["y"], torch.zeros(32, 8))
