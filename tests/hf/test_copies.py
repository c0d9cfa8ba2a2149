"""Copies and files of patched models: a copy is patched for itself, a file holds the stock model."""

import copy
import io
import json
import pickle
import subprocess
import sys
import textwrap

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, stock_model
from patched_copies import GREEDY, LLAMA, assert_generates_as_stock, expected_tokens, is_patched, patched

from hf_paged import patch_model, unpatch_model


def test_deepcopy_has_a_runtime_of_its_own():
    model = patched()
    twin = copy.deepcopy(model)
    assert twin.paged is not model.paged
    assert twin.paged.config == model.paged.config
    assert_generates_as_stock(twin)
    assert model.paged.stats().prompt_tokens == 0, "the copy's work is counted in the original"
    assert twin.paged.stats().prompt_tokens > 0
    unpatch_model(model)
    assert_generates_as_stock(twin)
    assert is_patched(twin)


def test_deepcopied_weights_do_not_share_cached_prefixes():
    """Reuse after a copy whose weights were changed would be wrong."""
    model = patched()
    assert_generates_as_stock(model)
    twin, changed = copy.deepcopy(model), copy_of(LLAMA)
    for one in (twin, changed):
        with torch.no_grad():
            one.model.layers[0].self_attn.v_proj.weight.mul_(-1.0)
    expected = changed.generate(**prompts.shared_prefix(), **GREEDY)
    assert torch.equal(twin.generate(**prompts.shared_prefix(), **GREEDY), expected)
    assert not torch.equal(expected, expected_tokens())


def test_pickle_is_the_unpatched_model():
    model = patched()
    model.generate(**prompts.single(), **GREEDY)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(stock_model("llama"))
    assert not is_patched(loaded)
    assert_generates_as_stock(loaded)
    assert is_patched(model)
    assert_generates_as_stock(model)


BLOCK_IMPORT = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("hf_paged", "hf_paged_kernels"):
                raise ImportError(f"{name} is blocked by the test")

    sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_files_load_where_hf_paged_is_not_installed(how, tmp_path):
    model, path = patched(), tmp_path / "model"
    model.generate(**prompts.single(), **GREEDY)
    if how == "pickle":
        path.write_bytes(pickle.dumps(model))
        load = "import pickle, pathlib; model = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())"
    else:
        torch.save(model, path)
        load = "import torch; model = torch.load(sys.argv[1], weights_only=False)"
    check = """
    import torch
    ids = torch.tensor([eval(sys.argv[2])])
    print(type(model).__module__, type(model).__name__, model.config._attn_implementation)
    print(model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0].tolist())
    """
    script = textwrap.dedent(BLOCK_IMPORT) + load + textwrap.dedent(check)
    ids = prompts.single()["input_ids"]
    arguments = [sys.executable, "-c", script, str(path), str(ids[0].tolist())]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kind, generated = done.stdout.strip().splitlines()[-2:]
    assert kind == "transformers.models.llama.modeling_llama LlamaForCausalLM sdpa"
    assert json.loads(generated) == stock_model("llama").generate(**prompts.single(), **GREEDY)[0].tolist()


def test_torch_save_keeps_tied_weights_tied():
    model = patch_model(FAMILIES["llama_tied"].build(), block_size=BLOCK_SIZE)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_state_dict_is_the_stock_one():
    stock, model = stock_model("llama"), patched()
    model.generate(**prompts.single(), **GREEDY)
    assert list(model.state_dict()) == list(stock.state_dict())


def test_save_pretrained_writes_the_same_files(tmp_path):
    copy_of(LLAMA).save_pretrained(tmp_path / "stock")
    model = patched()
    model.generate(**prompts.single(), **GREEDY)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    loaded = type(stock_model("llama")).from_pretrained(tmp_path / "patched")
    assert not is_patched(loaded)
    assert_generates_as_stock(loaded)
    assert is_patched(model)


def test_from_pretrained_on_the_patched_class_gives_a_stock_model(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_generates_as_stock(loaded)
