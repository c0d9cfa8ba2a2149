"""`hf-paged doctor` and `verify=True`: they say what is fast and why, and notice an answer that is not stock's."""

import copy
import threading
import time

import more_models
import pytest
import torch
from families import FAMILIES

from hf_paged import check as check_module
from hf_paged import patch_model
from hf_paged.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def broken_decode(monkeypatch):
    """Attention over blocks that is wrong once there are more tokens than the trial of a model looks at."""
    from hf_paged.backends import cpu

    honest = cpu.CPUBackend.attend_flat

    def attend_flat(self, query, store, plan, call):
        out = honest(self, query, store, plan, call)
        return out * 0.5 if plan.kv_len > 30 else out

    monkeypatch.setattr(cpu.CPUBackend, "attend_flat", attend_flat)


def rows(output):
    """The table's rows by question: way, error, allowed, verdict."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("question")) + 1
    table = lines[start : lines.index("", start)]
    return {line[: line.index("  ", 3)].strip(): line[line.index("  ", 3) :].split() for line in table}


def test_a_model_that_is_right(folder, capsys):
    assert main(["doctor", str(folder), "--length", "40"]) == 0
    output = capsys.readouterr().out
    found = rows(output)
    assert {name: (row[0], row[-1]) for name, row in found.items()} == {
        "prompts of unequal length": ("fast", "same"),
        "the same again": ("reused", "same"),
        "samples of one prompt": ("reused", "same"),
        "beams": ("reused", "same"),
        "a hole in the mask": ("reused", "same"),
        "with hidden states": ("padded", "same"),
    }
    assert all(float(row[1]) <= 1e-4 for row in found.values()), "float32 differs by more than rounding"
    assert "- argument output_hidden_states (with hidden states)" in output
    assert "All answers are those of stock." in output
    assert "cpu (" in output


def test_a_config_is_built_with_random_weights(folder, capsys):
    state = torch.get_rng_state()
    assert main(["doctor", str(folder / "config.json"), "--dtype", "bfloat16", "--length", "20"]) == 0
    assert "LlamaForCausalLM, bfloat16" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)


def test_why_a_model_is_not_fast(tmp_path, capsys):
    FAMILIES["bloom"].build().save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--length", "20"]) == 0
    output = capsys.readouterr().out
    assert {row[0] for row in rows(output).values()} == {"padded"}
    assert "- model takes no position ids (all)" in output


def test_an_answer_that_is_not_stocks(folder, capsys, broken_decode):
    assert main(["doctor", str(folder), "--length", "40", "--attention-backend", "cpu"]) == 1
    output = capsys.readouterr().out
    found = rows(output)
    assert found["prompts of unequal length"][-1] == "DIFFERS"
    assert found["with hidden states"][-1] == "same", "the padded path is not broken"
    assert "answers differ from stock's: prompts of unequal length" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all.json"], "argument MODEL: there is no file or folder"),
        (["{folder}", "--length", "3"], "argument --length: must be 16 or more, got 3"),
        (["{empty}"], "argument MODEL: the folder"),
        (["{weightless}"], "its weights cannot be loaded"),
    ],
)
def test_what_cannot_be_looked_at(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((folder / "config.json").read_text())
    places = {"folder": folder, "empty": tmp_path / "empty", "weightless": tmp_path / "weightless"}
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *[each.format(**places) for each in arguments]])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len([line for line in said.splitlines() if line.startswith("hf-paged")]) == 1


def save_config(name, folder):
    config = copy.deepcopy(more_models.build(name).config)
    config.architectures = [more_models.MODELS[name].class_name]
    config.save_pretrained(folder)


def test_a_model_that_takes_no_text_is_refused_by_name(tmp_path, capsys):
    save_config("whisper", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(tmp_path / "config.json")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "argument MODEL" in said
    assert "stock does not answer a prompt of token ids" in said
    assert "input_features" in said


def test_decode_steps_that_are_tried_first_are_seen_to_be_fast(tmp_path, capsys):
    save_config("bart", tmp_path)
    assert main(["doctor", str(tmp_path / "config.json")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["the", "same", "again", "fast"] in [row[:4] for row in rows]


# verify=True


def inputs():
    return {"input_ids": torch.tensor([[5, 9, 33, 7, 20]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def test_verify_asks_once_and_leaves_nothing_behind(monkeypatch):
    asked = []
    honest = check_module.check
    monkeypatch.setattr("hf_paged.verify.check", lambda model: asked.append(model) or honest(model))
    stock = FAMILIES["llama"].build()
    model = patch_model(FAMILIES["llama"].build(), verify=True)
    torch.manual_seed(4)
    expected = stock.generate(**inputs(), do_sample=True, max_new_tokens=5)
    torch.manual_seed(4)
    assert torch.equal(model.generate(**inputs(), do_sample=True, max_new_tokens=5), expected)
    model.generate(**inputs(), do_sample=False, max_new_tokens=5)
    assert asked == [model]
    assert model.paged.stats().prompt_tokens == 10, "the check's own prompts are not counted"
    assert model.paged.stats().blocks_in_use == 0


def test_verify_refuses_a_model_that_does_not_answer_as_stock(broken_decode):
    model = patch_model(FAMILIES["llama"].build(), verify=True)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=r"verify: .* prompts of unequal length: differs by"):
            model.generate(**inputs(), do_sample=False, max_new_tokens=5)
    assert model.paged.stats().blocks_in_use == 0


def test_verify_takes_a_model_that_is_right_on_the_padded_path():
    model = patch_model(FAMILIES["bloom"].build(), verify=True)
    expected = FAMILIES["bloom"].build().generate(**inputs(), do_sample=False, max_new_tokens=5)
    assert torch.equal(model.generate(**inputs(), do_sample=False, max_new_tokens=5), expected)


def test_verify_takes_no_kept_prefix_along(tmp_path):
    question = {"input_ids": torch.arange(3, 43)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    first = patch_model(FAMILIES["llama"].build(), block_size=8)
    expected = first.generate(**question, do_sample=False, max_new_tokens=5)
    first.paged.save(tmp_path)
    model = patch_model(FAMILIES["llama"].build(), block_size=8, verify=True)
    model.paged.load(tmp_path)
    assert torch.equal(model.generate(**question, do_sample=False, max_new_tokens=5), expected)
    assert model.paged.stats().reused_tokens == 39


def test_verify_keeps_other_threads_waiting(monkeypatch):
    begun, order, honest = threading.Event(), [], check_module.check

    def slow(model):
        begun.set()
        time.sleep(0.5)
        order.append("checked")
        return honest(model)

    monkeypatch.setattr("hf_paged.verify.check", slow)
    model = patch_model(FAMILIES["llama"].build(), verify=True)

    def answer():
        model.generate(**inputs(), do_sample=False, max_new_tokens=5)
        order.append("answered")

    threads = [threading.Thread(target=answer) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert order == ["checked", "answered", "answered"]


def test_verify_says_so_where_a_model_cannot_be_asked():
    model = patch_model(copy.deepcopy(more_models.build("whisper")), verify=True)
    features = torch.randn(1, 16, 128)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"verify: this model cannot be checked, leave verify out: .*input_f"):
            model.generate(input_features=features, max_new_tokens=3)
    patch_model(model, verify=False)
    model.generate(input_features=features, max_new_tokens=3)
