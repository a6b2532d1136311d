"""What is translated, and that anything else is an error."""

from __future__ import annotations

import pytest

from ptx.translate import Unknown, parse

KERNEL = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 table[];

.visible .entry kernel(
	.param .u32 kernel_param_0,
	.param .align 8 .b8 kernel_param_1[24]
)
.maxntid 256, 1, 1
.minnctapersm 3
{
	.reg .pred 	%p<2>;
	.reg .f32 	%f<5>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<3>;
	.shared .align 4 .b8 newest[20];
	ld.param.u32 	%r1, [kernel_param_0];  // a comment
	ld.param.u64 	%rd1, [kernel_param_1+8];
	cvta.param.u64 	%rd2, %rd1;
	ld.u32 	%r3, [%rd2+4];
	setp.gt.s32 	%p1, %r1, -2;
	@!%p1 bra 	$L__BB0_2;
	mov.u32 	%r2, table;
	st.shared.v2.f32 	[%r2+-8], {%f1, %f2};
$L__BB0_2:
	bar.warp.sync 	-1;
	bar.sync 	0;
	ret;
}
"""


def test_a_kernel():
    (kernel,) = parse(KERNEL)
    assert (kernel.name, kernel.most_threads) == ("kernel", 256)
    assert kernel.parameters == [0, 8, 32]
    assert kernel.static_shared == kernel.symbols["table"] == 32
    assert [line for line in kernel.lines if not line.startswith("covered")] == [
        "{ auto* at = param<4, kLd>(self, as<u64>(b64(0)) + u64(0ull)); "
        "set(_r1, read<u32>(at + 0)); }",
        "{ auto* at = param<8, kLd>(self, as<u64>(b64(8)) + u64(8ull)); "
        "set(_rd1, read<u64>(at + 0)); }",
        "set(_rd2, cvta_param<u64>(as<u64>(_rd1)));",
        "{ auto* at = generic<4, kLd>(self, as<u64>(_rd2) + u64(4ull)); "
        "set(_r3, read<u32>(at + 0)); }",
        "set(_p1, setp_gt<s32>(as<s32>(_r1), as<s32>(b64(18446744073709551614ull))));",
        "if (!_p1) { goto L__BB0_2; }",
        "set(_r2, mov<u32>(as<u32>(b64(32))));",
        "{ auto* at = shared<8, kSt>(self, as<u32>(_r2) + u32(18446744073709551608ull)); "
        "write(at + 0, as<f32>(_f1)); write(at + 4, as<f32>(_f2)); }",
        "L__BB0_2:;",
        "warp_barrier(self);",
        "barrier(self);",
        "return;",
    ]
    assert kernel.pieces == 3


@pytest.mark.parametrize(
    "wrong",
    [
        "shfl.sync.down.b32 %r1, %r2, 1, 31, -1;",
        "add.f32 %f1, %f2, %f3;",  # without its rounding the hardware may fuse it
        "fma.rn.ftz.f32 %f1, %f2, %f3, %f4;",
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, elsewhere;",
        "mov.u32 %r1, %laneid;",
        "mov.u32 %r1, %tid.y;",
        "ld.global.nc.u32 %r1, [%rd1];",
        "ld.global.v2.u32 %r1, [%rd1];",
        "st.u32 [%rd1], %r1;",
        "st.param.u32 [%rd1], %r1;",
        "cvta.shared.u64 %rd2, %rd1;",
        "ld.global.u32 %r1, [%rd1+%rd2];",
        "bar.sync 1;",
        "bar.warp.sync 1;",
        "cvt.rz.f32.s32 %f1, %r1;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p1;",
        "{ .reg .b32 t; }",
        ".reg .b32 t;",
        ".local .align 4 .b8 stack[16];",
        "ret",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(Unknown):
        parse(KERNEL.replace("ret;", f"{wrong}\n\tret;"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (".maxntid 256, 1, 1", ".maxntid 16, 16, 1"),
        (".minnctapersm 3", ".reqntid 256"),
        (".param .u32 kernel_param_0", ".param .u32 kernel_param_0[2]"),
        (".visible .entry", ".func"),
        (".extern .shared .align 16 .b8 table[];", ".global .u32 table;"),
    ],
)
def test_what_is_not_known_outside_of_a_kernel_is_an_error(right, wrong):
    assert right in KERNEL
    with pytest.raises(Unknown):
        parse(KERNEL.replace(right, wrong))
