"""The token ids that configs have names for, such as that of an image's place."""

from __future__ import annotations

from transformers import PreTrainedConfig

_MEDIA_WORDS = ("image", "video", "audio", "vision", "visual", "speech")
_MARK_WORDS = ("start", "begin", "end")  # of tokens around them
_TOKEN_ENDINGS = ("_token_id", "_token_index", "_token_ids")


def named_tokens(config: PreTrainedConfig) -> dict[str, set[int]]:
    """The token ids that a config has a name for, such as that of an image's place; in molmo2 that is an alias."""
    own = vars(config)
    named = {**own, **{alias: own.get(name) for alias, name in config.attribute_map.items()}}
    listed = {name: value if isinstance(value, list | tuple) else [value] for name, value in named.items()}
    return {
        name: {token for token in tokens if isinstance(token, int)}
        for name, tokens in listed.items()
        if name.endswith(_TOKEN_ENDINGS)
    }


def media_tokens(config: PreTrainedConfig) -> set[int]:
    """The token ids in whose places features of images, sound and the like are put; in ovis2 around them, too."""
    found: set[int] = set()
    for name, tokens in named_tokens(config).items():
        if any(word in name for word in _MEDIA_WORDS) and not any(word in name for word in _MARK_WORDS):
            found |= tokens
    return found
