"""Memory that a container may not take is not free, whatever the machine has."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from families import stock_model

from hf_paged import PagedMemoryError, free_memory, paged
from hf_paged.free_memory import free_bytes, total_bytes
from hf_paged.pool import FREE_MEMORY_SHARE

MIB = 2**20
CPU = torch.device("cpu")
UNLIMITED_1 = 2**63 - 4096


class ControlGroups:
    """The folders of both versions as the kernel shows them, and the groups that the process is in."""

    def __init__(self, folder: Path, monkeypatch):
        self.tops = {"cgroup": folder / "memory", "cgroup2": folder / "unified"}
        self.memberships = folder / "memberships"
        self.read = []
        mounts = [
            SimpleNamespace(fstype="cgroup", opts="rw,cpu", mountpoint=str(folder / "cpu")),
            SimpleNamespace(fstype="cgroup", opts="rw,memory", mountpoint=str(self.tops["cgroup"])),
            SimpleNamespace(fstype="cgroup2", opts="rw", mountpoint=str(self.tops["cgroup2"])),
        ]
        machine = SimpleNamespace(total=64_000 * MIB, available=32_000 * MIB)
        told = SimpleNamespace(virtual_memory=lambda: machine, disk_partitions=lambda all: mounts)
        monkeypatch.setattr(free_memory, "psutil", told)
        monkeypatch.setattr(free_memory, "Path", lambda path: self.memberships if "self" in path else Path(path))
        free_memory._mounts.cache_clear()

    def group(self, kind: str, path: str, limit: int | str, used: int, reclaimable: int = 0) -> None:
        group, files = self.tops[kind] / path, free_memory._FILES[kind]
        group.mkdir(parents=True, exist_ok=True)
        (group / files.limit).write_text(f"{limit}\n")
        (group / files.usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"cache 5\n{files.reclaimable} {reclaimable}\nactive_file 7\n")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    yield ControlGroups(tmp_path, monkeypatch)
    free_memory._mounts.cache_clear()


def test_the_limit_of_the_own_group(groups):
    groups.memberships.write_text("0::/app\n")
    groups.group("cgroup2", "app", 500 * MIB, 200 * MIB, reclaimable=50 * MIB)
    assert free_bytes(CPU) == 350 * MIB


def test_the_tightest_of_the_groups_above_counts(groups):
    groups.memberships.write_text("0::/pod/app\n")
    groups.group("cgroup2", "pod/app", "max", 200 * MIB)
    groups.group("cgroup2", "pod", 300 * MIB, 250 * MIB)
    groups.group("cgroup2", ".", 900 * MIB, 300 * MIB)
    assert free_bytes(CPU) == 50 * MIB


def test_version_1(groups):
    groups.memberships.write_text("4:memory:/app\n3:cpu,cpuacct:/elsewhere\n0::/\n")
    groups.group("cgroup", "app", 400 * MIB, 100 * MIB, reclaimable=MIB)
    groups.group("cgroup", ".", UNLIMITED_1, 5000 * MIB)
    assert free_bytes(CPU) == 301 * MIB


def test_a_path_of_the_host_that_the_container_does_not_see(groups):
    groups.memberships.write_text("4:memory:/docker/0123abcd\n")
    groups.group("cgroup", ".", 400 * MIB, 100 * MIB)
    assert free_bytes(CPU) == 300 * MIB


@pytest.mark.parametrize("limit", ["max", 64_000 * MIB, UNLIMITED_1, "nonsense"])
def test_no_limit(groups, limit):
    groups.memberships.write_text("0::/app\n")
    groups.group("cgroup2", "app", limit, 60_000 * MIB)
    assert free_bytes(CPU) == 32_000 * MIB


def test_more_used_than_allowed(groups):
    groups.memberships.write_text("0::/app\n")
    groups.group("cgroup2", "app", 100 * MIB, 120 * MIB)
    assert free_bytes(CPU) == 0


def test_no_control_groups(groups):
    assert free_bytes(CPU) == 32_000 * MIB


def test_this_machine():
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


def test_the_default_budget_keeps_to_it(groups, monkeypatch):
    monkeypatch.setattr("hf_paged.store.POISON", False)  # of which the process would write all
    groups.memberships.write_text("0::/app\n")
    groups.group("cgroup2", "app", 100 * MIB, 99 * MIB)
    model = stock_model("llama")
    row_bytes = 2 * 2 * 4 * model.config.num_hidden_layers * model.config.hidden_size
    with paged(model):
        with pytest.raises(PagedMemoryError, match="max_memory"):
            model.generate(torch.full((1, 4 * MIB // row_bytes), 5), max_new_tokens=2, do_sample=False)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
        assert 0 < model.paged.stats().bytes_reserved <= FREE_MEMORY_SHARE * MIB


def test_what_torch_keeps_on_a_gpu_is_free(monkeypatch):
    told = {"mem_get_info": (300 * MIB, 900 * MIB), "memory_reserved": 200 * MIB, "memory_allocated": 150 * MIB}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda", 0)) == 350 * MIB
    assert total_bytes(torch.device("cuda", 0)) == 900 * MIB
    assert total_bytes(CPU) == psutil.virtual_memory().total
