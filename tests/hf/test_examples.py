"""The examples run as they are, on the real model."""

import subprocess
import sys
from pathlib import Path

import pytest
from real import checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {"save_and_load.py": 1}  # how many come before the model
EXPECTED = {
    "samples.py": "shared within a call",
    "chat.py": "of them computed",
    "system_prompt.py": "The capital of France",
    "tenants.py": "tenant-b: 0 of",
    "save_and_load.py": "tokens written",
    "train_and_sample.py": "step 2",
    "finetune_and_serve.py": "Marigold",
    "grpo.py": "prompt tokens were shared",
}

pytestmark = pytest.mark.real


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments, checkpoint()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("script", EXPECTED)
def test_example_runs(script, tmp_path):
    assert EXPECTED[script] in run(script, *[str(tmp_path / "prefixes")] * ARGUMENTS.get(script, 0))


def test_the_second_run_reads_what_the_first_has_written(tmp_path):
    first, second = (run("save_and_load.py", str(tmp_path)) for _ in range(2))
    assert "tokens read" not in first
    assert "tokens read" in second
    assert ", 1 of them computed" in second


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
