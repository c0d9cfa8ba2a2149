"""Models that put more than text into a decoder, and models whose own `generate` asks a model inside them."""

import copy

import prompts
import pytest
import torch
import transformers
from families import PAD, VOCAB, randomize
from pair import Pair
from versions import skip_if_older

from hf_paged import patch_model

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE, IMAGE_TOKENS = 110, 4
WAYS = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]


def built(kind, config):
    model = getattr(transformers, kind)(config).eval()
    randomize(model, 4, {})
    return model


def images(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# K and V of more than the tokens, or of other heads


@pytest.mark.parametrize("arguments", WAYS, ids=str)
def test_an_image_that_comes_before_the_text_in_the_cache(arguments):
    """git's layers are given K and V of an image and of text in one."""
    pair = Pair.of(built("GitForCausalLM", transformers.GitConfig(vision_config=VISION, **TEXT)))
    text = {"input_ids": torch.tensor([[1, *prompts.tokens(8)], [1, *prompts.tokens(8, 1)]])}
    answers = []
    for seed in (0, 1, 0):
        answers.append(pair.ask({**text, "pixel_values": images(seed)}, max_new_tokens=10, **arguments))
        assert "stock generate: K and V that blocks for text cannot hold" in pair.paged.stats().fallbacks
        pair.ask({"pixel_values": images(seed)}, **arguments)
    assert not torch.equal(answers[0], answers[1]), "images make no difference: this test could not fail"
    pair.ask(text, **arguments)
    assert "stock generate: K and V that blocks for text cannot hold" not in pair.paged.stats().fallbacks
    outputs = [
        model.generate(**text, pixel_values=images(0), max_new_tokens=4, return_dict_in_generate=True)
        for model in (pair.stock, pair.model)
    ]
    assert len({type(each.past_key_values) for each in outputs}) == 1


def test_guesses_behind_an_image_that_comes_before_the_text():
    """This loop has its prompt computed with the first guesses."""
    pair = Pair.of(built("GitForCausalLM", transformers.GitConfig(vision_config=VISION, **TEXT)))
    text = {"input_ids": torch.tensor([[1, *prompts.tokens(8), *prompts.tokens(8)]])}
    answers = []
    for seed in (0, 1):
        given = {**text, "pixel_values": images(seed)[:1]}
        answers.append(pair.ask(given, max_new_tokens=10, prompt_lookup_num_tokens=3))
        assert "stock generate: K and V that blocks for text cannot hold" in pair.paged.stats().fallbacks
    assert not torch.equal(*answers)
    pair.ask(text, max_new_tokens=10, prompt_lookup_num_tokens=3)
    assert "stock generate: K and V that blocks for text cannot hold" not in pair.paged.stats().fallbacks


@pytest.mark.parametrize("is_patched", [False, True])
def test_samples_of_a_draft_model_behind_an_image(is_patched):
    """What the first guesses have drawn before blocks turn out to be of no use is drawn again."""
    config = transformers.GitConfig(vision_config=VISION, **TEXT)
    pair, helper = Pair.of(built("GitForCausalLM", config)), built("GitForCausalLM", config)
    with torch.no_grad():
        for weight in helper.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))

    def assistant(model):
        twin = copy.deepcopy(helper)
        return patch_model(twin, block_size=8) if is_patched and model is pair.model else twin

    text = {"input_ids": torch.tensor([[1, *prompts.tokens(8)]]), "pixel_values": images(0)[:1]}
    pair.ask(text, max_new_tokens=14, assistant_model=assistant, do_sample=True)
    assert "stock generate: K and V that blocks for text cannot hold" in pair.paged.stats().fallbacks


def test_an_encoder_with_other_heads_than_the_decoder():
    if not hasattr(transformers, "DiaConfig"):
        skip_if_older(f"transformers {transformers.__version__} has no dia")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    cross = {
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4,
        "cross_head_dim": 8,
        "cross_hidden_size": 32,
    }
    special = {"pad_token_id": 37, "bos_token_id": 38, "eos_token_id": 36}
    config = transformers.DiaConfig(
        encoder_config={"vocab_size": VOCAB, "num_key_value_heads": 4, **sizes},
        decoder_config={"vocab_size": 40, "num_key_value_heads": 2, "num_channels": 3, **sizes, **cross, **special},
        delay_pattern=[0, 1, 2],
        norm_eps=1e-5,
    )
    pair = Pair.of(built("DiaForConditionalGeneration", config))
    rows = torch.tensor([prompts.tokens(6), prompts.tokens(6, 1)])
    for arguments in ({}, {"do_sample": True}):
        answers = []
        for model in (pair.stock, pair.model):
            torch.manual_seed(7)
            answers.append(model.generate(input_ids=rows, max_new_tokens=10, **{"do_sample": False, **arguments}))
        assert torch.equal(*answers)
        assert "stock generate: K and V that blocks for text cannot hold" in pair.check().fallbacks


# Models inside


@pytest.fixture
def blip2():
    language = transformers.OPTConfig(
        ffn_dim=96,
        word_embed_proj_dim=64,
        **{name: value for name, value in TEXT.items() if name != "intermediate_size"},
    )
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**TEXT, "hidden_size": 32, "num_attention_heads": 2, "encoder_hidden_size": 32},
        text_config=language.to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=IMAGE,
    )
    return built("Blip2ForConditionalGeneration", config)


def test_a_generate_that_asks_a_model_inside_is_told_of(blip2):
    pair = Pair.of(blip2)
    asked = torch.tensor([[IMAGE] * IMAGE_TOKENS + list(range(5 + 9 * row, 13 + 9 * row)) for row in (0, 1)])
    for arguments in WAYS:
        answer = pair.ask({"input_ids": asked, "pixel_values": images(0)}, **arguments)
    assert not torch.equal(pair.ask({"input_ids": asked, "pixel_values": images(1)}, **arguments), answer)
    reason = "stock generate: its own generate asks models inside it; patch model.language_model"
    assert pair.paged.stats().fallbacks == {reason: 1}
    inside = patch_model(pair.model.language_model)
    pair.ask({"input_ids": asked, "pixel_values": images(0)})
    assert pair.paged.stats().fallbacks == {}
    assert inside.paged.stats().prompt_tokens == asked.numel()
    assert inside.paged.stats().blocks_in_use == 0


def test_a_generate_of_its_own_that_makes_no_cache_is_told_of():
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_codebooks": 2}
    decoder = transformers.MusicgenDecoderConfig(vocab_size=32, pad_token_id=32, bos_token_id=32, **sizes)
    encoder = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    codebooks = {"codebook_size": 32, "codebook_dim": 16, "target_bandwidths": [0.4], "sampling_rate": 160}
    audio = transformers.EncodecConfig(hidden_size=16, num_filters=4, upsampling_ratios=[2, 2], **codebooks)
    config = transformers.MusicgenConfig(
        text_encoder=encoder.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict()
    )
    stock = transformers.MusicgenForConditionalGeneration(config).eval()
    for part in (stock.decoder, stock.text_encoder):
        randomize(part, 4, {})
    stock.generation_config.decoder_start_token_id = stock.generation_config.pad_token_id = 32
    stock.generation_config.guidance_scale = 1.0
    pair = Pair.of(stock)
    for arguments in ({}, {"do_sample": True}):
        pair.ask({"input_ids": torch.tensor([prompts.tokens(6), prompts.tokens(6, 1)])}, **arguments)
        assert pair.paged.stats().fallbacks == {"stock generate: its own generate makes no cache for it": 1}
