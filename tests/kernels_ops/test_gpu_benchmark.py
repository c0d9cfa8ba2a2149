"""The GPU benchmark, in sizes that the interpreter manages."""

import gc
import json
from itertools import islice

import pytest
import torch
from host import LateSide, as_gpu
from on_demand import HostDriver

from benchmarks import gpu, gpu_kernels, gpu_memory, gpu_offload, gpu_overflow, gpu_records
from hf_paged import arena
from hf_paged_kernels import FORMATS
from hf_paged_kernels.launch import triton_obstacle

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(triton_obstacle(CPU)), reason=str(triton_obstacle(CPU)))


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_parts_write_their_results(tmp_path):
    parts = ["bandwidth", "decode", "decode-records", "moves", "prefill", "tiles"]
    assert gpu.main(["--tiny", "--only", *parts, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert written["environment"]["interpreted"] is True
    results = written["results"]
    assert list(results) == parts
    assert all(part["rows"] and "failed" not in part for part in results.values())
    assert all("figure" in row for row in results["tiles"]["rows"])
    assert [row["kv"] for row in results["decode-records"]["rows"]] == ["bfloat16", *FORMATS]
    assert {row["kernel"] for row in results["moves"]["rows"]} == {"store", "copy"}


def test_memory_that_follows_the_calls_is_seen(monkeypatch):
    driver = HostDriver()
    monkeypatch.setattr(arena, "driver_for", lambda device: driver)
    monkeypatch.setattr(gpu_memory, "SLOTS", 2**17)
    monkeypatch.setattr(gpu_memory, "_used", lambda device: (gc.collect(), driver.backed_bytes)[1])
    rows = list(gpu_memory.memory(CPU, driver, (20, 3000, 20)))
    assert [row["passed"] for row in rows if "passed" in row] == [True] * 5
    held = [row["held_bytes"] for row in rows if "held_bytes" in row]
    assert held[0] == held[1] == held[2] > held[3] == 0
    assert list(gpu_memory.memory(CPU, None)) == [{"work": "driver", "passed": False}]


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    rows = list(islice(gpu_kernels.check(CPU, gpu_kernels.TINY), 6))
    assert [row["kernel"].split()[0] for row in rows] == ["attend"] * 4 + ["store", "copy"]
    assert all(row["passed"] for row in rows), rows
    monkeypatch.setattr(
        gpu_kernels, "attend", lambda query, keys, values, *_: torch.ones_like(query)[..., : values.shape[2]]
    )
    monkeypatch.setattr(gpu_kernels, "store_tokens", lambda *_: None)
    monkeypatch.setattr(gpu_kernels, "copy_slots", lambda *_: 1 / 0)
    assert not any(row["passed"] for row in islice(gpu_kernels.check(CPU, gpu_kernels.TINY), 6))


def test_a_wrong_record_fails_the_check(monkeypatch):
    """A row for attention and one for the store, for each format and dtype."""
    rows = list(gpu_records.check(CPU, gpu_kernels.TINY))
    assert len({(row["kernel"], row["dtype"]) for row in rows}) == len(rows) == 2 * 3 * len(FORMATS)
    assert all(row["passed"] for row in rows), rows
    monkeypatch.setattr(gpu_kernels, "attend", lambda query, keys, values, *_: torch.ones_like(query)[..., :16])
    monkeypatch.setattr(gpu_kernels, "store_tokens", lambda *_: None)
    assert not any(row["passed"] for row in islice(gpu_records.check(CPU, gpu_kernels.TINY), 6))


@pytest.mark.parametrize("make_side", [LateSide, lambda: None])
def test_the_host_tier_is_measured(make_side, monkeypatch):
    assert [row["work"] for row in gpu_offload.offload(CPU, gpu_offload.TINY)] == ["host tier"], "a CPU has none"
    as_gpu(monkeypatch, make_side)
    rows = list(gpu_offload.offload(CPU, gpu_offload.TINY))
    by_work = {row["work"].split(",")[0]: row for row in rows}
    assert by_work["promoted"]["passed"], rows
    assert by_work["demoted"]["bytes"] == by_work["promoted"]["bytes"] > 0
    paced, comes, comes_and_goes = rows[-3:]
    assert min(row["promoted_bytes"] for row in rows[-3:]) > 0 == comes["demoted_bytes"]
    assert min(row["demoted_bytes"] for row in (paced, comes_and_goes)) > 0
    for row in rows[-3:]:
        assert 0 < row["steps_beside_transfers"] <= row["steps"] == gpu_offload.TINY.new - 1


def test_steps_beside_transfers_are_those_that_overlap_one():
    steps = gpu_offload.Steps(longest=60)
    steps.stamps = [0.0, 1.0, 3.0, 6.0, 10.0]
    assert steps.seconds == [1, 2, 3, 4]
    assert steps.beside([]) == []
    assert steps.beside([(0.5, 0.7), (4.0, 5.0)]) == [1, 3]
    assert steps.beside([(1.0, 3.0)]) == [2], "whole"
    assert steps.beside([(2.0, 7.0)]) == [2, 3, 4]


def test_a_decoding_that_takes_too_long_ends():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert not gpu_offload.Steps(longest=60)(ids, None).any()
    assert gpu_offload.Steps(longest=-1)(ids, None).all()


def test_overflow_is_measured(monkeypatch):
    assert [row["work"] for row in gpu_overflow.overflow(CPU, gpu_overflow.TINY)] == ["overflow"], "a CPU has none"
    as_gpu(monkeypatch)
    *calls, whole, third = gpu_overflow.overflow(CPU, gpu_overflow.TINY)
    assert len(calls) == 5
    assert all(row["passed"] for row in calls), calls
    assert sum(bool(row["fallbacks"]) for row in calls) == 1, "stock-shaped passes say why they are"
    assert third["step_bytes"] > 0 == whole["step_bytes"]


def test_a_part_that_fails_keeps_what_it_has_found(capsys):
    def rows():
        yield {"passed": True}
        raise RuntimeError("out of memory")

    kept = []
    outcome = gpu.run("a part", rows, kept.append)
    assert kept == [{"rows": [{"passed": True}], "cut_off": True}], "were it cut off now"
    assert "cut_off" not in outcome
    assert outcome["rows"] == [{"passed": True}]
    assert outcome["failed"] == "RuntimeError: out of memory"
    assert gpu.has_failed(outcome)
    assert gpu.has_failed({"rows": [{"passed": False}]})
    assert not gpu.has_failed({"rows": [{"passed": True}, {"microseconds": 1.0}]})
