"""A W4 + 2:4 product for 8 tokens, written in PTX: two warps, 16 outputs each, 64 inputs in two steps.

Values are dequantized as the kernels do it (0x6400 is 1024 in float16, 0xd480 is -72), and outputs go through shared
memory so that each warp stores what the other one computed: without the barrier that is a race.
"""

import torch

OUT, IN, TOKENS = 32, 64, 8
STEP = """
    ld.global.b32 %w, [%wa + {at}];
    ld.global.v4.b32 {{%b0, %b1, %b2, %b3}}, [%xa + {xat}];
    {{
        .reg .b32 t;
        lop3.b32 %a0, %w, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 %a1, %w, 0x00f000f0, 0x64006400, 0xea;
        shr.u32 t, %w, 8;
        lop3.b32 %a2, t, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 %a3, t, 0x00f000f0, 0x64006400, 0xea;
    }}
    sub.f16x2 %a0, %a0, %c0; fma.rn.f16x2 %a1, %a1, %c1, %c2;
    sub.f16x2 %a2, %a2, %c0; fma.rn.f16x2 %a3, %a3, %c1, %c2;
    mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32
        {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1, %b2, %b3}}, {{%d0, %d1, %d2, %d3}}, %e, {selector};
"""
PTX = (
    """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry sparse(.param .u64 sparse_param_0, .param .u64 sparse_param_1, .param .u64 sparse_param_2,
    .param .u64 sparse_param_3)
.reqntid 64
{
    .reg .b32 %a<4>, %b<4>, %c<3>, %d<4>, %e, %w, %tid, %lane, %r<6>;
    .reg .b64 %wa, %ea, %xa, %ya, %o;
    ld.param.b64 %xa, [sparse_param_0]; ld.param.b64 %wa, [sparse_param_1];
    ld.param.b64 %ea, [sparse_param_2]; ld.param.b64 %ya, [sparse_param_3];
    mov.u32 %tid, %tid.x; and.b32 %lane, %tid, 31;
    mad.wide.u32 %wa, %tid, 4, %wa; mad.wide.u32 %ea, %tid, 4, %ea; mad.wide.u32 %xa, %lane, 16, %xa;
    mov.b32 %c0, 0x64086408; mov.b32 %c1, 0x2c002c00; mov.b32 %c2, 0xd480d480;
    mov.b32 %d0, 0; mov.b32 %d1, 0; mov.b32 %d2, 0; mov.b32 %d3, 0;
    ld.global.b32 %e, [%ea];
"""
    + STEP.format(at=0, xat=0, selector=0)
    + STEP.format(at=256, xat=512, selector=1)
    + """
    shr.u32 %r0, %tid, 5; shl.b32 %r0, %r0, 9;             // 512 bytes a warp
    shl.b32 %r1, %lane, 3; add.s32 %r0, %r0, %r1;           // row g, columns 2t and 2t + 1
    mov.b32 %r2, global_smem; add.s32 %r2, %r2, %r0;
    st.shared.v2.b32 [%r2], {%d0, %d1}; st.shared.v2.b32 [%r2 + 256], {%d2, %d3};
    bar.sync 0;
    xor.b32 %r3, %tid, 32; shl.b32 %r3, %r3, 4;
    ld.shared.v4.b32 {%d0, %d1, %d2, %d3}, [%r3];
    cvt.u64.u32 %o, %r3; add.s64 %ya, %ya, %o;
    st.global.v4.b32 [%ya], {%d0, %d1, %d2, %d3};
    ret;
}
"""
)


def case(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Arguments of the kernel, and the exact outputs [OUT, TOKENS] of float16 weights."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (OUT, IN // 4, 2), generator=generator)
    places = torch.rand(OUT, IN // 4, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values
    x = torch.randn(TOKENS, IN, generator=generator).half()
    dense = torch.zeros(OUT, IN // 4, 4).scatter_(-1, places, (codes - 8).float()).flatten(1)
    words, metadata = torch.zeros(2, 2, 32, dtype=torch.int64), torch.zeros(2, 32, dtype=torch.int64)
    for step in range(2):
        for warp, lane, r in ((w, n, r) for w in range(2) for n in range(32) for r in range(4)):
            (g, t), (half, k_half) = divmod(lane, 4), (r & 1, r >> 1)
            row, group = 16 * warp + g + 8 * half, 8 * step + 4 * k_half + t
            for c in range(2):
                words[step, warp, lane] |= codes[row, group, c] << 4 * (r + 4 * c)
            nibble = places[row, group, 0] | places[row, group, 1] << 2
            metadata[warp, 4 * g + 2 * step + k_half] |= nibble << 4 * t + 16 * half
    fragments = x.view(TOKENS, 2, 4, 4, 2).permute(1, 0, 3, 2, 4).contiguous()  # step, g, t, register, pair
    arguments = {"x": fragments, "w": _words(words), "e": _words(metadata), "y": torch.zeros(OUT, TOKENS)}
    return arguments, dense.double() @ x.double().T


def _words(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)
