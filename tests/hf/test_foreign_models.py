"""Models that people bring: attention of their own, no cache, unheard-of arguments. Right, and said once."""

import copy
import math
import warnings

import prompts
import pytest
import torch
from families import FAMILIES, VOCAB
from own_attention import as_llamas_own
from pair import Pair
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_paged import patch_model
from hf_paged.attention import PagedName
from hf_paged.compat import CACHE_NAME

NEW = 8
CALLS = [
    {"do_sample": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": False},
]


class OwnConfig(PretrainedConfig):
    model_type = "hf_paged_test_own"

    def __init__(self, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, **kwargs):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.vocab_size = num_attention_heads, vocab_size
        super().__init__(**kwargs)


class OwnModel(PreTrainedModel, GenerationMixin):
    """What the two below have in common: embeddings and a head."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.add_layers(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed


class RecurrentWithoutCache(OwnModel):
    """Reads everything anew each step, and takes no cache."""

    def add_layers(self, config):
        self.mix = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.head(self.mix(self.embed(input_ids))[0]))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class OwnAttention(OwnModel):
    """Takes a cache, and multiplies K and V itself."""

    def add_layers(self, config):
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        cache = kwargs.get(CACHE_NAME)
        hidden = self.embed(input_ids)
        for index, layer in enumerate(self.qkv):
            query, key, value = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in layer(hidden).chunk(3, dim=-1))
            key = key + 0.1 * position_ids[:, None, :, None].sin()
            if cache is not None:
                key, value = cache.update(key, value, index)
            scores = query @ key.transpose(-1, -2) / math.sqrt(8)
            width = scores.shape[-1]
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(width - scores.shape[-2])
            if attention_mask is not None:
                visible = visible & attention_mask[:, None, None, -width:].bool()
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
            hidden = hidden + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return CausalLMOutputWithPast(logits=self.head(hidden), **{CACHE_NAME: cache})


def own_model(kind):
    model = kind(OwnConfig(pad_token_id=0, eos_token_id=None)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (RecurrentWithoutCache, "stock generate: the model does not use the cache that generate gives it"),
        (OwnAttention, "K and V are read outside the attention function"),
    ],
)
def test_models_with_code_of_their_own_are_right_and_say_why_they_are_not_fast(kind, reason):
    stock = own_model(kind)
    model = patch_model(copy.deepcopy(stock), block_size=8)
    inputs = prompts.shared_prefix()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for arguments in CALLS:
            torch.manual_seed(1)
            expected = stock.generate(**inputs, max_new_tokens=NEW, **arguments)
            torch.manual_seed(1)
            assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, **arguments), expected), arguments
    assert model.paged.stats().fallbacks == {reason: len(CALLS)}
    said = [str(each.message) for each in caught if "hf_paged" in str(each.message)]
    assert len(said) == 1, said
    assert kind.__name__ in said[0]
    assert reason.removeprefix("stock generate: ") in said[0]
    assert model.paged.stats().blocks_in_use == 0


# Arguments of attention


def _eager(calls):
    """Eager attention that knows the keyword `boost`, and what it was given."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def eager(module, query, key, value, attention_mask, scaling, **kwargs):
        assert type(key) is torch.Tensor
        calls.append(kwargs.get("boost"))
        return original(module, query * (1.0 + kwargs.get("boost", 0.0)), key, value, attention_mask, scaling, **kwargs)

    return as_llamas_own(eager)


@pytest.mark.parametrize("boost", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_keyword_that_no_backend_knows_reaches_the_attention_that_does(monkeypatch, boost):
    """An invented keyword: dropping it would change the tokens, so the call goes to the model's own attention."""
    from transformers.models.llama import modeling_llama

    calls = []
    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", _eager(calls))

    def with_boost(self, *args, **kwargs):
        return forward(self, *args, **kwargs, boost=boost)

    plain = Pair("llama", wrap=_as_eager)
    without = plain.ask(prompts.shared_prefix())
    assert plain.paged.stats().fallbacks == {}
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", with_boost)
    pair = Pair("llama", wrap=_as_eager)
    calls.clear()
    answer = pair.ask(prompts.shared_prefix())
    assert not torch.equal(answer, without), "the keyword makes no difference: this test could not fail"
    assert pair.paged.stats().fallbacks == {"attention argument boost": 1}
    assert all(call is boost for call in calls)


def _as_eager(model):
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("empty", [None, False])
def test_a_keyword_that_says_nothing_does_not_matter(monkeypatch, empty):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs, boost=empty),
    )
    pair = Pair("llama")
    pair.ask(prompts.shared_prefix())
    assert pair.paged.stats().fallbacks == {}


def test_cap_sinks_and_scale_reach_the_backends():
    """Each changes the tokens and none is dropped: by gemma2 (cap and scale) and gpt_oss (sinks) against stock."""
    for name, change in (
        ("gemma2", lambda module: setattr(module, "attn_logit_softcapping", 2.0)),
        ("gemma2", lambda module: setattr(module, "scaling", 1.0)),
        ("gpt_oss", lambda module: module.sinks.data.add_(3.0)),
    ):
        if FAMILIES[name].missing():
            continue
        pair = Pair(name)
        before = pair.ask(prompts.shared_prefix())
        assert pair.paged.stats().fallbacks == {}

        def change_all(model, change=change):
            for module in model.modules():
                if type(module).__name__.endswith("Attention"):
                    change(module)

        pair.both(change_all)
        pair.paged.clear()
        assert not torch.equal(pair.ask(prompts.shared_prefix()), before), f"{name}: the change makes no difference"
        assert pair.paged.stats().fallbacks == {}, name


# Names of attention


def test_models_that_look_at_the_name_of_their_attention_see_the_one_they_had():
    """`_attn_implementation in ("eager", "sdpa")` decides in deepseek_v32 and others whether a mask is made at all."""
    model = patch_model(copy.deepcopy(LlamaForCausalLM(FAMILIES["llama"].build().config)))
    name = model.config._attn_implementation
    assert isinstance(name, PagedName)
    assert name == "sdpa"
    assert name in ("eager", "sdpa")
    assert name not in ("eager", "flex_attention")
    assert f"{name}" == "sdpa"
    assert {"sdpa": 1}.get(name) is None, "it must find our function, not torch's"
