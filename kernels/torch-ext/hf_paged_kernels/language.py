"""Device functions that behave the same compiled and under Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRETED: tl.constexpr):
    """`acc + a @ b`, exact in float32. The interpreter multiplies the bits of bfloat16 as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def loop_bound(n, INTERPRETED: tl.constexpr):
    """`n`, where a loop begins or ends. numpy 2.4 makes no int of the interpreter's numbers, arrays of one element."""
    if INTERPRETED:
        return n.handle.data.item()
    else:
        return n
