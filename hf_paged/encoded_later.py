"""What encoders make of images and the like, from transformers 5.24 on before the prompt: only where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import wraps
from types import SimpleNamespace
from typing import Any

# An encoder and its arguments.
Source = tuple[Callable[..., Any], dict[str, Any]]


class EncodedLater(dict[str, Any]):
    """What encoders put out, by kind of media: computed when it is first looked at, if ever.

    A prompt whose images were seen before is found again by the pixels, `inputs`. What is made of it like any other
    mapping, as accelerate's hooks make one on other devices, holds what was computed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sources: dict[str, Source] = {}
        self._pending: set[str] = set()  # kinds that were not looked at yet

    @classmethod
    def of(cls, sources: Mapping[str, Source]) -> EncodedLater:
        """Of each kind, the encoder and its arguments."""
        later = cls.fromkeys(sources)
        later._sources, later._pending = dict(sources), set(sources)
        return later

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """Of each kind that is encoded, the arguments of the encoder."""
        return {kind: arguments for kind, (_, arguments) in self._sources.items()}

    def of_others(self, change: Callable[[Any], Any]) -> EncodedLater:
        """What the encoders make of other arguments: of what `change` makes of each."""
        return EncodedLater.of(
            {
                kind: (encode, {name: change(value) for name, value in arguments.items()})
                for kind, (encode, arguments) in self._sources.items()
            }
        )

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # or `dict(...)` would not look by `__getitem__`

    def __getitem__(self, name: str) -> Any:
        if name in self._pending:
            encode, arguments = self._sources[name]
            self._pending.remove(name)
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
        twin._sources, twin._pending = self._sources, set(self._pending)
        return twin


def encoded_later(model: Any, prepare: Callable[[Any, dict[str, Any]], Any], model_kwargs: dict[str, Any]) -> Any:
    """What stock's `prepare` makes of the arguments of a call, with encoders that run when their output is needed."""
    sources: dict[str, Source] = {}

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
