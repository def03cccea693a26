"""The emulator, an instruction at a time: programs of a few lines, with the result known otherwise."""

import pytest
import torch

from compress.kernels.testing.ptx import Program, Trap, UnsupportedPtx, launch

THREADS = 64
FRAME = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u32 k_param_2)
.reqntid {threads}
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %x, %y, %at, %rd<8>;
    ld.param.b64 %x, [k_param_0]; ld.param.b64 %y, [k_param_1]; ld.param.b32 %r31, [k_param_2];
    mov.u32 %r30, %tid.x; mov.u32 %r29, %ctaid.x; mad.lo.s32 %r28, %r29, {threads}, %r30;
    mad.wide.u32 %at, %r28, {size}, %y; mad.wide.u32 %rd7, %r28, {size}, %x;
    {body}
    ret;
}}
"""


def run(body, x, y=None, n=0, blocks=1, size=4, **options):
    y = torch.zeros(THREADS * blocks, dtype=torch.int32) if y is None else y
    text = FRAME.format(body=body, threads=THREADS, size=size)
    options = {"shared_bytes": 1024, "outputs": {"y"}} | options
    report = launch(text, (blocks, 1, 1), {"x": x, "y": y, "n": n}, **options)
    return y, report


def words(seed=0, count=THREADS):
    return torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def unary(instruction, x):
    return run(f"ld.global.b32 %r0, [%rd7]; {instruction} st.global.b32 [%at], %r1;", x)[0]


X = words()
HIGH, LOW = X >> 16, X & 0xFFFF


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r1, %r0, 7;", X + 7),
        ("sub.s32 %r1, %r0, -3;", X + 3),
        ("mul.lo.s32 %r1, %r0, 12345;", X * 12345),
        ("mul.hi.s32 %r1, %r0, 12345;", (X.long() * 12345 >> 32).int()),
        ("shr.s32 %r1, %r0, 5;", X >> 5),
        ("shr.s32 %r1, %r0, 40;", X >> 31),
        ("shr.u32 %r1, %r0, 16;", HIGH & 0xFFFF),
        ("shl.b32 %r1, %r0, 32;", torch.zeros_like(X)),
        ("bfe.u32 %r1, %r0, 4, 6;", X >> 4 & 63),
        ("bfe.s32 %r1, %r0, 4, 6;", (X >> 4 & 63) - 64 * (X >> 9 & 1)),
        ("bfi.b32 %r1, 5, %r0, 8, 4;", X & ~0xF00 | 0x500),
        ("lop3.b32 %r1, %r0, 0x000f000f, 0x64006400, 0xea;", X & 0x000F000F | 0x64006400),
        ("lop3.b32 %r1, %r0, 255, 0x0f0f0f0f, 0x96;", X ^ 255 ^ 0x0F0F0F0F),
        ("prmt.b32 %r1, %r0, 0, 0x4140;", X & 255 | (X >> 8 & 255) << 16),
        ("prmt.b32 %r1, %r0, 0, 0x1032;", HIGH & 0xFFFF | LOW << 16),
        ("shf.l.wrap.b32 %r1, %r0, %r0, 8;", X << 8 | X >> 24 & 255),
        ("div.s32 %r1, %r0, 7;", torch.div(X, 7, rounding_mode="trunc").int()),
        ("rem.s32 %r1, %r0, 7;", torch.fmod(X, 7)),
        ("min.u32 %r1, %r0, 5;", torch.where((X >= 0) & (X < 5), X, 5)),
        ("popc.b32 %r1, %r0;", torch.tensor([bin(v & 0xFFFFFFFF).count("1") for v in X.tolist()]).int()),
        ("setp.lt.s32 %p0, %r0, 0; selp.b32 %r1, 1, 2, %p0;", torch.where(X < 0, 1, 2).int()),
        ("setp.lt.u32 %p0, %r0, 9; selp.b32 %r1, 1, 2, %p0;", torch.where((X >= 0) & (X < 9), 1, 2).int()),
        ("mov.b32 {%h0, %h1}, %r0; mov.b32 %r1, {%h1, %h0};", HIGH & 0xFFFF | LOW << 16),
        ("mov.b32 {%h0, _}, %r0; cvt.s32.s16 %r1, %h0;", LOW.to(torch.int16).int()),
        ("cvt.s32.s8 %r1, %r0;", X.to(torch.int8).int()),
        ("shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;", X.view(2, 2, 16).flip(1).flatten()),
        ("{ .reg .b32 t; add.s32 t, %r0, 1; { .reg .b32 t; mov.b32 t, 9; } mov.b32 %r1, t; }", X + 1),
        ("mov.b32 %r1, 3; setp.gt.s32 %p0, %r30, 9; @%p0 mov.b32 %r1, %r0;", torch.where(torch.arange(64) > 9, X, 3)),
    ],
)
def test_integer_instructions(instruction, expected):
    assert torch.equal(unary(instruction, X), expected.to(torch.int32))


FLOATS = torch.randn(2 * THREADS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        ("add.{t}x2 %r1, %r0, %r0;", lambda x: x + x),
        ("mul.{t}x2 %r1, %r0, %r0;", lambda x: x * x),
        ("fma.rn.{t}x2 %r1, %r0, %r0, %r0;", lambda x: x * x + x),
        ("neg.{t}x2 %r1, %r0;", lambda x: -x),
    ],
)
def test_pairs_are_rounded_once(instruction, rule, dtype):
    x = FLOATS.to(dtype)
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    y = unary(instruction.format(t=name), x)
    assert torch.equal(y.view(dtype), rule(x.double()).to(dtype))


@pytest.mark.parametrize(
    ("conversion", "rule"),
    [
        ("cvt.rn.bf16x2.f32 %r1, %r0, %r0;", lambda x: x.bfloat16().view(torch.int16).int() * 65537),
        ("cvt.rni.s32.f32 %r1, %r0;", lambda x: x.round().int()),
        ("cvt.rzi.s32.f32 %r1, %r0;", lambda x: x.int()),
        ("cvt.rn.f16.f32 %h0, %r0; cvt.f32.f16 %r1, %h0;", lambda x: x.half().float().view(torch.int32)),
    ],
)
def test_conversions(conversion, rule):
    x = FLOATS[:THREADS].abs() * 100
    assert torch.equal(unary(conversion, x), rule(x))


def test_a_loop_and_a_uniform_branch():
    body = "mov.b32 %r1, 0; $L: add.s32 %r1, %r1, 3; setp.lt.s32 %p0, %r1, %r31; @%p0 bra $L; st.global.b32 [%at], %r1;"
    y, report = run(body, X, n=10)
    assert y.unique().tolist() == [12]
    assert report.instructions["setp"] == 4


TRAPS = {
    "some of the threads": "setp.lt.s32 %p0, %r30, 5; @%p0 bra $L; $L: mov.b32 %r1, 0;",
    "out of bounds": "ld.global.b32 %r1, [%rd7 + 256];",
    "misaligned": "ld.global.b32 %r1, [%rd7 + 2];",
    "which is no output": "st.global.b32 [%rd7], %r30;",
    "before it is written": "@%p5 mov.b32 %r1, 0;",
    "still running": "$L: bra $L;",
    "shared memory has 1024 bytes": "ld.shared.b32 %r1, [%r31 + 1024];",
    "different values": "st.shared.b32 [%r31], %r30;",
    "which an asynchronous|not filled": """
        shl.b32 %r0, %r30, 2; mov.b32 %r2, global_smem; add.s32 %r2, %r2, %r0;
        cp.async.ca.shared.global [%r2], [%rd7], 4; cp.async.commit_group; bar.sync 0; ld.shared.b32 %r1, [%r2];""",
    "race: thread 33 writes": """
        shl.b32 %r0, %r30, 2; ld.shared.b32 %r1, [%r0]; xor.b32 %r0, %r0, 128; setp.eq.s32 %p0, %r30, 33;
        @%p0 st.shared.b32 [%r0], %r1;""",
    "not all threads reach": "setp.eq.s32 %p0, %r30, 33; @%p0 bar.sync 0;",
}


@pytest.mark.parametrize("message", TRAPS)
def test_traps(message):
    with pytest.raises(Trap, match=message):
        run(TRAPS[message], X, most_steps=1000)


@pytest.mark.parametrize(
    "text",
    [
        "frob.b32 %r1, %r0;",
        "ld.local.b32 %r1, [%rd7];",
        "add.rz.f32 %r1, %r0, %r0;",
        "wgmma.fence.sync.aligned;",
        "mov.b32 %r1, elsewhere;",
        "call.uni f;",
    ],
)
def test_unknown_text_is_refused(text):
    with pytest.raises(UnsupportedPtx, match="in `"):
        run(text, X)


def test_two_blocks_may_not_store_to_one_place_but_may_add_to_it():
    with pytest.raises(Trap, match="two CTAs"):
        run("st.global.b32 [%y], 1;", X, blocks=2)
    y, _ = run("red.global.gpu.relaxed.add.u32 [%y], 1;", X, blocks=3)
    assert y[0] == 3 * THREADS


@pytest.mark.parametrize(
    ("instruction", "old", "last"),
    [
        ("atom.global.add.u32 %r1, [%y], 2;", range(0, 128, 2), 128),
        ("atom.global.exch.b32 %r1, [%y], %r30;", [0, *range(63)], 63),
        ("atom.global.cas.b32 %r1, [%y], 0, 5;", [0] + [5] * 63, 5),
        ("mov.b32 %r1, 0; red.global.max.s32 [%y], %r30;", [0] * 64, 63),
        ("mov.b32 %r1, 0; red.global.add.v2.f32 [%y], {0f3F800000, 0f3F800000};", [0] * 64, 0x42800000),
    ],
)
def test_atomics_one_thread_after_another(instruction, old, last):
    y = torch.zeros(66, dtype=torch.int32)
    run(f"{instruction} st.global.b32 [%at + 8], %r1;", X, y)
    assert y[2:].tolist() == list(old)
    assert y[0] == last


def test_asynchronous_copies_arrive_when_they_are_waited_for():
    body = """
        shl.b32 %r0, %r30, 2; mov.b32 %r2, global_smem; add.s32 %r2, %r2, %r0;
        cp.async.ca.shared.global [%r2], [%rd7], 4; cp.async.commit_group; cp.async.commit_group;
        cp.async.wait_group 1; bar.sync 0; xor.b32 %r2, %r2, 128; ld.shared.b32 %r1, [%r2]; st.global.b32 [%at], %r1;"""
    y, report = run(body, X)
    assert torch.equal(y, X.view(2, 32).flip(0).flatten())
    assert report.efficiency("x") == 1


@pytest.mark.parametrize("stride", [1, 2, 8, 32])
def test_sectors_and_banks(stride):
    """32 lanes that read words `stride` apart: as many sectors and rounds as that takes."""
    body = f"""
        and.b32 %r0, %r30, 31; mul.lo.s32 %r0, %r0, {4 * stride}; mad.wide.u32 %rd0, %r0, 1, %x;
        ld.global.b32 %r1, [%rd0]; ld.shared.b32 %r1, [%r0];"""
    _, report = run(body, words(count=32 * 32), shared_bytes=4096)
    assert report.traffic["x", "ld"].sectors == 2 * min(4 * stride, 32)
    assert report.banks["ld"].factor == stride


def registers(count, at):
    return "{" + ", ".join(f"%r{i}" for i in range(at, at + count)) + "}"


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "f16"), (torch.bfloat16, "bf16"), (torch.int8, "s8")])
def test_dense_matrices(dtype, name):
    """x has A [16, k] and B [8, k], y = A Bᵀ [16, 8]: each lane fetches and stores what the ISA gives it."""
    k, out = (32, "s32") if name == "s8" else (16, "f32")
    whole = torch.randint(-128, 128, (24, k), generator=torch.Generator().manual_seed(7)).to(dtype)
    row = k * whole.element_size()  # 32 bytes, of which a lane has 4 in each half
    half = 8 * row
    loads = [
        f"ld.global.b32 %r{r}, [%rd0 + {(r & 1) * half + (r >> 1) * 16}]; ld.global.b32 %r{4 + (r >> 1)}, [%rd0 + {2 * half + (r >> 1) * 16}];"
        for r in range(4)
    ]
    sat = "satfinite." if out == "s32" else ""
    body = f"""
        and.b32 %r20, %r30, 31; shr.u32 %r21, %r20, 2; and.b32 %r22, %r20, 3;
        mad.wide.u32 %rd0, %r21, {row}, %x; mad.wide.u32 %rd0, %r22, 4, %rd0;
        {" ".join(loads)}
        mov.b32 %r8, 0; mov.b32 %r9, 0; mov.b32 %r10, 0; mov.b32 %r11, 0;
        mma.sync.aligned.m16n8k{k}.row.col.{sat}{out}.{name}.{name}.{out} {registers(4, 8)}, {registers(4, 0)}, {registers(2, 4)}, {registers(4, 8)};
        mad.wide.u32 %rd1, %r21, 32, %y; mad.wide.u32 %rd1, %r22, 8, %rd1;
        st.global.v2.b32 [%rd1], {registers(2, 8)}; st.global.v2.b32 [%rd1 + 256], {registers(2, 10)};"""
    y = torch.zeros(16, 8, dtype=torch.int32 if out == "s32" else torch.float32)
    run(body, whole, y)
    assert torch.equal(y.double(), whole[:16].double() @ whole[16:].double().T)


def test_ldmatrix_and_its_inverse():
    """Rows through ldmatrix.trans and stmatrix.trans come back; without the second they are transposed."""
    x = torch.arange(64, dtype=torch.int16)
    y = torch.zeros(128, dtype=torch.int16)
    body = """
        ld.global.b32 %r1, [%x]; and.b32 %r0, %r30, 31; setp.lt.s32 %p0, %r30, 8; shl.b32 %r2, %r0, 4;
        mad.wide.u32 %rd0, %r30, 16, %x; @%p0 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0];
        @%p0 st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
        bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r2];
        setp.lt.s32 %p1, %r30, 32; shl.b32 %r9, %r0, 2; cvt.u64.u32 %rd1, %r9; add.s64 %rd1, %rd1, %y;
        @%p1 st.global.b32 [%rd1], %r3;
        bar.sync 0; stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r2], {%r3}; bar.sync 0;
        @%p1 ld.shared.b32 %r8, [%r9]; @%p1 st.global.b32 [%rd1 + 128], %r8;"""
    run(body, x, y)
    assert torch.equal(y[:64].view(8, 8), x.view(8, 8).T)
    assert torch.equal(y[64:], x)


def test_a_module_without_threads_is_refused():
    with pytest.raises(UnsupportedPtx, match="reqntid"):
        Program.parse(".visible .entry k(.param .u64 a)\n{ ret; }")


@pytest.mark.parametrize(("dtype", "tile"), [(torch.float16, 0), (torch.float16, 1), (torch.int8, 0)])
def test_sparse_matrices_are_packed_as_torch_packs_them(dtype, tile):
    """Metadata as torch writes it for CUTLASS: word `lane` is that lane's, and tiles of 16 rows share it by selector."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    rows, k, name, out = (16, 64, "s8", "s32") if dtype == torch.int8 else (32, 32, "f16", "f32")
    generator = torch.Generator().manual_seed(11)
    order = torch.rand(rows, k // 4, 4, generator=generator).argsort(-1).argsort(-1)
    dense = torch.randint(1, 100, (rows, k), generator=generator) * (order < 2).flatten(1)
    right = torch.randint(-99, 100, (8, k), generator=generator).to(dtype)
    values, metadata = sparse_semi_structured_from_dense_cutlass(dense.to(dtype))
    parts = [values[16 * tile : 16 * tile + 16], metadata, right]
    x = torch.cat([part.contiguous().flatten().view(torch.int32) for part in parts])
    a = [f"ld.global.b32 %r{r}, [%rd0 + {256 * (r & 1) + 16 * (r >> 1)}];" for r in range(4)]
    b = [f"ld.global.b32 %r{4 + i}, [%rd1 + {640 + 16 * i}];" for i in range(4)]
    satfinite = "satfinite." if out == "s32" else ""
    body = f"""
        and.b32 %r20, %r30, 31; shr.u32 %r21, %r20, 2; and.b32 %r22, %r20, 3;
        mad.wide.u32 %rd0, %r22, 4, %x; mad.wide.u32 %rd1, %r21, 64, %rd0; mad.wide.u32 %rd0, %r21, 32, %rd0;
        {" ".join(a + b)} mad.wide.u32 %rd2, %r20, 4, %x; ld.global.b32 %r12, [%rd2 + 512];
        mov.b32 %r8, 0; mov.b32 %r9, 0; mov.b32 %r10, 0; mov.b32 %r11, 0;
        mma.sp::ordered_metadata.sync.aligned.m16n8k{k}.row.col.{satfinite}{out}.{name}.{name}.{out}
            {registers(4, 8)}, {registers(4, 0)}, {registers(4, 4)}, {registers(4, 8)}, %r12, {tile};
        mad.wide.u32 %rd1, %r21, 32, %y; mad.wide.u32 %rd1, %r22, 8, %rd1;
        st.global.v2.b32 [%rd1], {registers(2, 8)}; st.global.v2.b32 [%rd1 + 256], {registers(2, 10)};"""
    y = torch.zeros(16, 8, dtype=torch.int32 if out == "s32" else torch.float32)
    run(body, x, y)
    assert torch.equal(y.double(), dense[16 * tile : 16 * tile + 16].double() @ right.double().T)
