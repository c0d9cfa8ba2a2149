"""Who has made the CPU: libraries are not equally fast on all."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

AMD = "AuthenticAMD"
# Where products of matrices were measured without Intel's MKL, which torch takes for them: of attention (`make
# bench-prompts`: 1.1 to 3.6 times as fast) and of linear layers (`make bench-linear`: 1 to 3.9 times). On Intel's own
# CPUs that library is at its best.
_MEASURED = (AMD,)
_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def vendor() -> str:
    """As an x86-64 names its vendor; anything else elsewhere."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux; Windows says it last
        return (platform.processor().split() or [""])[-1]
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def beats_mkl() -> bool:
    """Whether products of matrices are faster without MKL on this CPU, as far as anybody has measured it."""
    return vendor() in _MEASURED
