"""What a patched model is asked before its first call: how many passes that takes, when, and what each of them finds
out."""

import copy
import functools

import prompts
import pytest
import torch
from compare import every_family
from families import FAMILIES, stock_model
from own_attention import as_llamas_own
from pair import Pair
from transformers import BloomForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaModel

from hf_paged import footprint, patch_model, probe

FAST = every_family(lambda family: family.packed)
TRIAL, VIEWS = 4, 3  # passes: what the fast path does; whether dense K and V may have gaps
PIECES, PADDING = 2, 3  # whether a prompt in two is the same; whether padding changes nothing


def recorded(monkeypatch, kind):
    """The shapes of the inputs of each pass through models of class `kind`, from now on."""
    shapes = []
    forward = kind.forward

    @functools.wraps(forward)
    def recording(self, input_ids=None, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(kind, "forward", recording)
    return shapes


def passes_of_a_call(model, shapes, inputs) -> int:
    shapes.clear()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return len(shapes)


def test_the_first_call_asks_in_few_passes_and_the_first_padded_one_in_some_more(monkeypatch):
    footprint._measure.cache_clear()  # nothing but these passes, with weights or without, is needed
    shapes = recorded(monkeypatch, LlamaForCausalLM)
    model = patch_model(FAMILIES["llama"].build(), block_size=8)
    calls = [prompts.single(), prompts.ragged(), prompts.right_padded(), prompts.right_padded(), prompts.single()]
    assert [passes_of_a_call(model, shapes, each) for each in calls] == [TRIAL + 1, 1, VIEWS + 1, 1, 1]


def test_a_model_that_cannot_be_packed_is_asked_with_its_first_call(monkeypatch):
    shapes = recorded(monkeypatch, BloomForCausalLM)
    model = patch_model(FAMILIES["bloom"].build(), block_size=8)
    calls = [prompts.single(), prompts.single(), prompts.single(), prompts.ragged(), prompts.ragged()]
    passes = [1 + VIEWS + 1, 1 + PIECES, 1, PADDING + 1, 1]
    assert [passes_of_a_call(model, shapes, each) for each in calls] == passes


def test_a_new_forward_and_a_new_dtype_are_asked_for_anew(monkeypatch):
    shapes = recorded(monkeypatch, LlamaForCausalLM)
    model = patch_model(FAMILIES["llama"].build(), block_size=8)
    passes_of_a_call(model, shapes, prompts.single())
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    assert passes_of_a_call(model, shapes, prompts.single()) == TRIAL + 1
    model.bfloat16()
    assert passes_of_a_call(model, shapes, prompts.single()) == TRIAL + 1


@pytest.mark.parametrize("asked_before", [False, True])
def test_hooks_that_came_later_are_shown_no_trial(monkeypatch, asked_before):
    """Whether K and V may have gaps must be known by then; otherwise they have none."""
    shapes = recorded(monkeypatch, LlamaForCausalLM)
    model = patch_model(FAMILIES["llama"].build(), block_size=8)
    passes_of_a_call(model, shapes, prompts.right_padded() if asked_before else prompts.single())
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    out = model.generate(**prompts.single(), max_new_tokens=2, return_dict_in_generate=True)
    assert out.past_key_values.copies_dense is not asked_before
    assert passes_of_a_call(model, shapes, prompts.single()) == 1
    handle.remove()
    assert passes_of_a_call(model, shapes, prompts.right_padded()) == (1 if asked_before else VIEWS + 1)


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("autocast", [False, True])
def test_bytes_seen_are_those_stored(family, autocast):
    """The pool is made for them before it has K and V of its own."""
    model = patch_model(copy.deepcopy(stock_model(family.name)), block_size=8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.generate(**prompts.single(), max_new_tokens=2)
        seen = model.paged._capabilities.seen(model).layer_bytes
    stores = model.paged._pool.stores
    assert list(seen) == [store.bytes_per_token for store in stores]


# Models that are other than stock in one of the passes, and only there


def changed(monkeypatch, change) -> Pair:
    """Llamas whose decoder is given what `change` makes of its keyword arguments."""
    forward = LlamaModel.forward

    @functools.wraps(forward)
    def changing(self, *args, **kwargs):
        return forward(self, *args, **change(kwargs))

    monkeypatch.setattr(LlamaModel, "forward", changing)
    return Pair()


def test_positions_of_the_first_row_for_all_rows_show_in_the_decode_step(monkeypatch):
    """One row is all that a packed pass has."""
    pair = changed(monkeypatch, lambda kwargs: {**kwargs, "position_ids": kwargs["position_ids"][:1]})
    pair.ask(prompts.ragged())
    assert [reason[:20] for reason in pair.paged.stats().fallbacks] == ["packed logits differ"]


def test_neighbours_in_the_pass_show_in_the_packed_prompt(monkeypatch):
    """A number that goes up from token to token, whatever row it belongs to."""

    def counted(kwargs):
        ids = kwargs["position_ids"]
        ups = torch.cat([ids[:, :1], ids.diff(dim=1).clamp(min=0)], dim=1)
        return {**kwargs, "position_ids": ups.cumsum(dim=1)}

    pair = changed(monkeypatch, counted)
    pair.ask(prompts.shared_prefix())
    assert [reason[:20] for reason in pair.paged.stats().fallbacks] == ["packed logits differ"]


@pytest.mark.parametrize("row", [0, 1])
def test_what_only_the_last_logits_of_one_prompt_depend_on_shows(monkeypatch, row):
    """K and V are right, and so is the step after: one position only is predicted from all that is in the pass."""
    forward, last = LlamaModel.forward, probe._ROW_TOKENS[row] - 1

    @functools.wraps(forward)
    def summing(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        hidden, is_last = outputs.last_hidden_state, (kwargs["position_ids"] == last).unsqueeze(-1)
        outputs.last_hidden_state = hidden + is_last * hidden.sum(dim=1, keepdim=True)
        return outputs

    monkeypatch.setattr(LlamaModel, "forward", summing)
    pair = Pair()
    pair.ask(prompts.shared_prefix())
    assert [reason[:20] for reason in pair.paged.stats().fallbacks] == ["packed logits differ"]


def test_the_yardstick_is_the_pass_that_generate_makes(monkeypatch):
    """A pass without a cache may be another: nobody is asked about that one."""

    def shifted(kwargs):
        ids = kwargs["position_ids"]
        return {**kwargs, "position_ids": ids if kwargs["use_cache"] else ids.flip(1)}

    pair = changed(monkeypatch, shifted)
    ids = prompts.single()["input_ids"]
    given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).unsqueeze(0)}
    with torch.no_grad():
        logits = [pair.stock(**given, use_cache=each).logits[0, -1] for each in (True, False)]
    assert not torch.allclose(*logits), "the pass without a cache must be another one"
    pair.ask(prompts.ragged())
    assert pair.paged.stats().fallbacks == {}


def as_eager(model):
    model.set_attn_implementation("eager")
    return model


def test_k_and_v_have_no_gaps_where_a_model_that_is_fast_otherwise_cannot_have_them(monkeypatch):
    """Fast calls do not ask: the first padded pass comes on the cache of such a call, in the middle of its blocks."""
    eager = modeling_llama.eager_attention_forward

    def viewing(module, query, key, value, *args, **kwargs):
        flat = (key.view(-1, key.shape[-1]), value.view(-1, value.shape[-1]))  # an error where there are gaps
        return eager(module, query, flat[0].view(key.shape), flat[1].view(value.shape), *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", as_llamas_own(viewing))
    pair = Pair("llama", wrap=as_eager)
    answers = []
    for model in (pair.stock, pair.model):
        first = model.generate(**prompts.single(), do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
        assert pair.paged.stats().fallbacks == {}
        more = {"input_ids": first.sequences, "past_key_values": first.past_key_values, "output_attentions": True}
        more["return_dict_in_generate"] = True
        answers.append(model.generate(**more, do_sample=False, max_new_tokens=4).sequences)
    assert torch.equal(*answers)
    assert pair.paged.stats().fallbacks == {"argument output_attentions": 1}


@pytest.mark.parametrize("fewer", [1, 3])
def test_a_model_that_is_told_to_use_other_layers_later(fewer):
    """What was seen of its layers is then that of others."""
    pair = Pair.of(FAMILIES["llama"].build(num_hidden_layers=4))
    pair.ask(prompts.ragged())
    pair.both(lambda model: setattr(model.config, "num_hidden_layers", fewer))
    pair.ask(prompts.ragged())
    pair.both(lambda model: setattr(model.config, "num_hidden_layers", 4))
    pair.ask(prompts.ragged())
