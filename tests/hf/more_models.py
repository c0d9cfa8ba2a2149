"""Tiny random models of other kinds than the families of the grid: hybrids, encoder-decoders, vision-language models.

Each is a function that builds the config; the class is named beside it. What a transformers version cannot build is
skipped.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import prompts
import torch
import transformers
from families import PAD, SIZES, VOCAB, randomize
from families import SPECIAL_TOKENS as SPECIAL
from versions import skip_if_older

SIZES = {**SIZES, **SPECIAL}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
IMAGE, VIDEO, IMAGE_START, IMAGE_END = 110, 111, 112, 113  # token ids
MEDIA = (IMAGE, VIDEO)
IMAGE_TOKENS = 4


@dataclass(frozen=True)
class Model:
    """How to build one model: `config(config_class)` gives the config of `class_name`; it never says `unsaid`."""

    class_name: str
    config_name: str
    config: Callable
    unsaid: tuple[int, ...] = ()


def _flat(class_name: str, config_name: str, **fields) -> Model:
    return Model(class_name, config_name, lambda kind: kind(**fields))


HYBRIDS = {
    "falcon_h1": _flat("FalconH1ForCausalLM", "FalconH1Config", mamba_d_ssm=128, head_dim=16, **MAMBA2, **SIZES),
    "jamba": _flat("JambaForCausalLM", "JambaConfig", attn_layer_offset=1, attn_layer_period=2, num_experts=2,
                   expert_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False, mamba_d_state=8,
                   mamba_dt_rank=4, **{**SIZES, "num_hidden_layers": 4}),
    "zamba2": _flat("Zamba2ForCausalLM", "Zamba2Config", layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
                    n_mamba_heads=8, mamba_d_state=8, mamba_ngroups=1, mamba_expand=2, chunk_size=8, adapter_rank=4,
                    use_mamba_kernels=False, num_mem_blocks=1,
                    **{**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 4}),
    "recurrent_gemma": _flat("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", lru_width=64, head_dim=16,
                             attention_window_size=8, **{**SIZES, "num_hidden_layers": 3}),
}  # fmt: skip

# Of random weights: with the same scale everywhere, an encoder-decoder says one token over and over.
SCALE = {"encoder_attn": 0.5, "fc2": 0.3, "shared": 0.15, "word_embeddings.weight": 0.15, "embed_tokens": 0.5,
         "dense_h_to_4h": 0.5}  # fmt: skip
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **SPECIAL,
}


def _t5gemma(kind):
    half = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, **SIZES}
    return kind(encoder=dict(half), decoder=dict(half), vocab_size=VOCAB, tie_word_embeddings=False, **SPECIAL)


def _bert2bert(kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.BertConfig(vocab_size=VOCAB, **sizes)
    decoder = transformers.BertConfig(vocab_size=VOCAB, is_decoder=True, add_cross_attention=True, **sizes)
    config = kind.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id = PAD, 1
    return config


ENCODER_DECODERS = {
    "bart": _flat("BartForConditionalGeneration", "BartConfig", vocab_size=VOCAB, max_position_embeddings=128,
                  **SEQ2SEQ),
    "whisper": _flat("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, num_mel_bins=16,
                     max_source_positions=64, max_target_positions=128, suppress_tokens=None,
                     begin_suppress_tokens=None, **SEQ2SEQ),
    "t5": _flat("T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2,
                num_decoder_layers=2, num_heads=4, decoder_start_token_id=1, tie_word_embeddings=False, **SPECIAL),
    "t5gemma": Model("T5GemmaForConditionalGeneration", "T5GemmaConfig", _t5gemma),
    "prophetnet": _flat("ProphetNetForConditionalGeneration", "ProphetNetConfig", vocab_size=VOCAB, hidden_size=64,
                        encoder_ffn_dim=96, decoder_ffn_dim=96, num_encoder_layers=2, num_decoder_layers=2,
                        num_encoder_attention_heads=4, num_decoder_attention_heads=4, max_position_embeddings=128,
                        decoder_start_token_id=1, **SPECIAL),
    "bert2bert": Model("EncoderDecoderModel", "EncoderDecoderConfig", _bert2bert),
}  # fmt: skip

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 4}  # fmt: skip


def _qwen2_5_vl(kind):
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "in_channels": 3,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "window_size": 16,
              "fullatt_block_indexes": [1]}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return kind(vision_config=vision, text_config={**SIZES, "rope_parameters": rope, "rope_scaling": rope},
                image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=IMAGE_START,
                vision_end_token_id=IMAGE_END, tie_word_embeddings=False)  # fmt: skip


def _gemma3(kind):
    text = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    return kind(vision_config=VISION, text_config=text, mm_tokens_per_image=IMAGE_TOKENS, image_token_index=IMAGE,
                boi_token_index=IMAGE_START, eoi_token_index=IMAGE_END, tie_word_embeddings=False)  # fmt: skip


def _llava(kind):
    vision = {**VISION, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 32}
    return kind(vision_config=vision, text_config={**SIZES, "model_type": "llama"}, image_token_id=IMAGE,
                image_token_index=IMAGE, image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1)  # fmt: skip


OVIS2_MARKS = (IMAGE_START, 114, 115, 116, IMAGE_END)  # beside an image in a prompt they stand for features


def _ovis2(kind):
    vision = {**VISION, "patch_size": 8, "vocab_size": 40, "hidden_stride": 1, "num_visual_indicator_tokens": 5}
    return kind(vision_config=vision, text_config={**SIZES, "model_type": "qwen2"}, image_token_id=IMAGE,
                visual_indicator_token_ids=OVIS2_MARKS, vocab_size=VOCAB, hidden_size=64)  # fmt: skip


def _fuyu(kind):
    text = {**SIZES, "model_type": "persimmon", "num_hidden_layers": 3}
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "image_size": 16, "patch_size": 4}
    return kind(text_config=text, image_token_id=IMAGE, **sizes)


def _ernie4_5_vl_moe(kind):
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
              "in_channels": 3, "spatial_merge_size": 2, "temporal_merge_size": 2}  # fmt: skip
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 10000.0},
            "moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4,
            "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
    return kind(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
                image_start_token_id=IMAGE_START, image_end_token_id=IMAGE_END, video_start_token_id=115,
                video_end_token_id=116)  # fmt: skip


def _mllama(kind):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
              "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64,
              "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**SIZES, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope,
            "rope_scaling": rope}  # fmt: skip
    return kind(vision_config=vision, text_config=text, image_token_index=IMAGE)


VISION_LANGUAGE = {
    "llava": Model("LlavaForConditionalGeneration", "LlavaConfig", _llava),
    "qwen2_5_vl": Model("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", _qwen2_5_vl, MEDIA),
    "gemma3": Model("Gemma3ForConditionalGeneration", "Gemma3Config", _gemma3),
    "idefics3": Model(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        lambda kind: kind(vision_config=VISION, text_config={**SIZES, "model_type": "llama"}, image_token_id=IMAGE,
                          scale_factor=2, pad_token_id=PAD),
    ),
    "ovis2": Model("Ovis2ForConditionalGeneration", "Ovis2Config", _ovis2, unsaid=OVIS2_MARKS),
    "fuyu": Model("FuyuForCausalLM", "FuyuConfig", _fuyu, unsaid=(IMAGE,)),
    "ernie4_5_vl_moe": Model("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeConfig", _ernie4_5_vl_moe, MEDIA),
    "mllama": Model("MllamaForConditionalGeneration", "MllamaConfig", _mllama),
}  # fmt: skip

MODELS = {**HYBRIDS, **ENCODER_DECODERS, **VISION_LANGUAGE}


@functools.cache
def build(name: str) -> torch.nn.Module:
    """The stock model of that name, built once a session. Read-only: copy it before changing anything."""
    model = MODELS[name]
    for each in (model.class_name, model.config_name):
        if not hasattr(transformers, each):
            skip_if_older(f"transformers {transformers.__version__} has no {each}")
    config = model.config(getattr(transformers, model.config_name))
    built = getattr(transformers, model.class_name)(config).eval().float()
    randomize(built, 3 if config.is_encoder_decoder else 5, SCALE)
    settings = built.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = PAD, 1, None
    settings.suppress_tokens = list(model.unsaid) or None
    if config.is_encoder_decoder and settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1
    return built


def assert_varied(answer: torch.Tensor, new: int) -> None:
    """A row of one token over and over would be right whatever the cache holds."""
    distinct = [len(set(row.tolist())) for row in answer[:, -new:]]
    assert sum(distinct) >= 3 * len(distinct), f"only {distinct} distinct tokens of {new}"


def plain_tokens(length: int, seed: int = 0) -> list[int]:
    """Random token ids below those that stand for images."""
    return [token % 100 + 3 for token in prompts.tokens(length, seed)]


MARKED = ("qwen2_5_vl", "ovis2", "ernie4_5_vl_moe")  # images have a token before and behind them


def image_prompt(name: str, texts: list[tuple[int, int, int]], images: list[int]) -> dict[str, torch.Tensor]:
    """Rows of text with an image in it, `(tokens before, tokens after, seed)` each; image `i` has its own pixels."""
    marks = ([IMAGE_START], [IMAGE_END]) if name in MARKED else ([], [])
    rows = [
        [*plain_tokens(before, seed), *marks[0], *[IMAGE] * IMAGE_TOKENS, *marks[1], *plain_tokens(after, seed + 50)]
        for before, after, seed in texts
    ]
    inputs = prompts.batch(rows)
    pixels = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in images])
    if name == "fuyu":
        return {**inputs, "image_patches": pixels[:, :, ::2, ::2].reshape(len(rows), IMAGE_TOKENS, 48)}
    if name in ("qwen2_5_vl", "ernie4_5_vl_moe"):  # 4 × 4 patches in a row, of as many frames as go into one
        frames = 2 if name == "qwen2_5_vl" else 1
        inputs["pixel_values"] = pixels.repeat(1, frames, 1, 1).reshape(len(rows) * 16, -1)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(rows))
        types = {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}
        types["moe_mm_token_type_ids"] = types["mm_token_type_ids"] + torch.isin(
            inputs["input_ids"], torch.tensor([IMAGE_START, IMAGE_END])
        )
        class_name = VISION_LANGUAGE[name].class_name
        return {**inputs, **{kind: each for kind, each in types.items() if takes(class_name, kind)}}
    inputs["pixel_values"] = pixels.unsqueeze(1) if name == "idefics3" else pixels
    if name == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def takes(class_name: str, argument: str) -> bool:
    """Whether the `forward` of a class of transformers has an argument."""
    return argument in inspect.signature(getattr(transformers, class_name).forward).parameters
