from collections import Counter

import pytest

from compress.kernels.testing.aot import Compiled
from compress.kernels.testing.sass import GPUS, read_code

USAGE = " Function k:\n  REG:71 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:424"
SASS = """
        .section .text.k
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/              @!P1 LDG.E.128 R4, [R2.64] ;
        /*0030*/                   LOP3.LUT R2, R2, 0x90, RZ, 0xc0, !PT ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/              @!UP0 I2F.F16 R3, R2 ;
        /*0070*/                   @P0 BRA `(.L_x_1) ;
        /*0080*/                   {last} R1, R3 ;
        /*0090*/                   EXIT ;
"""
PTX = """
.visible .entry k(.param .u64 k_param_0)
.reqntid 128
{ .reg .pred %p<1>; .reg .b32 %r<9>;
  $L: mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0,%r1,%r2,%r3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r0,%r1,%r2,%r3};
  @%p0 bra $L; ret; }
"""


def code(last="STG.E", stack=0):
    sass = SASS.replace("{last}", last)
    return read_code(Compiled("k", 80, PTX, b"", 1024, 4, USAGE.format(stack=stack), sass))


def test_the_main_loop_is_the_one_with_matrix_instructions():
    found = code()
    assert found.loop == Counter({"LDG.E.128": 1, "LOP3.LUT": 1, "HMMA.16816.F32": 2, "I2F.F16": 1, "BRA": 1})
    assert found.total["EXIT"] == found.total["S2R"] == 1
    assert (found.registers, found.matrix, found.conversions) == (71, "HMMA.16816.F32", 1)
    assert found.wide_loads()


def test_instructions_per_weight_are_of_the_kernels_own_loop():
    """Two matrix instructions where the PTX has one: the assembler has unrolled the loop."""
    found = code()
    assert found.unrolled == 2
    assert found.per_weight(64) == 6 * 128 / (64 * 2)


@pytest.mark.parametrize(("last", "stack", "spills"), [("STG.E", 0, 0), ("STL", 0, 1), ("LDL.64", 8, 9)])
def test_spills(last, stack, spills):
    assert code(last, stack).spills == spills


def test_budgets_are_those_of_the_data_sheets():
    """A100 and H100 at 4.125 bits: 4.9 and 4.8 instructions a weight."""
    assert round(GPUS[80].budget(4.125), 1) == 4.9
    assert round(GPUS[90].budget(4.125), 1) == 4.8
