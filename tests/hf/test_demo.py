"""`hf-paged demo`: the table says what happened, and the exit code whether tokens were the same."""

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

    monkeypatch.setattr(demo, "_equal", lambda *_: False)
    assert main(["demo", folder, "--length", "32", "--new", "2", "--dtype", "float32"]) == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--length", "8"], ["--length", "10000000"], ["--new", "0"]])
def test_bad_arguments(folder, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["demo", folder, *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
