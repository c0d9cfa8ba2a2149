"""How much memory is free: on a device, on the machine, and within the limits of the control groups of a container.

A process in a container sees the memory of the whole machine, and is killed at the limit of its control group. Limits
of the groups above count, too. Linux only, both versions of control groups: https://docs.kernel.org/admin-guide/
cgroup-v2.html and cgroup-v1/memory.html.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now, in bytes; what torch keeps for later counts, as it gives that back."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    machine = psutil.virtual_memory()
    return min([machine.available, *_rooms(Path("/proc/self/cgroup"), machine.total)])


def total_bytes(device: torch.device) -> int:
    """Memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total


class _Files(NamedTuple):
    """What one version of control groups calls its files, and the line of `memory.stat` with caches that can go."""

    limit: str
    usage: str
    reclaimable: str


_FILES = {
    "cgroup2": _Files("memory.max", "memory.current", "inactive_file"),
    "cgroup": _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _rooms(memberships: Path, total_bytes: int) -> Iterator[int]:
    """What the limits of the process's groups, and of the groups above, leave free, in bytes.

    `memberships` has a line `number:controllers:path` for each hierarchy that the process is in. Limits beyond the
    machine's `total_bytes` are none: version 1 writes a large number for that.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:  # another system
        return
    mounts = _mounts()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        if kind not in mounts:
            continue
        top = mounts[kind]
        group = top / path.lstrip("/")
        # In a container the path may be that of the host, of which only the container's own part is mounted.
        for each in (group, *group.parents):
            room = _room(each, _FILES[kind], total_bytes)
            if room is not None:
                yield room
            if each == top:
                break


@functools.cache
def _mounts() -> dict[str, Path]:
    """Where the hierarchies that limit memory are mounted, by their kind."""
    found = {}
    for each in psutil.disk_partitions(all=True):
        if each.fstype == "cgroup2" or (each.fstype == "cgroup" and "memory" in each.opts.split(",")):
            found.setdefault(each.fstype, Path(each.mountpoint))
    return found


def _room(group: Path, files: _Files, total_bytes: int) -> int | None:
    """What one group's limit leaves, `None` where it has none."""
    try:
        limit = (group / files.limit).read_text().strip()
        if limit == "max" or int(limit) >= total_bytes:
            return None
        used = int((group / files.usage).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not a group with a limit, or not for us to see
        return None
    return max(0, int(limit) - used + int(counts.get(files.reclaimable, 0)))
