"""Calls that hardly anybody makes, and models that hardly anybody has: as stock answers, or refuses, to the word."""

import pytest
import tokenizers
import torch
import transformers
import zoo
from compare import every_family
from families import FAMILIES, PAD, SPECIAL_TOKENS, randomize
from pair import NEW, Pair, eager, piece
from prompts import batch, ragged, single, tokens
from tolerances import assert_close
from versions import skip_if_older

from hf_paged import PagedCache, patch_model
from hf_paged.compat import CACHE_NAME, crop_zero_empties


def assert_refused_alike(pair: Pair, inputs: dict, *, to_the_word: bool = True, **kwargs) -> None:
    """Both models raise the same, and nothing stays in use."""
    raised = []
    for model in (pair.stock, pair.model):
        with pytest.raises(Exception) as caught:
            model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **kwargs})
        raised.append((type(caught.value), str(caught.value) if to_the_word else None))
    assert raised[0] == raised[1]
    pair.check()


def assert_alike(pair: Pair, inputs: dict, *, to_the_word: bool = True, **kwargs) -> None:
    """Both models answer the same, or refuse."""
    try:
        pair.stock.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **kwargs})
    except Exception:
        assert_refused_alike(pair, inputs, to_the_word=to_the_word, **kwargs)
    else:
        pair.ask(inputs, **kwargs)


@pytest.mark.parametrize("rows", [1, 3])
def test_token_types_of_zeros_that_the_model_adds_to_its_tokens(rows):
    """gpt2 takes token types for tokens: what was computed without them is not what they make of the same prompt."""
    pair = Pair("gpt2")
    plain = batch([piece(21, 1), piece(13, 2), piece(21, 1)][:rows])
    typed = {**plain, "token_type_ids": torch.zeros_like(plain["input_ids"])}
    without = pair.ask(plain)
    for _ in range(2):
        assert not torch.equal(pair.ask(typed), without), "the types make a difference"
        pair.ask(plain)
    assert pair.reused, "calls without types still find each other"


def test_token_types_of_zeros_with_beams_and_longer_prompts():
    pair = Pair("gpt2")
    for length in (13, 21, 17):
        inputs = batch([piece(21, 1)[:length]])
        pair.ask(inputs)
        pair.ask({**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}, num_beams=2)


@pytest.mark.parametrize("chunk", [0, -2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bart"])
def test_chunks_of_no_tokens(name, chunk):
    assert_refused_alike(Pair(name), ragged(), prefill_chunk_size=chunk)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", every_family(lambda family: "encoder_decoder" in family.tags))
def test_chunks_of_an_encoder_decoder(family, arguments):
    """Stock cuts the encoder's mask, too, and so must we: padding then counts."""
    pair, prompt = Pair(family.name), batch([piece(20, row) for row in range(len(ragged()["input_ids"]))])
    for inputs in (ragged(), single(), {**ragged(), "decoder_input_ids": prompt["input_ids"]}):
        assert_alike(pair, inputs, prefill_chunk_size=4, **arguments)


def test_chunks_of_embeddings():
    """Stock cuts token ids, whether there are any or not."""
    pair, ids = Pair("llama"), ragged()["input_ids"]
    embeds = pair.stock.get_input_embeddings()(ids).detach()
    for inputs in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "input_ids": ids}):
        assert_alike(pair, inputs, to_the_word=False, prefill_chunk_size=4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_sliding"])
def test_chunks_with_more_positions_or_more_mask_than_tokens(name):
    """Stock's chunks count positions from the left, a prompt in one piece from the right."""
    pair, ids = Pair(name), torch.tensor([piece(9, 1)])
    for more in ({"position_ids": torch.arange(14)[None]}, {"attention_mask": torch.ones(1, 12, dtype=torch.long)}):
        given = {"input_ids": ids, **more}
        assert not torch.equal(pair.ask(given, prefill_chunk_size=4), pair.ask(given))


@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_next", "deepseek_v3"])
def test_no_tokens_or_no_rows(name, shape):
    pair, nothing = Pair(name), {"input_ids": torch.zeros(*shape, dtype=torch.long)}
    assert_alike(pair, nothing)
    pair.ask([piece(9, 1)])


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_position_ids_of_one_dimension(name, arguments):
    pair = Pair(name)
    for start in (0, 3):
        inputs = {"input_ids": torch.tensor([tokens(9)]), "position_ids": torch.arange(9) + start}
        pair.skip_where_older_stock_refuses(inputs, **arguments)
        pair.ask(inputs, **arguments)


EMPTY_ROW = batch([piece(17, 1), [], piece(5, 2)])  # as tokenizers make of an empty text


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}, {"max_new_tokens": 12}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral_sliding", "falcon_alibi", "gpt_oss", "opt"])
def test_a_row_of_padding_alone(name, arguments):
    """With masks of numbers, attention that may look nowhere looks everywhere, padding included."""
    pair = Pair(name, wrap=eager if name == "llama" else lambda model: model)
    pair.skip_where_older_stock_refuses(EMPTY_ROW, **arguments)
    pair.ask(EMPTY_ROW, **arguments)
    pair.ask([piece(17, 1)])
    nothing = {"input_ids": torch.full((1, 4), PAD + 5), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    pair.ask(nothing, **arguments)


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "gpt_oss"])
def test_a_window_of_one_token(name):
    """Stock's layer then keeps everything, by `[-0:]`."""
    pair = Pair.of(FAMILIES[name].build(sliding_window=1))
    for arguments in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        pair.skip_where_older_stock_refuses([piece(21, 1)], **arguments)
        pair.ask([piece(21, 1)], **arguments)
    pair.ask(ragged())
    assert any("window of 1" in reason for reason in pair.paged.stats().fallbacks)


def test_a_model_that_puts_its_cache_into_another_one():
    """gpt2 with cross-attention makes a pair of the cache that it is given."""
    pair = Pair.of(FAMILIES["gpt2"].build(add_cross_attention=True))
    ends = list(range(3, 60))
    for arguments in ({}, {"num_beams": 2}, {"eos_token_id": ends}, {"do_sample": True, "num_return_sequences": 2}):
        pair.ask(ragged(), **arguments)
    pair.ask(single())
    assert any("stock generate" in reason for reason in pair.paged.stats().fallbacks)


class SortedVocabulary(transformers.PreTrainedTokenizerFast):
    """Stock takes the order of the vocabulary for that of the draft's logits, and `tokenizers` shuffles it."""

    def get_vocab(self):
        return dict(sorted(super().get_vocab().items()))


def tokenizer(first: int, size: int) -> SortedVocabulary:
    """One token a letter, for `size` of them."""
    letters = [chr(first + number) for number in range(size)]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(letters, range(size), strict=True)), letters[2]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return SortedVocabulary(tokenizer_object=inner, pad_token=letters[0], unk_token=letters[2])


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"do_sample": True, "max_new_tokens": 30}], ids=str)
@pytest.mark.parametrize("patched", [False, True], ids=["stock draft", "patched draft"])
def test_a_draft_model_with_another_tokenizer(patched, arguments):
    """Sampling, stock gives the draft embeddings that take all tokens once, and then one at a time."""
    pair = Pair()

    def draft(model):
        made = FAMILIES["qwen2"].build(vocab_size=100)
        return patch_model(made, block_size=8) if patched and model is pair.model else made

    # Made anew for each call: stock keeps what it has made of a draft model by the tokenizers.
    given = {
        "tokenizer": lambda model: tokenizer(0x4E00, 120),
        "assistant_tokenizer": lambda model: tokenizer(0x4E00 - 5, 100),
    }
    for _ in range(2):
        pair.ask(single(), assistant_model=draft, **given, **arguments)


def gemma4_draft():
    """A draft model that reads the K and V of the model it is for."""
    if not hasattr(transformers, "Gemma4AssistantForCausalLM"):
        skip_if_older(f"transformers {transformers.__version__} has no draft model of gemma4")
    text = {**FAMILIES["gemma4"].config, "num_hidden_layers": 2, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0, **SPECIAL_TOKENS}  # fmt: skip
    config = transformers.Gemma4AssistantConfig(
        text_config=transformers.Gemma4TextConfig(**text), backbone_hidden_size=64, tie_word_embeddings=False
    )
    draft = transformers.Gemma4AssistantForCausalLM(config).eval().float()
    randomize(draft, 5, {})
    draft.generation_config.num_assistant_tokens = 3
    return draft


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"do_sample": True, "max_new_tokens": 40}], ids=str)
def test_a_draft_model_that_reads_the_models_own_kv(arguments):
    if arguments and crop_zero_empties():
        # What is drafted draws random numbers, or not.
        skip_if_older(f"transformers {transformers.__version__} lets a draft model look beyond the window")
    pair = Pair("gemma4")
    for length in (21, 8, 9):
        pair.ask([piece(length, 1)], assistant_model=lambda model: gemma4_draft(), **arguments)


@torch.no_grad()
def test_kv_that_a_model_hands_out_stay_as_they_are():
    """After the cache has gone on, and is gone."""
    pair, handed = Pair("gemma4"), []
    for model in (pair.stock, pair.model):
        config = model.config
        cache = PagedCache(config, block_size=8) if model is pair.model else transformers.DynamicCache(config=config)
        for length in (7, 1, 14):
            ids, wanted = torch.tensor([piece(length, length)]), {CACHE_NAME: cache, "return_shared_kv_states": True}
            shared = dict(model(ids, **wanted).shared_kv_states)
            handed.append([tensor for kind in sorted(shared) for tensor in shared[kind]])
        del cache, wanted, shared
    for expected, actual in zip(handed[:3], handed[3:], strict=True):
        for wanted, got in zip(expected, actual, strict=True):
            assert_close(got, wanted, "shared K and V")


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_iterating_over_the_cache_of_an_encoder_decoder(name):
    """Six things a layer: K, V and window of the decoder's tokens, then of the encoder's."""
    pair, listed = Pair(name), []
    for model in (pair.stock, pair.model):
        output = model.generate(**ragged(), do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
        listed.append([tuple(layer) for layer in getattr(output, CACHE_NAME)])
        del output
    assert [len(layer) for layer in listed[1]] == [6, 6]
    for expected, actual in zip(*listed, strict=True):
        for wanted, got in zip(expected, actual, strict=True):
            assert (wanted is None) == (got is None)
            if wanted is not None:
                assert_close(got, wanted, name)


def test_a_model_that_draws_random_numbers_in_eval_mode():
    """big_bird does; what a patched model tries out first must not move what a user draws afterwards."""
    pair, drawn = Pair.of(zoo.build("big_bird")), []
    for model in (pair.stock, pair.model):
        torch.manual_seed(3)
        model.generate(**single(), do_sample=False, max_new_tokens=NEW)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("window", [8, 24])
def test_padding_on_the_right_that_fills_a_window_of_the_models_own(window):
    """A token of gpt_neo's that sees nothing but padding attends to that, and its config tells us of no window."""
    pair = Pair.of(zoo.build("gpt_neo", window_size=window))
    inputs = batch([tokens(41), tokens(33, 1), tokens(12, 2)], side="right")
    pair.ask(inputs)
    pair.ask(inputs, num_beams=2)
    pair.ask(inputs, do_sample=True, num_return_sequences=2)


def test_padding_that_a_later_mask_shows_is_told_of():
    """Stock has K and V of padding, which are of no use to anybody; blocks have none."""
    pair, said = Pair("llama"), "an attention mask that shows padding of before, of which the cache holds nothing"
    for mask in (None, torch.ones_like):
        output = pair.model.generate(**ragged(), do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
        given = {} if mask is None else {"attention_mask": mask(output.sequences)}
        pair.paged._warned.clear()
        with pytest.warns(UserWarning, match=said), torch.no_grad():
            pair.model(output.sequences[:, -1:], **{CACHE_NAME: output[CACHE_NAME]}, **given)
    output = pair.model.generate(**ragged(), do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    more = {CACHE_NAME: output[CACHE_NAME], "attention_mask": torch.ones_like(output.sequences)}
    pair.paged._warned.clear()
    with pytest.warns(UserWarning, match="does not answer as stock"):
        pair.model.generate(output.sequences, **more)
    assert pair.paged.stats().fallbacks[said] == 3


def test_a_mask_of_the_same_padding_says_nothing():
    pair = Pair("llama")
    for _ in range(2):
        outputs = pair.hold([tokens(20), tokens(20, 1)])
        pair.go_on(outputs)
    padded = ragged()
    answers = []
    for model in (pair.stock, pair.model):
        output = model.generate(**padded, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
        grown = torch.cat([padded["attention_mask"], torch.ones(len(output.sequences), 4, dtype=torch.long)], dim=1)
        more = {CACHE_NAME: output[CACHE_NAME], "attention_mask": grown}
        answers.append(model.generate(output.sequences, do_sample=False, max_new_tokens=4, **more))
    assert torch.equal(*answers)
    assert pair.paged.stats().fallbacks == {}
