"""`generate` on the Triton kernels, and what happens where they do not run."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from prompts import batch, tokens

from hf_paged import patch_model
from hf_paged_kernels.launch import triton_obstacle

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(bool(triton_obstacle(DEVICE)), reason=str(triton_obstacle(DEVICE)))

PROMPT = tokens(19, seed=1)
# Rows that share a prefix of odd length; beams and samples of one prompt, which ends inside a block.
CALLS = {
    "greedy": ([[*PROMPT, 5, 6], [*PROMPT, 7]], {"do_sample": False}),
    "beams": ([PROMPT], {"do_sample": False, "num_beams": 2}),
    "samples": ([PROMPT], {"do_sample": True, "num_return_sequences": 2}),
}
MODELS = {  # the fewest layers and heads that have all that the family has, and what they are asked
    "llama": ({"num_hidden_layers": 1}, CALLS),
    "gemma2": ({"num_key_value_heads": 1, "num_attention_heads": 2}, ["samples"]),
    "gpt_oss": ({"num_key_value_heads": 1, "num_attention_heads": 2}, ["greedy"]),
}


@needs_triton
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_stock(name):
    if FAMILIES[name].missing():
        pytest.skip(FAMILIES[name].missing())
    changes, calls = MODELS[name]
    stock = FAMILIES[name].build(**changes).to(DEVICE)
    model = patch_model(copy.deepcopy(stock), attention_backend="triton", block_size=16)
    for call in calls:
        rows, arguments = CALLS[call]
        inputs = {key: value.to(DEVICE) for key, value in batch(rows).items()}
        answers = []
        for each in (stock, model):
            torch.manual_seed(7)
            answers.append(each.generate(**inputs, max_new_tokens=3, **arguments))
        assert torch.equal(*answers), f"{call}: stock {answers[0].tolist()}, ours {answers[1].tolist()}"
    assert model.paged.stats().fallbacks == {}
    assert "triton attention" in repr(model.paged)
    model.paged._pool.manager.check_integrity()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path[:0] = {path!r}
import torch
from families import FAMILIES
from hf_paged import patch_model
model = patch_model(FAMILIES["llama"].build())
assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape == (1, 5)
assert model.paged.stats().fallbacks == {{}}
try:
    patch_model(model, attention_backend="triton")
except ValueError as error:
    print(error)
assert model.paged.config.attention_backend == "auto"
"""


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_needs_triton_until_it_is_asked_for():
    """Where it is not installed, everything else runs, and asking for it says why it does not."""
    said = run("-c", WITHOUT_TRITON.format(path=[str(HERE.parent / "hf")]))
    assert "attention_backend='triton' is not available: triton is not installed" in said


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the other tests run the kernels compiled")
@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """To the last instruction, for a Hopper GPU that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert run(str(HERE / "compile_kernels.py"), "90").count("_attend_kernel") == 6


def test_a_device_without_triton_says_so(monkeypatch):
    monkeypatch.setattr("hf_paged.backends.triton_obstacle", lambda device: f"{device} is a toaster")
    with pytest.raises(ValueError, match="attention_backend='triton' is not available: cpu is a toaster"):
        patch_model(FAMILIES["llama"].build(), attention_backend="triton")
