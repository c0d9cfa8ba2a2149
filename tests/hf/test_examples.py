"""The examples run as they are: on the real model where its words or size matter, else on a tiny one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from real import checkpoint, save_tiny_chat_model
from scripts import run_script

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
REAL = {
    "finetune_and_serve.py": "Marigold",
    "quickstart.py": "the same tokens: True",
    "small_memory.py": "markets: 11 of 395 tokens computed",
    "system_prompt.py": "The capital of France",
}
TINY = {
    "beams.py": "111 of 444 prompt tokens computed",
    "chat.py": "of them computed",
    "grpo.py": "prompt tokens were shared",
    "monitoring.py": "When? hit rate 99%",
    "samples.py": "shared within a call",
    "tenants.py": "tenant-b: 0 of",
}
ELSEWHERE = {"ray_serve.py", "save_and_load.py", "tensor_parallel.py"}  # which take more than one process; tested below

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny"))


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(REAL) | set(TINY) | ELSEWHERE


@pytest.mark.parametrize("script", REAL)
def test_example_runs(script, tmp_path):
    assert REAL[script] in run_script(EXAMPLES / script, checkpoint(), out=tmp_path / "out")


@pytest.mark.parametrize("script", TINY)
def test_example_runs_on_a_tiny_model(script, tiny, tmp_path):
    assert TINY[script] in run_script(EXAMPLES / script, tiny, out=tmp_path / "out")


def test_the_second_run_reads_what_the_first_has_written(tiny, tmp_path):
    script, saved = EXAMPLES / "save_and_load.py", str(tmp_path / "saved")
    first, second = (run_script(script, saved, tiny, out=tmp_path / "out") for _ in range(2))
    assert "tokens read" not in first
    assert "tokens read" in second
    assert "tokens written" in first
    assert ", 1 of them computed" in second


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


def test_equal_prefixes_meet_on_one_of_two_replicas(tiny):
    pytest.importorskip("ray.serve", reason="needs the extra `ray`, 235 MB: pip install -e '.[ray]'")
    lines = run_tiny([sys.executable], "ray_serve.py", tiny)
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


def test_the_heads_of_a_model_cut_among_two_processes(tiny):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = run_tiny(command, "tensor_parallel.py", tiny)
    counts = [int(line.split()[5]) for line in said if line.startswith("on each of 2 ranks:")]
    assert counts[0] == 0 < counts[1]


def run_tiny(command, script, model):
    """Lines printed by an example that starts processes of its own."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels' / 'torch-ext'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, str(EXAMPLES / script), model],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
