"""Images, sound and the like that come with a prompt: what of them goes into the K and V of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import wraps
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_paged import compat
from hf_paged.core.prefix import KEY_BYTES, pack_tokens
from hf_paged.forward import TOKEN_TYPES, ModelCall
from hf_paged.token_names import media_tokens

_PLAIN_KINDS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Media:
    """What a prompt consists of beside its token ids, all rows of which are the same.

    Attributes:
        given: the arguments that they are, for one row.
        names: of all arguments that say more than tokens do.
        stop: columns up to the last of these tokens.
        digest: of all that the K and V of the first `stop` columns depend on.
        shifts: of each plane of position ids, how far they are ahead of the columns behind these.
    """

    given: dict[str, Any]
    names: frozenset[str]
    stop: int
    digest: bytes
    shifts: list[float]

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
    if compat.MEDIA_INPUTS.isdisjoint(names) or not values.keys() >= set(others):
        return None
    if any(each.shape[-1] != request.tokens for each in types):
        return None
    ids, positions = request.inputs[0].tolist(), request.positions
    if positions is not None:
        positions = positions[..., :1, :]
    stands_for = media_tokens(config)
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
    return Media(given, frozenset(names), stop, blake2b(content, digest_size=KEY_BYTES).digest(), shifts)


class EncodedLater(dict[str, Any]):
    """What encoders put out, by kind of media: computed when it is first looked at, if ever.

    A prompt whose images were seen before is found again by the pixels, `inputs`. What is made of it like any other
    mapping, as accelerate's hooks make one on other devices, holds what was computed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sources: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
        self.inputs: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, sources: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]]) -> EncodedLater:
        """Of each kind, the encoder and its arguments."""
        later = cls.fromkeys(sources)
        later._sources = dict(sources)
        later.inputs = {kind: arguments for kind, (_, arguments) in sources.items()}
        return later

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # or `dict(...)` would not look by `__getitem__`

    def __getitem__(self, name: str) -> Any:
        if name in self._sources:
            encode, arguments = self._sources.pop(name)
            self[name] = encode(**arguments)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()

    def repeated(self, repeat: Callable[[dict[str, Any]], dict[str, Any]]) -> EncodedLater:
        """What `repeat` makes of it, kind by kind and as late; it may change what it is given."""

        def one(kind: str) -> Any:
            return repeat({kind: copied(self[kind])})[kind]

        return EncodedLater.of({kind: (one, {"kind": kind}) for kind in self})

    def copy(self) -> EncodedLater:
        """One that computes for itself what was not computed yet."""
        twin = EncodedLater({name: dict.__getitem__(self, name) for name in self})
        twin._sources, twin.inputs = dict(self._sources), self.inputs
        return twin


def encoded_later(model: Any, prepare: Callable[[Any, dict[str, Any]], Any], model_kwargs: dict[str, Any]) -> Any:
    """What stock's `prepare` makes of the arguments of a call, with encoders that run when their output is needed."""
    sources: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}

    def noting(kind: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)
        def note(**arguments: Any) -> None:
            sources[kind] = encode, arguments

        return note

    encoders = {f"get_{kind}_features": kind for kind in model.input_modalities}
    noting_encoders = {
        name: noting(kind, getattr(model.base_model, name))
        for name, kind in encoders.items()
        if hasattr(model.base_model, name)
    }
    stand_in = SimpleNamespace(input_modalities=model.input_modalities, base_model=SimpleNamespace(**noting_encoders))
    prepared = prepare(stand_in, model_kwargs)
    given = prepared["mm_encoder_outputs"]
    if sources:
        prepared["mm_encoder_outputs"] = later = EncodedLater.of(sources)
        later.update({name: value for name, value in given.items() if name not in sources})
    return prepared


def copied(value: Any) -> Any:
    """`value`, with mappings of its own: stock repeats what an encoder has put out in place."""
    if isinstance(value, EncodedLater):
        return value.copy()
    if not isinstance(value, Mapping):
        return value
    twin = copy(value)
    for name, inner in value.items():
        twin[name] = copied(inner)
    return twin


def _shifts(positions: torch.Tensor | None, stop: int, tokens: int) -> list[float] | None:
    """How far each plane's positions are ahead of the columns from `stop` on; `None` where not all are as far."""
    if positions is None:
        return [0]
    if positions.shape[-1] != tokens:
        return None
    exact = positions.double() if positions.is_floating_point() else positions  # qwen3_omni's are, and mostly whole
    ahead = (exact - torch.arange(tokens, device=positions.device)).reshape(-1, tokens)[:, stop:].tolist()
    return [plane[0] for plane in ahead] if all(len(set(plane)) == 1 for plane in ahead) else None


def _content(value: Any) -> bytes:
    """Bytes that differ for values that differ. Raises `TypeError` where it is not known what makes them differ."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        return f"{plain.dtype} {list(plain.shape)} ".encode() + plain.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, EncodedLater):
        return _content([value.inputs, {name: value[name] for name in value if name not in value.inputs}])
    if isinstance(value, Mapping):  # outputs of an encoder, or arguments
        return _content([*value, *value.values()])
    if isinstance(value, list | tuple):
        parts = list(map(_content, value))
        return repr([len(part) for part in parts]).encode() + b"".join(parts)
    if isinstance(value, bytes):
        return value
    if type(value) in _PLAIN_KINDS:
        return repr(value).encode()
    raise TypeError(f"a {type(value).__name__}")
