"""Quantized KV is held against full precision before the first `generate`, and by `hf-paged doctor`."""

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES
from real import checkpoint

from benchmarks import smollm2
from hf_paged import paged, patch_model, verify
from hf_paged.cli import main
from hf_paged.quality import MAX_MEAN_KL, Quality, measure, prompt_of
from hf_paged.store import LayerStore
from hf_paged_kernels import FORMATS

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def with_outliers(factor: float = 300.0) -> torch.nn.Module:
    """Two channels of every key are large, and those of queries small: the same answers in full precision.

    Rotated keys are large all over then, and steps of int8 and int4 so large that little is left of the other channels;
    fp8 keeps keys as they are, and its steps grow with the numbers.
    """
    model = copy_of(FAMILIES["llama"])
    dim = model.config.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            for projection, times in ((layer.self_attn.k_proj, factor), (layer.self_attn.q_proj, 1 / factor)):
                by_head = projection.weight.unflatten(0, (-1, dim))
                by_head[:, [0, dim // 2]] *= times  # rotated into one another by a rotary embedding
    return model


def patched(model, name, **overrides):
    return patch_model(model, block_size=BLOCK_SIZE, kv_cache_dtype=name, **overrides)


def test_a_model_that_a_format_ruins_is_refused_and_another_format_named():
    model, inputs = with_outliers(), prompts.single()
    expected = model.generate(**inputs, **GREEDY)
    for name in ("int8", "int4"):
        patched(model, name)
        message = rf"^kv_cache_dtype='{name}': .* mean KL of \d.* use 'fp8' \(mean KL 0.0\d+\) or 'auto', or verify"
        for _ in range(2):  # and again
            with pytest.raises(ValueError, match=message):
                model.generate(**inputs, **GREEDY)
    patched(model, "auto")
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert patched(model, "fp8").generate(**inputs, **GREEDY).shape == expected.shape
    assert patched(model, "int4", verify=False).generate(**inputs, **GREEDY).shape == expected.shape


def test_it_is_measured_once_and_only_where_kv_is_quantized(monkeypatch):
    asked = []

    def check_quality(model, kv_format):
        asked.append(kv_format.name)
        return Quality(0, 1)

    monkeypatch.setattr(verify, "check_quality", check_quality)
    model = copy_of(FAMILIES["llama"])
    for name, overrides, expected in (
        ("auto", {}, []),
        ("int8", {}, ["int8"]),
        ("fp8", {}, ["fp8"]),
        ("int4", {}, ["int4"]),
        ("int8", {"verify": False}, []),
    ):
        patched(model, name, **overrides)
        for _ in range(2):
            model.generate(**prompts.single(), **GREEDY)
        assert asked == expected, (name, overrides)
        asked.clear()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_verify_asks_whether_answers_are_those_of_stock_on_rounded_kv(family):
    if FAMILIES[family].missing():
        pytest.skip(FAMILIES[family].missing())
    model = patched(copy_of(FAMILIES[family]), "int8", verify=True)
    model.generate(**prompts.single(), **GREEDY)
    assert model.paged._verification._is_done


def test_a_store_that_keeps_something_else_is_noticed(monkeypatch):
    model = patched(copy_of(FAMILIES["llama"]), "int8", verify=True)
    encoded = LayerStore.encoded
    monkeypatch.setattr(LayerStore, "encoded", lambda self, key, value: encoded(self, key * 1.1, value))
    monkeypatch.setattr("hf_paged_kernels.NativeStore.write", lambda *_: False)
    with pytest.raises(ValueError, match="verify: the patched model does not answer as stock does"):
        model.generate(**prompts.single(), **GREEDY)


def test_chunks_do_not_change_what_is_measured():
    model, tokens = copy_of(FAMILIES["llama"]), torch.tensor(prompts.tokens(50))
    formats = list(FORMATS.values())
    whole, pieces = (measure(model, tokens, formats, size) for size in (512, 16))
    assert list(whole) == ["auto", *FORMATS]
    assert whole["auto"].mean_kl == 0
    for name in FORMATS:
        assert whole[name].mean_kl > 0
        assert pieces[name].mean_kl == pytest.approx(whole[name].mean_kl, rel=0.05)
        assert pieces[name].perplexity == pytest.approx(whole[name].perplexity, rel=1e-3)
    logits = model(tokens.unsqueeze(0)).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).exp()
    assert whole["auto"].perplexity == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("spoilt", "status"), [(False, 0), (True, 1)])
def test_doctor_shows_every_format(spoilt, status, tmp_path, capsys):
    (with_outliers(30) if spoilt else copy_of(FAMILIES["llama"])).save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--length", "20", "--kv-cache-dtype", "int4"]) == status
    shown = capsys.readouterr().out
    assert "All answers are those of stock on KV rounded in the same way." in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert ("TOO FAR OFF" if spoilt else "passes") in lines["int4"]
    assert "passes" in lines["fp8"]
    assert "passes" in lines["int8"]


@pytest.mark.real
def test_a_real_model_passes():
    checkpoint()
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    found = measure(model, prompt_of(model), list(FORMATS.values()))
    for name, most in (("int8", 0.002), ("fp8", 0.01), ("int4", 0.05)):
        assert 0 < found[name].mean_kl < most < MAX_MEAN_KL
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY)
    with paged(model, kv_cache_dtype="int8") as quantized:
        assert torch.equal(quantized.generate(**inputs, **GREEDY), expected)
        assert quantized.paged.stats().fallbacks == {}
