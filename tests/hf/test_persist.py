"""Saved prefixes: a model that loads them goes on where another process ended; anything else is refused by name."""

import errno
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, stock_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from snapshot import differences, snapshot

from hf_paged import patch_model, persist, unpatch_model

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def patched(name="llama", **overrides):
    return patch_model(copy_of(FAMILIES[name]), **{"block_size": BLOCK_SIZE, **overrides})


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{**GREEDY, **kwargs})


def reused(model, inputs, expected, **kwargs) -> int:
    """Tokens that a call takes from earlier ones; its answer must be stock's."""
    model.paged.reset_stats()
    assert torch.equal(generate(model, inputs, **kwargs), expected)
    model.paged._pool.manager.check_integrity()
    assert model.paged.stats().blocks_in_use == 0
    return model.paged.stats().reused_tokens


@pytest.fixture(name="folder")
def saved_folder(tmp_path):
    """Two prompts with a common beginning, saved by a model that is gone."""
    model = patched()
    generate(model, prompts.shared_prefix())
    assert model.paged.save(tmp_path / "prefixes") > 0
    return tmp_path / "prefixes"


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_another_model_object_goes_on_where_the_first_ended(name, block_size, tmp_path):
    inputs = prompts.shared_prefix()
    expected = stock_model(name).generate(**inputs, **GREEDY)
    model = patched(name)
    generate(model, inputs)
    written = model.paged.save(tmp_path)
    other = patched(name, block_size=block_size)
    assert other.paged.load(tmp_path) == written
    real = prompts.num_real_tokens(inputs)
    assert reused(other, inputs, expected) == real - len(inputs["input_ids"])
    assert other.paged.stats().blocks_cached > 0


def test_another_process_goes_on_where_this_one_ended(folder, tmp_path):
    inputs = prompts.shared_prefix()
    torch.save((inputs, stock_model("llama").generate(**inputs, **GREEDY)), tmp_path / "expected.pt")
    stock_model("llama").save_pretrained(tmp_path / "model")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_paged import patch_model
folder, base = sys.argv[1:]
model = patch_model(AutoModelForCausalLM.from_pretrained(base + "/model").eval())
inputs, expected = torch.load(base + "/expected.pt")
print(model.paged.load(folder))
assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8), expected)
stats = model.paged.stats()
assert stats.reused_tokens == stats.prompt_tokens - len(expected), stats
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_what_was_loaded_can_be_saved_again_and_loading_twice_adds_nothing(folder, tmp_path):
    model = patched()
    tokens = model.paged.load(folder)
    cached = model.paged.stats().blocks_cached
    model.paged.load(folder)
    assert model.paged.stats().blocks_cached == cached
    assert model.paged.save(tmp_path / "again") == tokens
    first, second = (
        {path.name for path in place.iterdir() if path.suffix == ".safetensors"}
        for place in (folder, tmp_path / "again")
    )
    assert len(first) == len(second) == 1 + model.config.num_hidden_layers


def test_a_salt_is_saved_with_its_prefixes_and_nothing_else(tmp_path):
    model, inputs = patched(), prompts.single()
    expected = stock_model("llama").generate(**inputs, **GREEDY)
    generate(model, inputs, cache_salt="tenant-a")
    assert model.paged.save(tmp_path / "none") == 0
    assert model.paged.save(tmp_path / "other", cache_salt="tenant-b") == 0
    assert model.paged.save(tmp_path / "own", cache_salt="tenant-a") == 28
    other = patched()
    other.paged.load(tmp_path / "own")
    assert reused(other, inputs, expected) == 0
    assert reused(other, inputs, expected, cache_salt="tenant-b") == 0
    assert reused(other, inputs, expected, cache_salt="tenant-a") == 20


def test_saving_again_replaces_what_was_there(folder):
    model = patched()
    generate(model, prompts.single())
    assert model.paged.save(folder) == 28
    other = patched()
    assert other.paged.load(folder) == 28
    assert len(list(folder.iterdir())) == 2 + model.config.num_hidden_layers, "nothing of the first save stays"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


# What goes wrong, where, and the how manieth time that is called.
MISHAPS = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "save_file", 2),
    "Ctrl-C before a layer": (KeyboardInterrupt(), "save_file", 3),
    "Ctrl-C in a layer": (KeyboardInterrupt(), "_sum_of_file", 3),
    "Ctrl-C after the layers": (KeyboardInterrupt(), "_replace", 1),
}


@pytest.fixture
def failing(monkeypatch):
    """Has a save fail in one of these ways."""

    def fail(what):
        error, name, when = MISHAPS[what]
        right, calls = getattr(persist, name), []

        def wrong(*args):
            calls.append(args)
            if len(calls) == when:
                raise error
            return right(*args)

        monkeypatch.setattr(persist, name, wrong)
        return type(error)

    return fail


def changing_weights(monkeypatch, model):
    """Has the weights of a model change while it is saved."""
    describe = persist._description

    def changing(*args):
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        return describe(*args)

    monkeypatch.setattr(persist, "_description", changing)
    return ValueError


@pytest.mark.parametrize("what", [*MISHAPS, "other weights"])
@pytest.mark.parametrize("earlier", ["nothing", "something else", "the same", "some of it"])
def test_a_save_that_fails_leaves_what_was_there(earlier, what, tmp_path, failing, monkeypatch):
    model, folder = patched(), tmp_path / "prefixes"
    written = 0
    generate(model, prompts.single())
    if earlier != "nothing":
        written = model.paged.save(folder)
    if earlier == "something else":
        model.paged.clear()
    if earlier != "the same":
        generate(model, prompts.shared_prefix())
    before = contents(folder)
    error = changing_weights(monkeypatch, model) if what == "other weights" else failing(what)
    with pytest.raises(error):
        model.paged.save(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert model.paged.stats().blocks_in_use == 0
    if written:
        assert patched().paged.load(folder) == written
    assert model.paged.save(folder) >= 0
    assert len(contents(folder)) <= 2 + model.config.num_hidden_layers


def test_a_save_that_fails_leaves_files_that_another_process_may_be_about_to_list(tmp_path, failing):
    model = patched()
    generate(model, prompts.single())
    model.paged.save(tmp_path)
    (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(failing("Ctrl-C after the layers")):
        model.paged.save(tmp_path)
    assert contents(tmp_path) == before
    assert len(before) == 1 + model.config.num_hidden_layers


def test_a_save_that_is_interrupted_when_its_manifest_is_there_is_whole(folder, monkeypatch):
    model = patched()
    generate(model, prompts.single())
    remove = persist._remove

    def interrupted(*args):
        monkeypatch.setattr(persist, "_remove", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(persist, "_remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.paged.save(folder)
    assert patched().paged.load(folder) == 28


def test_threads_may_save_to_one_folder(tmp_path):
    model = patched()
    generate(model, prompts.single())

    def save(seed):
        for more in range(4):
            generate(model, prompts.batch([prompts.tokens(9, seed=10 * seed + more)]))
            assert model.paged.save(tmp_path) > 28

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(save, range(3)))  # raises what they have raised
    assert len(list(tmp_path.iterdir())) == 2 + model.config.num_hidden_layers, "only what the last one has saved"
    assert patched().paged.load(tmp_path) > 28


def other_weights():
    model = patched()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-3
    return model


def other_adapter():
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return patch_model(get_peft_model(copy_of(FAMILIES["llama"]), config).eval())


REFUSED = {
    "other weights": (other_weights, "other weights"),
    "other dtype": (lambda: patch_model(copy_of(FAMILIES["llama"]).bfloat16()), "dtype float32.*bfloat16"),
    "other config": (lambda: patch_model(FAMILIES["llama"].build(rms_norm_eps=1e-3)), "rms_norm_eps"),
    "another model": (lambda: patched("qwen2"), "config"),
    "an adapter": (other_adapter, "weights or adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prefixes_of_another_model_are_refused(case, folder):
    build, words = REFUSED[case]
    model = build()
    with pytest.raises(ValueError, match=words):
        model.paged.load(folder)
    assert model.paged.stats().blocks_cached == 0


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) * 2 // 3] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "a flipped bit"])
@pytest.mark.parametrize("pattern", ["manifest.json", "tokens-*", "layer-0000-*", "layer-0001-*"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(pattern, how, folder):
    (path,) = folder.glob(pattern)
    damage(path, how)
    model = patched()
    with pytest.raises(ValueError, match=path.name):
        model.paged.load(folder)
    assert model.paged.stats().blocks_cached == 0
    inputs = prompts.shared_prefix()
    assert reused(model, inputs, stock_model("llama").generate(**inputs, **GREEDY)) == 0


def test_a_manifest_that_was_edited_is_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cache_salt"] = "tenant-b"
    path.write_text(json.dumps(manifest))
    model = patched()
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        model.paged.load(folder)


def test_a_layer_in_the_place_of_another_is_refused(folder):
    (first,), (second,) = folder.glob("layer-0000-*"), folder.glob("layer-0001-*")
    tensors = load_file(second)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, first)
    model = patched()
    with pytest.raises(ValueError, match="layer-0000"):
        model.paged.load(folder)


def test_what_does_not_fit_is_left_out_and_what_does_is_right(folder):
    """A pool of four blocks: the beginning of a sequence is worth having without its end."""
    model = patched(max_memory={"cpu": 5 * 4096})
    assert model.paged.load(folder) <= 4 * BLOCK_SIZE
    inputs = prompts.single()
    assert torch.equal(
        generate(model, inputs, max_new_tokens=2), stock_model("llama").generate(**inputs, **GREEDY)[:, :23]
    )


def test_nothing_to_save_where_nothing_is_kept(tmp_path):
    model = patched(prefix_caching=False)
    for call in (model.paged.save, model.paged.load):
        with pytest.raises(ValueError, match="prefix_caching"):
            call(tmp_path)


def test_saving_while_nothing_was_generated(tmp_path):
    model = patched()
    assert model.paged.save(tmp_path) == 0
    assert model.paged.load(tmp_path) == 0


# A runtime that is held


AGAIN = {"unpatched": unpatch_model, "patched anew": lambda model: patch_model(model, block_size=32)}


@pytest.mark.parametrize("act", ["save", "load"])
@pytest.mark.parametrize("how", AGAIN)
def test_a_runtime_of_before_refuses_and_leaves_no_trace(act, how, folder, tmp_path):
    model = patched()
    generate(model, prompts.single())
    held = model.paged
    AGAIN[how](model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{act}: .* patched"):
        getattr(held, act)(folder if act == "load" else tmp_path / "new")
    assert held._pool is None
    assert differences(before, snapshot(model)) == []
    assert not (tmp_path / "new").exists()


def test_unpatched_in_the_midst_of_a_save_nothing_stays(tmp_path, monkeypatch):
    model = patched()
    generate(model, prompts.single())
    held, root = model.paged, model.paged._prefixes.root

    def root_and_unpatch(*args):
        found = root(*args)
        unpatch_model(model)
        return found

    monkeypatch.setattr(held._prefixes, "root", root_and_unpatch)
    with pytest.raises(ValueError, match="nothing was saved"):
        held.save(tmp_path)
    assert held._pool is None
    assert type(model) is type(stock_model("llama"))
