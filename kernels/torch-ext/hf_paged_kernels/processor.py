"""Who has made the CPU: libraries are not equally fast on all."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

AMD = "AuthenticAMD"
_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def vendor() -> str:
    """As an x86-64 names its vendor; anything else elsewhere."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux; Windows says it last
        return (platform.processor().split() or [""])[-1]
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
