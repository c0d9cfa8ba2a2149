"""`hf-paged demo` and `bench`: tables say what happened, and the exit code whether tokens were the same."""

import json
import re

import pytest
from real import save_tiny_chat_model

from hf_paged.cli import main

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny"))


def test_the_demo(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["demo", folder, "--length", "64", "--new", "4", "--block-size", "8"]) == 0
    said = capsys.readouterr().out
    assert said.count(" same ") == 3
    # 8 samples share a prompt; 8 questions of 64 + 4 tokens share 64; calls of 64, 68, 72 and 76 tokens go on.
    counts = [tuple(int(n.replace(",", "")) for n in pair) for pair in re.findall(r"│ +(\d[\d,]*) → ([\d,]+) │", said)]
    assert counts == [(512, 64), (544, 64 + 8 * 4), (280, 76)]


def test_the_demo_tells_on_a_wrong_answer(folder, capsys, monkeypatch):
    from hf_paged.commands import demo

    monkeypatch.setattr(demo, "equal", lambda *_: False)
    assert main(["demo", folder, "--length", "32", "--new", "2", "--dtype", "float32"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_the_benchmark(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "measured.json"
    assert main(["bench", folder, "--length", "32", "--new", "2", "--runs", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count(" same ") == 3
    calls = json.loads(out.read_text())["calls"]
    assert [call["computed_tokens"] for call in calls] == [32, 32 + 8 * 2, 32 + 3 * 2]
    for call in calls:
        assert len(call["stock_seconds"]) == len(call["patched_seconds"]) == 2
        assert call["same_tokens"]
        assert call["patched_kv_bytes"] > 0
    assert calls[0]["patched_kv_bytes"] < calls[0]["stock_kv_bytes"]


def test_the_benchmark_tells_on_a_wrong_answer(folder, capsys, monkeypatch):
    from hf_paged.commands import bench

    monkeypatch.setattr(bench, "equal", lambda *_: False)
    assert main(["bench", folder, "--length", "32", "--new", "2", "--dtype", "float32", "--runs", "1"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_where_the_benchmark_is_to_write(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", folder, "--out", "/nowhere/measured.json"])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--length", "8"], ["--length", "10000000"], ["--new", "0"]])
def test_bad_arguments(folder, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["demo", folder, *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
