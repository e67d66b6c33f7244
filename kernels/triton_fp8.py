# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Quantisation to float8 e4m3 inside a kernel: the same bits as ``kernels.fp8``.

Legend: G groups of C = 128 elements.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
ONE_OVER_LARGEST = tl.constexpr(1 / 448)
SMALLEST_AMAX = tl.constexpr(1e-4)

if triton.knobs.runtime.interpret:

    @triton.jit
    def to_e4m3(y):
        """The bits, uint8, of float32 |y| <= 448 rounded to nearest, ties to even. By integer arithmetic: the
        interpreter's own cast goes wrong at carries and ties."""
        bits = y.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 the steps are 2**-9, as those of float32 are at 2**14.
        lifted = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
        small = lifted - 0x46800000
        code = tl.where(size < 0x3C800000, small, normal)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)

else:

    @triton.jit
    def to_e4m3(y):
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def quantise(x_GC):
    """e4m3 bits uint8 [G, C] and scales float32 [G]."""
    x_GC = x_GC.to(tl.float32)
    amax_G = tl.maximum(tl.max(tl.abs(x_GC), 1), SMALLEST_AMAX)
    factor_G = tl.div_rn(tl.full(amax_G.shape, LARGEST, tl.float32), amax_G)
    return to_e4m3(x_GC * factor_G[:, None]), amax_G * ONE_OVER_LARGEST
