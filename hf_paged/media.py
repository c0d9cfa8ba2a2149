"""Images, sound and the like that come with a prompt: what of them goes into the K and V of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_paged import compat
from hf_paged.core.prefix import KEY_BYTES, pack_tokens
from hf_paged.forward import TOKEN_TYPES, ModelCall

_PLAIN_KINDS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Media:
    """What a prompt consists of beside its token ids, all rows of which are the same.

    Attributes:
        given: the arguments that they are, for one row.
        names: arguments that go into the tokens that stand for them, and are not given again to what follows.
        stop: columns up to the last of these tokens.
        digest: of all that the K and V of the first `stop` columns depend on.
        shifts: of each plane of position ids, how far they are ahead of the columns behind these.
    """

    given: dict[str, Any]
    names: frozenset[str]
    stop: int
    digest: bytes
    shifts: list[int]

    def root(self, key: bytes) -> bytes:
        """Where prompts that begin with these media are found, of those that are found under the root `key`."""
        return blake2b(key + self.digest, digest_size=KEY_BYTES).digest()


def media_of(
    config: PreTrainedConfig, request: ModelCall, names: Sequence[str], alone: Mapping[str, Any] | None
) -> Media | None:
    """The media that the arguments `names` of a prompt are, or go with; `None` where that cannot be told.

    `alone`: what they are for one row, where several came of one.
    """
    types = [request.kwargs[name][..., :1, :] for name in TOKEN_TYPES if name in names]
    others = [name for name in sorted(names) if name not in TOKEN_TYPES]
    values = request.kwargs if request.rows == 1 else alone or {}
    dropped = compat.MEDIA_INPUTS.intersection(names)
    if not dropped or not values.keys() >= set(others) or any(each.shape[-1] != request.tokens for each in types):
        return None
    ids, positions = request.inputs[0].tolist(), request.positions
    if positions is not None:
        positions = positions[..., :1, :]
    stands_for = compat.media_tokens(config)
    columns = [column for column, token in enumerate(ids) if token in stands_for]
    columns += [int(each.reshape(-1, request.tokens).any(dim=0).nonzero().max()) for each in types]
    stop = max(columns, default=-1) + 1
    shifts = _shifts(positions, stop, request.tokens)
    if not 0 < stop < request.tokens or shifts is None:
        return None
    given = {name: values[name] for name in others}
    try:
        content = _content([given, pack_tokens(ids[:stop]), [each[..., :stop] for each in types]])
        content += _content(None if positions is None else positions[..., : stop + 1])
    except TypeError:
        return None
    return Media(given, dropped, stop, blake2b(content, digest_size=KEY_BYTES).digest(), shifts)


def copied(value: Any) -> Any:
    """`value`, with mappings of its own: stock repeats what an encoder has put out in place."""
    if not isinstance(value, Mapping):
        return value
    twin = copy(value)
    for name, inner in value.items():
        twin[name] = copied(inner)
    return twin


def _shifts(positions: torch.Tensor | None, stop: int, tokens: int) -> list[int] | None:
    """How far each plane's positions are ahead of the columns from `stop` on; `None` where not all are as far."""
    if positions is None:
        return [0]
    if positions.is_floating_point() or positions.shape[-1] != tokens:
        return None
    ahead = (positions - torch.arange(tokens, device=positions.device)).reshape(-1, tokens)[:, stop:].tolist()
    return [plane[0] for plane in ahead] if all(len(set(plane)) == 1 for plane in ahead) else None


def _content(value: Any) -> bytes:
    """Bytes that differ for values that differ. Raises `TypeError` where it is not known what makes them differ."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        return f"{plain.dtype} {list(plain.shape)} ".encode() + plain.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):  # outputs of an encoder
        return _content([*value, *value.values()])
    if isinstance(value, list | tuple):
        parts = list(map(_content, value))
        return repr([len(part) for part in parts]).encode() + b"".join(parts)
    if isinstance(value, bytes):
        return value
    if type(value) in _PLAIN_KINDS:
        return repr(value).encode()
    raise TypeError(f"a {type(value).__name__}")
