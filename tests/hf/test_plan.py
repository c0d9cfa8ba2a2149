"""`hf-paged plan`: what it prints, and what it says where an argument is wrong."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from compare import copy_of
from families import FAMILIES, stock_model
from host import as_gpu
from pair import piece
from prompts import batch

from hf_paged import PagedMemoryError, patch_model
from hf_paged.cli import main

LENGTH = 40


@pytest.fixture
def folder(tmp_path):
    """Writes the config of a family; returns where."""

    def write(name: str = "llama", **changes) -> str:
        config = {**stock_model(name).config.to_dict(), "architectures": [FAMILIES[name].class_name], **changes}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return write


def plan(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys, *arguments: str) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def row(output: str, name: str) -> list[str]:
    """The cells behind the first one of the line that begins with `name`."""
    (line,) = [line for line in output.splitlines() if line.strip().startswith(f"{name} ")]
    return [cell.strip() for cell in line.strip()[len(name) :].split("  ") if cell.strip()]


# What it prints


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3"])
def test_what_is_said_to_fit_fits(capsys, folder, name):
    budget = 120_000
    arguments = ["--max-memory", f"cpu={budget}", "--length", str(LENGTH), "--block-size", "8", "--dtype", "float32"]
    _, longest, count, _ = row(plan(capsys, folder(name), *arguments), "cpu")
    longest, count = int(longest.removesuffix(" tokens")), int(count)
    assert longest > LENGTH
    assert count > 1
    for rows, stored in ((1, longest), (count, LENGTH)):
        inputs = batch([piece(9, at) for at in range(rows + 1)])
        model = patch_model(copy_of(FAMILIES[name]), block_size=8, max_memory={"cpu": budget})
        fitting = {key: value[:rows] for key, value in inputs.items()}
        model.generate(**fitting, do_sample=False, max_new_tokens=stored - 8)  # the last one is not stored
        with pytest.raises(PagedMemoryError):
            model.generate(**inputs, do_sample=False, max_new_tokens=stored - 8)


@pytest.mark.parametrize(
    ("name", "device", "host"),
    [
        ("llama", 30_000, 70_000),
        ("deepseek_v3", 75_000, 90_000),
        ("gemma3", 32_000, 50_000),
        ("gemma2", 26_000, 50_000),
    ],
)
def test_what_is_said_to_fit_with_the_host_fits(capsys, folder, name, device, host, monkeypatch):
    as_gpu(monkeypatch)
    arguments = ["--length", str(LENGTH), "--block-size", "8", "--dtype", "float32"]
    output = plan(capsys, folder(name), "--max-memory", f"0={device},cpu={host}", *arguments)
    assert "- 0+cpu: sequences that fill the device go on" in output
    _, longest, count, on_stock = row(output, "0+cpu")
    longest, count = int(longest.removesuffix(" tokens")), int(count)
    assert on_stock == "-"
    alone, alone_count = row(output, "0")[1:3]
    assert longest > int(alone.removesuffix(" tokens"))
    assert count > int(alone_count)
    for rows, stored in ((1, longest), (count, LENGTH)):
        inputs = batch([piece(9, at) for at in range(rows + 1)])
        model = patch_model(copy_of(FAMILIES[name]), block_size=8, max_memory={0: device, "cpu": host})
        fitting = {key: value[:rows] for key, value in inputs.items()}
        model.generate(**fitting, do_sample=False, max_new_tokens=stored - 8)  # the last one is not stored
        assert model.paged.stats().fetched_bytes > 0
        beyond = (fitting, stored - 7) if stored == longest else (inputs, stored - 8)
        with pytest.raises(PagedMemoryError):
            model.generate(**beyond[0], do_sample=False, max_new_tokens=beyond[1])


@pytest.mark.parametrize("budget", ["0=1MiB", "0=1MiB,disk=1MiB", "cpu=1MiB,disk=1MiB", "0=1MiB,1=1MiB,cpu=1MiB"])
def test_nothing_runs_over_a_host_that_is_not_below_one_gpu(capsys, folder, budget):
    assert "+cpu" not in plan(capsys, folder("llama"), "--max-memory", budget)


def test_layers_with_windows_alone_have_no_use_for_a_host(capsys, folder):
    assert "+cpu" not in plan(capsys, folder("mistral_sliding"), "--max-memory", "0=1MiB,cpu=1MiB")


def test_states_of_a_hybrid_are_left_out(capsys, folder):
    output = plan(capsys, folder("lfm2"), "--max-memory", "cpu=1MiB", "--dtype", "float32")
    assert row(output, "a token in 1 layer of full attention") == ["256 B"]  # K and V, 2 heads of dim 16, float32
    assert "states are left out" in output


def test_costs_of_layers_and_sequences(capsys, folder):
    output = plan(capsys, folder("gemma3"), "--max-memory", "cpu=1MiB", "--length", "100", "--batch", "3")
    token = 2 * 2 * 16 * 4  # K and V, heads, dim, float32: of one layer
    assert row(output, "a token in 1 layer of full attention") == [f"{token} B"]
    assert row(output, "a token in 2 layers with a window of 8") == [f"{2 * token} B"]
    blocks, stock = token * (112 + 2 * 32), token * (100 + 2 * 8)  # 7 blocks of 16, and 2 that the window lies in
    assert row(output, "a sequence of 100 tokens") == [f"{blocks / 1024:.1f} KiB (stock: {stock / 1024:.1f} KiB)"]
    assert row(output, "3 of them") == [f"{3 * blocks / 1024:.1f} KiB (stock: {3 * stock / 1024:.1f} KiB)"]
    null = 16 * 3 * token
    assert row(output, "cpu")[2:] == [str((2**20 - null) // blocks), str(2**20 // stock), "yes"]
    weights = sum(each.numel() * 4 for each in stock_model("gemma3").parameters())
    assert row(output, "the weights, beside the budget") == [f"{weights / 1024:.1f} KiB"]


def test_batch_that_does_not_fit(capsys, folder):
    assert row(plan(capsys, folder(), "--max-memory", "cpu=1MiB", "--batch", "3000"), "cpu")[-1] == "no"


def test_window_layers_alone_carry_any_length(capsys, folder):
    assert row(plan(capsys, folder("mistral_sliding"), "--max-memory", "cpu=1MiB"), "cpu")[1] == "any length"


@pytest.mark.parametrize(
    "budget",
    [
        ["--max-memory", "0=1MiB,cpu=2MiB,disk=4194304"],
        ["--max-memory", '{"0": "1MiB", "cpu": "2MiB", "disk": 4194304}'],
        ["--max-memory", "disk=4MiB", "--max-memory", "cpu=2MiB, 0=1MiB"],
    ],
    ids=["pairs", "json", "several"],
)
def test_budgets_are_written_as_in_accelerate(capsys, folder, budget):
    output = plan(capsys, folder(), *budget, "--length", "16", "--block-size", "16")
    sequence = 16 * 2 * 2 * 2 * 16 * 4
    assert row(output, "0")[::2] == ["1.0 MiB", str(2**20 // sequence - 1)]
    assert row(output, "cpu (kept prefixes)") == ["2.0 MiB", "-", str(2**21 // sequence), "-"]
    assert row(output, "disk (kept prefixes)") == ["4.0 MiB", "-", str(2**22 // sequence), "-"]


def test_several_gpus_are_reckoned_alone(capsys, folder):
    output = plan(capsys, folder(), "--max-memory", "0=1MiB,1=1MiB")
    assert row(output, "0") == row(output, "1")
    assert "as if it held all layers" in output
    assert "as if it held all layers" not in plan(capsys, folder(), "--max-memory", "0=1MiB")


def test_dtypes(capsys, folder):
    def token(*arguments: str) -> str:
        return row(plan(capsys, *arguments, "--max-memory", "cpu=1MiB"), "a token in 2 layers of full attention")[0]

    assert token(folder(dtype="bfloat16")) == "256 B"
    assert token(folder(dtype="bfloat16"), "--dtype", "float32") == "512 B"
    assert "float32 is assumed" not in plan(capsys, folder(dtype="float32"), "--max-memory", "cpu=1MiB")
    assert "float32 is assumed" in plan(capsys, folder(dtype=None), "--max-memory", "cpu=1MiB")


def test_limits_of_the_model_are_told(capsys, folder):
    output = plan(capsys, folder("mpt"), "--max-memory", "cpu=1MiB")
    assert "pass use_cache=True" in output
    assert "made for 256 tokens" in plan(capsys, folder(), "--max-memory", "cpu=1MiB")
    assert "made for" not in plan(capsys, folder(), "--max-memory", "cpu=1MiB", "--length", "256")


def test_the_most_that_a_pool_keeps_is_told(capsys, folder):
    assert "tokens at most, whatever the budget" in plan(capsys, folder(), "--max-memory", "cpu=900GiB")
    assert "tokens at most, whatever the budget" not in plan(capsys, folder(), "--max-memory", "cpu=1MiB")


def test_the_most_that_a_pool_keeps_grows_with_its_blocks(capsys, folder, no_poison):
    for block_size, tokens in ((16, 2**22), (128, 2**25)):
        output = plan(capsys, folder(), "--max-memory", "cpu=90000GiB", "--block-size", str(block_size))
        assert f"a pool keeps {tokens:,} tokens at most" in output


def test_estimates_say_that_they_are(capsys, tmp_path):
    """A model whose experts look at numbers, so that it cannot be tried without weights."""
    config = transformers.JetMoeConfig(num_hidden_layers=2, architectures=["JetMoeForCausalLM"])
    config.save_pretrained(tmp_path)
    output = plan(capsys, str(tmp_path), "--max-memory", "cpu=1GiB", "--dtype", "bfloat16")
    size = 2 * 2 * config.num_key_value_heads * config.kv_channels * 2  # layers, K and V, heads, dim, bytes
    assert row(output, "a token in 2 layers of full attention") == [f"about {size / 1024:.1f} KiB"]
    assert "Estimated from fields of the config" in output
    output = plan(capsys, str(tmp_path), "--max-memory", "cpu=1GiB", "--kv-cache-dtype", "int4")
    of_bfloat16 = (40 + 36) / (2 * 128)  # at a head dim of 64
    assert row(output, "a token in 2 layers of full attention") == [f"about {size * of_bfloat16 / 1024:.1f} KiB"]


@pytest.mark.parametrize(("name", "token_bytes"), [("int8", 2 * 2 * 20), ("int4", 2 * 2 * 12)])
def test_quantized_kv_takes_what_its_records_do(capsys, folder, name, token_bytes):
    """Two heads of K and V with a dim of 16, in two layers."""
    output = plan(capsys, folder(), "--max-memory", "cpu=1GiB", "--kv-cache-dtype", name)
    assert row(output, "a token in 2 layers of full attention") == [f"{2 * token_bytes} B"]
    assert f"{name} KV" in output


def test_a_format_that_is_not_there_for_the_head_dims(capsys, folder):
    source = folder("qwen3")
    line = refusal(capsys, "plan", source, "--max-memory", "cpu=1GiB", "--kv-cache-dtype", "int4")
    assert "argument --kv-cache-dtype: kv_cache_dtype='int4': head dims must be multiples of 16" in line


def test_a_config_without_architectures_is_that_of_a_language_model(capsys, folder):
    output = plan(capsys, folder(architectures=None) + "/config.json", "--max-memory", "cpu=1MiB")
    assert "LlamaForCausalLM" in output


def test_no_weights_are_made(capsys, folder):
    """Of a size that no test could load."""
    huge = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    source = folder(num_attention_heads=64, num_key_value_heads=8, head_dim=128, dtype="bfloat16", **huge)
    output = plan(capsys, source, "--max-memory", "0=64GiB")
    assert row(output, "a token in 80 layers of full attention") == ["320.0 KiB"]


# What it says where an argument is wrong


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no/such-model"], ["MODEL_OR_CONFIG", "no/such-model", "check the name", "HF_TOKEN"]),
        (["./no/folder"], ["MODEL_OR_CONFIG", "./no/folder", "check the path"]),
        (["no.json"], ["MODEL_OR_CONFIG", "no.json", "check the path"]),
        (["a b c"], ["MODEL_OR_CONFIG", "a b c", "check the name"]),
    ],
    ids=lambda value: value[0],
)
def test_models_that_are_not_there(capsys, arguments, expected):
    line = refusal(capsys, "plan", *arguments, "--max-memory", "cpu=1GiB")
    assert all(part in line for part in expected), line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no config.json"),
        ("{bad", "no config of a model"),
        ("[1]", "no config of a model"),
        ('{"model_type": "nonsense"}', "no config of a model"),
        ('{"model_type": "llama", "hidden_size": "x"}', "no config of a model"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}', "code of its own"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "BertForMaskedLM, which does not generate"),
        ('{"model_type": "bert"}', "does not generate"),
        ('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}', "does not generate"),
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "encoder-decoder"),
        ('{"model_type": "bart"}', "encoder-decoder"),
        ('{"model_type": "mamba", "num_hidden_layers": 1}', "no layer keeps K and V"),
        ('{"model_type": "rwkv", "num_hidden_layers": 1}', "no K and V"),
    ],
)
def test_folders_that_name_no_model_to_plan(capsys, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    line = refusal(capsys, "plan", str(tmp_path), "--max-memory", "cpu=1GiB")
    assert line.startswith("hf-paged plan: argument MODEL_OR_CONFIG: ")
    assert expected in line
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-memory", "8GiB"], "'8GiB' is not DEVICE=SIZE; write 0=8GiB"),
        (["--max-memory", "cpu=8GiB,"], "'' is not DEVICE=SIZE"),
        (["--max-memory", "cpu=8Gx"], "'8Gx' is no size"),
        (["--max-memory", "cpu=-1"], "'-1' is no size"),
        (["--max-memory", "gpu=8GiB"], "'gpu' is no device"),
        (["--max-memory", "-1=8GiB"], "expected one argument"),
        (["--max-memory=-1=8GiB"], "'-1' is no device"),
        (["--max-memory", "disk=8GiB"], "no device for running sequences"),
        (["--max-memory", "{}"], "no device for running sequences"),
        (["--max-memory", '{"cpu": "8GiB"'], "is no JSON"),
        (["--max-memory", '{"cpu": [1]}'], "[1] is no size"),
        (["--max-memory", '{"cpu": true}'], "True is no size"),
        (["--max-memory", "cpu=1GiB,cpu=2GiB"], "cpu is named twice"),
        (["--max-memory", "0=1GiB", "--max-memory", "00=2GiB"], "0 is named twice"),
        (["--length", "-3"], "1 or more, got '-3'"),
        (["--length", "0"], "1 or more, got '0'"),
        (["--length", "1.5"], "1 or more, got '1.5'"),
        (["--batch", "none"], "1 or more, got 'none'"),
        (["--block-size", "17"], "a power of two from 8 to 256, got 17"),
        (["--block-size", "x"], "a power of two from 8 to 256, got 'x'"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_mean_nothing(capsys, folder, arguments, expected):
    named = arguments[0].split("=")[0]
    rest = [] if named == "--max-memory" else ["--max-memory", "cpu=1GiB"]
    line = refusal(capsys, "plan", folder(), *arguments, *rest)
    assert line.startswith(f"hf-paged plan: argument {named}: ")
    assert expected in line


def test_what_is_left_out_is_named(capsys, folder):
    assert "--max-memory" in refusal(capsys, "plan", folder())
    assert "MODEL_OR_CONFIG" in refusal(capsys, "plan", "--max-memory", "cpu=1GiB")
    assert "COMMAND" in refusal(capsys)
    assert "'bogus'" in refusal(capsys, "bogus")


def test_help_names_every_command_and_argument(capsys):
    for arguments, expected in ((["--help"], ["plan"]), (["plan", "--help"], ["--max-memory", "--length", "--batch"])):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in expected)


def test_the_command_finds_a_hub_id_in_the_cache(folder, tmp_path):
    snapshot = tmp_path / "home/hub/models--tiny--llama/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "home/hub/models--tiny--llama/refs").mkdir()
    (tmp_path / "home/hub/models--tiny--llama/refs/main").write_text("0123")
    os.rename(folder() + "/config.json", snapshot / "config.json")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    code = "import sys; from hf_paged.cli import main; sys.exit(main())"
    for name, rc in (("tiny/llama", 0), ("tiny/other", 2)):
        command = [sys.executable, "-c", code, "plan", name, "--max-memory", "cpu=1MiB"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert done.returncode == rc, done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == rc // 2, done.stderr
        assert ("tiny/llama: LlamaForCausalLM" in done.stdout) == (rc == 0)
