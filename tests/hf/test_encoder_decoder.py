"""Encoder-decoder models: decoder tokens in blocks, K and V of the encoder's output once for all that share it."""

import copy

import more_models
import prompts
import pytest
import torch
from families import PAD, VOCAB, randomize
from pair import Pair
from tolerances import assert_close
from transformers import DynamicCache, EncoderDecoderCache, TrOCRConfig, TrOCRForCausalLM, WhisperForCausalLM
from versions import skip_if_older

from hf_paged import patch_model
from hf_paged.cross import attend_shared
from hf_paged.lazy import SharedRows

NEW = 14


def inputs_of(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """Ragged text, or spectrograms of which the last is the first one again."""
    if name != "whisper":
        return prompts.ragged()
    features = torch.randn(rows, 16, 128, generator=torch.Generator().manual_seed(0))
    features[-1] = features[0]
    return {"input_features": features}


@pytest.mark.parametrize("name", more_models.ENCODER_DECODERS)
def test_same_as_stock(name):
    pair = Pair.of(more_models.build(name))
    inputs = inputs_of(name)
    try:
        pair.stock.generate(**inputs, max_new_tokens=2)
    except RuntimeError as error:
        if name != "t5gemma":
            raise
        skip_if_older(f"stock refuses: {error}")  # 5.8 with padded inputs
    greedy = pair.ask(inputs, max_new_tokens=NEW)
    if name not in ("prophetnet", "bert2bert"):
        more_models.assert_varied(greedy, NEW)
    pair.ask(inputs, max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
    sampled = pair.ask(inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    more_models.assert_varied(sampled, NEW)
    assert "prefixes not reused: encoder-decoder model" in pair.paged.stats().fallbacks
    if name in ("bart", "whisper", "t5"):
        assert [obstacle is None for obstacle in pair.paged._stepwise._trials.values()] == [name != "t5"]


@pytest.mark.parametrize("name", ["bart", "whisper", "t5"])
def test_decoder_prompts(name):
    pair = Pair.of(more_models.build(name))
    inputs = inputs_of(name)
    rows = len(next(iter(inputs.values())))
    prompt = torch.tensor([[1, *prompts.tokens(4, seed % 2)] for seed in range(rows)])
    pair.ask({**inputs, "decoder_input_ids": prompt}, max_new_tokens=NEW)
    if name == "whisper":
        return  # stock's own generate cannot take a prompt to several sequences
    pair.ask({**inputs, "decoder_input_ids": prompt}, max_new_tokens=NEW, num_beams=2)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    padded = {**inputs, "decoder_input_ids": prompt * mask, "decoder_attention_mask": mask}
    pair.ask(padded, max_new_tokens=NEW)
    pair.ask(padded, max_new_tokens=NEW, num_beams=2, do_sample=True)


@pytest.mark.parametrize("length", [5, 20])
def test_a_decoder_prompt_whose_padding_is_attended_to(length):
    """prophetnet leaves the decoder's mask out of its steps."""
    pair = Pair.of(more_models.build("prophetnet"))
    prompt = torch.tensor([[1, *prompts.tokens(length - 1, seed)] for seed in range(4)])
    mask = torch.ones_like(prompt)
    mask[1, : length - 2] = mask[2, :2] = 0
    padded = {**prompts.ragged(), "decoder_input_ids": prompt * mask, "decoder_attention_mask": mask}
    sampled = {"do_sample": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    logits = []
    for model in (pair.stock, pair.model):
        torch.manual_seed(7)
        logits.append(torch.stack(model.generate(**padded, **sampled).logits))
    assert_close(logits[1], logits[0], "logits")
    pair.ask(padded, max_new_tokens=NEW, num_beams=2, do_sample=True)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_outputs_are_stored_once_for_all_beams(name):
    """64 encoder tokens are 8 blocks an input; 14 decoder tokens at most 2 a row, and beams share some of them."""
    pair = Pair.of(more_models.build(name))
    inputs = prompts.batch([prompts.tokens(64), prompts.tokens(64, seed=1)])
    output = pair.model.generate(**inputs, max_new_tokens=NEW, num_beams=4, return_dict_in_generate=True)
    cache = output.past_key_values
    assert cache.cross_attention_cache.rows.owners == [0] * 4 + [1] * 4
    decoder = {block for table in cache.self_attention_cache.tables for block in table.chains[0].blocks}
    assert pair.paged.stats().blocks_in_use == 2 * 8 + len(decoder)
    assert len(decoder) <= 8 * 2
    del output, cache
    pair.ask(inputs, max_new_tokens=NEW, num_beams=4)


def test_equal_inputs_share_and_different_ones_do_not():
    """Rows of equal length that differ in one encoder token; copies need not be neighbours."""
    pair = Pair.of(more_models.build("bart"))
    row = prompts.tokens(24)
    inputs = prompts.batch([row, [*row[:-1], row[-1] + 1], row, row])
    output = pair.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert output.past_key_values.cross_attention_cache.rows.owners == [0, 1, 0, 0]
    del output
    pair.ask(inputs, max_new_tokens=NEW)
    pair.ask(inputs, max_new_tokens=NEW, num_beams=2)


def test_equal_decoder_prompts_are_stored_once():
    pair = Pair.of(more_models.build("bart"))
    prompt = torch.tensor([[1, *prompts.tokens(23)]] * 2)
    inputs = {**prompts.batch([prompts.tokens(16), prompts.tokens(16, seed=1)]), "decoder_input_ids": prompt}
    output = pair.model.generate(**inputs, max_new_tokens=1, num_beams=3, return_dict_in_generate=True)
    tables = output.past_key_values.self_attention_cache.tables
    assert len({tuple(table.chains[0].blocks) for table in tables}) == 2  # one for each encoder input
    del output, tables
    pair.ask(inputs, max_new_tokens=NEW, num_beams=3)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_returned_cache_goes_on(name):
    """The cache can be handed back, copied first or not, and is what stock's would be."""
    stock, patched = (Pair.of(more_models.build(name)).stock, Pair.of(more_models.build(name)).model)
    answers = []
    for model in (stock, patched):
        inputs = prompts.ragged()
        first = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
        assert isinstance(first.past_key_values, EncoderDecoderCache)
        given = [copy.deepcopy(first.past_key_values), first.past_key_values]
        again = [
            model.generate(**inputs, decoder_input_ids=first.sequences, past_key_values=cache, max_new_tokens=5)
            for cache in given
        ]
        answers.append([first.sequences, *again])
    for expected, actual in zip(*answers, strict=True):
        assert torch.equal(expected, actual)
    del first, given, again
    assert patched.paged.stats().fallbacks
    patched.paged._pool.manager.check_integrity()


@torch.no_grad()
def test_operations_of_the_cache():
    """Rows reordered, repeated, picked and cropped, against stock's cache."""
    pair = Pair.of(more_models.build("bart"))
    encoder = pair.stock.get_encoder()(**prompts.ragged())
    ids = torch.tensor([[1, *prompts.tokens(9, seed)] for seed in range(4)])
    changes = [
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0, 1])),
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([7, 0, 3])),
        lambda cache: cache.batch_select_indices([2, 0]),
    ]
    config = pair.stock.config
    stock = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    both = ((pair.stock, stock), (pair.model, pair.paged.new_cache(16)))
    mask = prompts.ragged()["attention_mask"]
    for model, cache in both:
        model(attention_mask=mask, encoder_outputs=encoder, decoder_input_ids=ids, past_key_values=cache)
    for change in changes:
        contents = []
        for _, cache in both:
            change(cache)
            parts = cache.self_attention_cache, cache.cross_attention_cache
            contents.append(
                [each + 0 for part in parts for layer in part.layers for each in (layer.keys, layer.values)]
            )
        for expected, actual in zip(*contents, strict=True):
            torch.testing.assert_close(actual, expected)
    both[1][1].reset()
    assert pair.pool.in_use == 0
    assert not any(both[1][1].is_updated.values())


@pytest.mark.parametrize("owners", [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0], [0, 0], [2, 0, 1, 1]], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_over_shared_rows(owners, tokens, masked):
    """The same as over a copy for each row, weights and bias included."""
    rows, distinct = len(owners), max(owners) + 1
    query = torch.randn(rows, 4, tokens, 8)
    key, value = torch.randn(distinct, 4, 11, 8), torch.randn(distinct, 4, 11, 6)
    mask = torch.rand(rows, 1, tokens, 11) > 0.3 if masked else None
    bias = torch.randn(1, 4, tokens, 11)
    copies = []

    def attention(module, query, key, value, mask, position_bias, is_causal=False):
        assert not is_causal
        copies.append(len(key))
        scores = query @ key.transpose(-1, -2) + position_bias
        weights = (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    module = torch.nn.Identity()
    module.is_causal = False
    expected = attention(module, query, key[owners], value[owners], mask, bias)
    copies.clear()
    shared = SharedRows(key, owners), SharedRows(value, owners)
    actual = attend_shared(attention, module, query, *shared, mask, position_bias=bias)
    for wanted, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, wanted)
    assert max(copies) <= distinct, "rows were copied"
    for each, stored in zip(shared, (key, value), strict=True):
        assert torch.equal(each + 0, stored[owners])


def test_causal_attention_over_shared_rows_is_that_of_each_row():
    """Without a mask and with several tokens, what a token sees depends on its place."""
    module = torch.nn.Identity()
    module.is_causal = True
    seen = []

    def attention(module, query, key, value, mask):
        seen.append(tuple(query.shape))
        return query.transpose(1, 2), None

    shared = SharedRows(torch.randn(1, 2, 5, 4), [0, 0])
    attend_shared(attention, module, torch.randn(2, 2, 3, 4), shared, shared, None)
    assert seen == [(2, 2, 3, 4)]


def test_an_error_gives_everything_back():
    pair = Pair.of(more_models.build("bart"))

    def fail(batch_id, ids):
        if len(ids) == 5:
            raise KeyboardInterrupt
        return list(range(3, 100))

    with pytest.raises(KeyboardInterrupt) as raised:
        pair.model.generate(**prompts.ragged(), max_new_tokens=NEW, prefix_allowed_tokens_fn=fail)
    assert pair.pool.in_use == 0, f"{raised.type} holds the frames, but no blocks"
    pair.check()
    pair.ask(prompts.ragged(), max_new_tokens=NEW)


def test_a_cache_of_the_users_own_is_left_alone():
    pair = Pair.of(more_models.build("bart"))
    config = pair.stock.config
    pair.ask(
        prompts.ragged(),
        max_new_tokens=NEW,
        past_key_values=lambda model: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
    )
    assert pair.paged.stats().fallbacks == {}
    assert pair.paged._pool is None


# Decoders alone, which put K and V of somebody else's encoder in one cache with those of text


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_a_decoder_that_is_given_the_states_of_an_encoder(arguments):
    config = TrOCRConfig(
        vocab_size=VOCAB, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96, pad_token_id=PAD
    )
    stock = TrOCRForCausalLM(config).eval()
    randomize(stock, 4, {})
    pair = Pair.of(stock)
    rows = [prompts.tokens(20, 1), prompts.tokens(11, 2)]
    states = [torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    answers = [pair.ask(rows, encoder_hidden_states=each, **arguments) for each in states]
    assert not torch.equal(*answers), "the encoder makes no difference: this test could not fail"
    reason = "stock generate: argument encoder_hidden_states, of an encoder that is not the model's"
    assert list(pair.paged.stats().fallbacks) == [reason]
    pair.ask(rows, **arguments)
    assert reason not in pair.paged.stats().fallbacks


def test_an_assistant_that_is_a_decoder_alone():
    """As distil-whisper: the assistant attends to what the encoder of the model has made."""
    pair = Pair.of(more_models.build("whisper"))
    config = copy.deepcopy(pair.stock.config)
    config.num_hidden_layers = config.decoder_layers
    helper = WhisperForCausalLM(config).eval()
    randomize(helper, 6, {})
    helpers = [helper, patch_model(copy.deepcopy(helper))]
    inputs = {"input_features": inputs_of("whisper")["input_features"][:1]}
    assistant = {"assistant_model": lambda model: helpers[model is pair.model]}
    pair.skip_where_older_stock_refuses(inputs, **assistant)
    pair.ask(inputs, max_new_tokens=NEW, **assistant)
    assert helpers[1].paged.stats().fallbacks
