"""The examples run as they are, on the real model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from real import checkpoint, save_tiny_chat_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EXPECTED = {
    "beams.py": "111 of 444 prompt tokens computed",
    "chat.py": "of them computed",
    "monitoring.py": "When? hit rate 99%",
    "quickstart.py": "the same tokens: True",
    "samples.py": "shared within a call",
    "small_memory.py": "markets: 11 of 395 tokens computed",
    "system_prompt.py": "The capital of France",
    "tenants.py": "tenant-b: 0 of",
    "finetune_and_serve.py": "Marigold",
    "grpo.py": "prompt tokens were shared",
}
ELSEWHERE = {"ray_serve.py", "save_and_load.py", "tensor_parallel.py"}  # which take more than one process; tested below

pytestmark = pytest.mark.real


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments, checkpoint()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests run beside it
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED) | ELSEWHERE


@pytest.mark.parametrize("script", EXPECTED)
def test_example_runs(script):
    assert EXPECTED[script] in run(script)


def test_the_second_run_reads_what_the_first_has_written(tmp_path):
    first, second = (run("save_and_load.py", str(tmp_path)) for _ in range(2))
    assert "tokens read" not in first
    assert "tokens read" in second
    assert "tokens written" in first
    assert ", 1 of them computed" in second


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


def test_equal_prefixes_meet_on_one_of_two_replicas(tmp_path):
    pytest.importorskip("ray.serve", reason="needs the extra `ray`, 235 MB: pip install -e '.[ray]'")
    lines = run_tiny([sys.executable], "ray_serve.py", tmp_path)
    places = [re.fullmatch(r"(You answer .*) On (\w+), (\d+) tokens reused there so far", line) for line in lines]
    homes = {}
    for who, replica, _ in (place.groups() for place in places):
        homes.setdefault(who, set()).add(replica)
    assert len(places) == 2 * len(homes) == 24
    assert all(len(replicas) == 1 for replicas in homes.values())
    assert len(set.union(*homes.values())) == 2
    for replica in set.union(*homes.values()):
        reused = [int(place[3]) for place in places if place[2] == replica]
        assert reused[-1] >= len(reused) // 2 * 8  # the second turn of each chat finds more than its first message


def test_the_heads_of_a_model_cut_among_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = run_tiny(command, "tensor_parallel.py", tmp_path)
    counts = [int(line.split()[5]) for line in said if line.startswith("on each of 2 ranks:")]
    assert counts[0] == 0 < counts[1]


def run_tiny(command, script, folder):
    """Lines printed by an example on a tiny model."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels' / 'torch-ext'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, str(EXAMPLES / script), save_tiny_chat_model(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
