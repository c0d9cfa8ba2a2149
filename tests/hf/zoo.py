"""Every text model that `AutoModelForCausalLM` knows, as a tiny random one where a few sizes suffice to build it.

The sizes are set by the names that configs share; `SPECIAL` says what a model needs besides. Windows, chunks and the
like are longer than the prompts of the trial that a patched model makes (13 tokens), and shorter than those of the
tests: what only matters in long sequences must be right as well.
"""

import copy

import torch
from families import BOS, PAD, VOCAB, randomize
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 24
MAX_PARAMETERS = 3_000_000  # more is not tiny: a size goes by another name
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("head_dim", "dim_head", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("index_topk", "keep_window_size"), WINDOW),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rotary_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    "is_decoder": True,
    "use_cache": True,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
HYBRID = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
}
SPECIAL = {
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu"), LATENT),
    **{name: {"num_key_value_heads": 4} for name in ("axk2", "deepseek_v2", "deepseek_v32", "glm_moe_dsa", "hy_v4")},
    **{name: {"num_key_value_heads": 4} for name in ("glm4_moe_lite", "minicpm3", "sarvam_mla")},
    **{name: {"per_layer_config": None, "layer_types": SLIDING} for name in ("gemma4_text", "gemma4_unified_text")},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    **{name: {"layer_types": ["conv", "full_attention"] * 2} for name in ("lfm2", "lfm2_moe")},
    **dict.fromkeys(("inkling_text", "inkling2_text"), HYBRID),
    "inkling2_loop_text": {
        **HYBRID,
        "unpadded_vocab_size": VOCAB,
        "rel_extent": 64,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_gate_rank": 8,
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "gemma3n_text": {"layer_types": SLIDING},
    "bailing_hybrid": {"layer_types": LINEAR["layer_types"], "num_key_value_heads": 4},
    "kimi_linear": {**LINEAR, "num_key_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4},
    "longcat_flash": {**LATENT, "moe_topk": 2, "zero_expert_num": 2, "num_layers": 2},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING[:2]},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16, "head_dim": 32},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0],
        "moe_layers": [1, 3],
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "pronunciation_embed_dim": 64,
        "shape_vocab_size": 20,
        "shape_embed_dim": 64,
        "enable_pronunciation": False,
        "enable_shape": False,
    },
}
# Not built, or not worth it.
LEFT_OUT = {
    "xmod": "needs a language to be chosen",
    "falcon_h1": "its states take minutes without compiled kernels",
    "olmo_hybrid": "its states take minutes without compiled kernels",
    "nemotron_h": "its states take minutes without compiled kernels",
}


class NotTiny(Exception):
    """There is no tiny model of this type; says why."""


def model_types() -> list[str]:
    """All types that `AutoModelForCausalLM` builds in this version of transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes):
    """The config of a tiny model; raises whatever the config class finds wrong."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    wanted = {name: size for name, size in SIZES.items() if _has(default, name)}
    return kind(**{**wanted, **SPECIAL.get(model_type, {}), **changes})


def _has(config, name: str) -> bool:
    """Whether the config has a field of that name that can be set."""
    attribute = getattr(type(config), name, None)
    if isinstance(attribute, property) and attribute.fset is None:
        return False
    try:
        return hasattr(config, name)
    except Exception:  # fields that differ from layer to layer refuse to be read
        return True


def build(model_type: str, seed: int = 1, **changes) -> torch.nn.Module:
    """A tiny random model in eval mode, or `NotTiny`."""
    if model_type in LEFT_OUT:
        raise NotTiny(LEFT_OUT[model_type])
    try:
        config = tiny_config(model_type, **changes)
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
        if size > MAX_PARAMETERS:
            parts = " of several parts" if getattr(config, "sub_configs", None) else ""
            raise NotTiny(f"{size:,} parameters: a model{parts} whose sizes go by other names")
        model = AutoModelForCausalLM.from_config(config).eval().float()
    except NotTiny:
        raise
    except Exception as error:
        raise NotTiny(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from None
    randomize(model, seed, {})
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return model
