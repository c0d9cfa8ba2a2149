"""Images, sound and the like that come with a prompt: what of them goes into the K and V of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from hf_paged import compat
from hf_paged.core.prefix import KEY_BYTES, pack_tokens, unpack_tokens
from hf_paged.encoded_later import EncodedLater
from hf_paged.forward import TOKEN_TYPES, ModelCall
from hf_paged.media_parts import Part, Units, joined, parts_of, units_of
from hf_paged.token_names import media_tokens
from hf_paged.trial import MIN_TRIAL_TOKENS

_PLAIN_KINDS = (type(None), bool, int, float, str)
# Tokens that media must stand for: they are named by a digest, of which four hold 128 bits.
MIN_MEDIA_TOKENS = 4
_DIGEST_BYTES = 64


class Alone(NamedTuple):
    """The arguments of a call for its `rows` of `columns`, before each was repeated for samples or beams."""

    rows: int
    columns: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Media:
    """What a prompt consists of beside its token ids.

    Rows are those before each was repeated `repeats` times.

    Attributes:
        given: the arguments that media are.
        names: of all arguments that say more than tokens do.
        units: how the arguments may be taken apart.
        parts: of each row.
        columns: of the prompt.
        ids: of each row, padding left out, those of the media replaced by a digest of all that goes into their K and V.
        shifts: of each row, how far each plane of position ids is ahead of the columns behind the media.
        apart: whether K and V of some media are known not to depend on those behind them, nor on other rows'.
    """

    given: dict[str, Any]
    names: frozenset[str]
    units: Units | None
    parts: list[list[Part]]
    columns: int
    ids: list[list[int]]
    shifts: list[list[float]]
    repeats: int
    apart: bool = False

    @property
    def stop(self) -> int:
        """Columns up to the end of all media."""
        return max(part.columns.stop for parts in self.parts for part in parts)

    @cached_property
    def inner_cuts(self) -> list[int]:
        """Columns before the last media behind which such a prompt may be cut in two, if that was found to be right."""
        paddings = [self.columns - len(ids) for ids in self.ids]
        starts = {
            part.columns.start
            for parts, padding in zip(self.parts, paddings, strict=True)
            for part in parts
            if part.columns.start > padding
        }
        return sorted(start for start in starts if not self.reaches_over(start))

    @property
    def trial_cuts(self) -> list[int]:
        """Where a prompt is cut to find that out."""
        return sorted({*self.inner_cuts[:1], *self.inner_cuts[-1:], self.stop})

    def reaches_over(self, column: int) -> bool:
        """Whether some part has columns before and behind the begin of this one."""
        return any(part.columns.start < column < part.columns.stop for parts in self.parts for part in parts)

    def cut(self, columns: int) -> int:
        """As many of the first `columns` may go through the model without the others."""
        places = [columns, *(start for start in self.inner_cuts[::-1] if start < columns)] if self.apart else [columns]
        least = 0 if self.apart else self.stop
        return next((each for each in places if each >= least and not self.reaches_over(each)), 0)

    @property
    def keys(self) -> list[frozenset[str]]:
        """What is known of cuts is known by these: by that of `key`, and those of the inner ones."""
        bounds = [part.columns for parts in self.parts for part in parts]
        behind_text = {all(each.start >= cut for each in bounds) for cut in self.inner_cuts}
        notes = {True: "text before images", False: "images on both sides"}
        return [self.key, *(self.key | {note} for is_text, note in notes.items() if is_text in behind_text)]

    @property
    def key(self) -> frozenset[str]:
        """What is known of cuts behind all media, and of equal rows, is known by this."""
        notes = {"several rows"} if len(self.parts) > 1 else set()
        if any(len(ids) < self.columns for ids in self.ids):
            notes.add("padding")
        return self.names | notes

    @property
    def is_one(self) -> bool:
        """Whether there is nothing that could be parted."""
        return len(self.parts) == 1 and not self.inner_cuts

    def may_part(self, obstacles: Mapping[frozenset[str], str | None]) -> bool:
        """Whether that is known to be right. `obstacles`: what is known, by `keys`."""
        return self.is_one or all(obstacles.get(key, "") is None for key in self.keys)

    @cached_property
    def _shown(self) -> bytes:
        """What differs for other media."""
        rows = zip(self.parts, self.ids, strict=True)
        shown = [ids[column - self.columns] for parts, ids in rows for part in parts for column in part.columns]
        return pack_tokens(shown)

    def roots(self, key: bytes, row: int) -> list[tuple[bytes, int]]:
        """Where to look for a row, of what is found under the root `key`, and for how many columns at most.

        First where it is kept. Not beside text alone: who knows what a model does to that where there are images. As
        long as nobody knows what it does to one image where there is another, not beside other images either.
        """
        beside = blake2b(key + _content(sorted(self.names)), digest_size=KEY_BYTES).digest()
        if self.is_one:
            return [(beside, self.columns)]
        alone = blake2b(beside + self._shown, digest_size=KEY_BYTES).digest()
        if not self.apart:
            return [(alone, self.columns)]
        parts = self.parts[row // self.repeats]
        text = parts[0].columns.start if parts else self.columns
        return [(beside, self.columns), *([(alone, self.columns)] if len(self.parts) == 1 else []), (key, text)]

    def shifts_of(self, row: int) -> list[float]:
        """Those of a row, one of those after they were repeated."""
        return self.shifts[row // self.repeats]

    def between(self, columns: range, rows: Sequence[int]) -> dict[str, Any]:
        """The arguments for the media in these columns of `rows`, which are those after they were repeated."""
        first = sorted({row // self.repeats for row in rows})
        units = [
            unit
            for row in first
            for part in self.parts[row]
            if columns.start <= part.columns.start and part.columns.stop <= columns.stop
            for unit in part.units
        ]
        if not units:
            return {name: value for name, value in self.given.items() if name not in compat.MEDIA_INPUTS}
        if self.units is None or units == [*range(len(self.units.sizes))]:
            return self.given
        return {name: self.units.take(value, units) for name, value in self.given.items()}


def media_of(config: PreTrainedConfig, request: ModelCall, names: Sequence[str], alone: Alone | None) -> Media | None:
    """The media that the arguments `names` of a prompt are, or go with; `None` where that cannot be told.

    `alone`: what they are for fewer rows, where several came of each.
    """
    count, values = request.rows, request.kwargs
    if alone is not None and alone.columns == request.tokens:  # a chunk of the prompt is given features of its own
        count, values = alone.rows, alone.arguments
    repeats, others = request.rows // count, [name for name in sorted(names) if name not in TOKEN_TYPES]
    types = [request.kwargs[name] for name in TOKEN_TYPES if name in names]
    if compat.MEDIA_INPUTS.isdisjoint(names) or count * repeats != request.rows or not values.keys() >= set(others):
        return None
    if any(each.shape[-1] != request.tokens for each in (*types, request.positions) if each is not None):
        return None
    given = {name: values[name] for name in others}
    stands_for, units = media_tokens(config), units_of(given)
    rows = [_Row.of(request, row, types, stands_for) for row in range(0, request.rows, repeats)]
    parts = parts_of([row.columns for row in rows], units)
    if parts is None:
        return None
    order = [unit for row in parts for _ in range(repeats) for part in row for unit in part.units]
    if repeats > 1 and not all(_is_share(request.kwargs[name], given[name], units, order) for name in others):
        return None
    parts = [row.with_short_text(joined(each, row.is_even)) for each, row in zip(parts, rows, strict=True)]
    shifts = [row.shifts(each) for each, row in zip(parts, rows, strict=True)]
    if None in shifts:
        return None
    try:
        ids = [row.named(each, given, units) for each, row in zip(parts, rows, strict=True)]
    except TypeError:
        return None
    if None in ids:
        return None
    return Media(given, frozenset(names), units, parts, request.tokens, ids, shifts, repeats)


def _is_share(repeated: Any, value: Any, units: Units | None, order: Sequence[int]) -> bool:
    """Whether an argument was repeated in the `order` of the rows; older versions repeat one image after the other."""
    if not isinstance(value, torch.Tensor) or not isinstance(repeated, torch.Tensor):
        return True
    if units is None:
        return torch.equal(torch.cat([value] * len(order)), repeated)
    return torch.equal(units.take(value, order).flatten(0, units.axis), repeated.flatten(0, units.axis))


@dataclass(frozen=True)
class _Row:
    """One row of a prompt.

    Attributes:
        ids: of its tokens, padding included.
        padding: columns before the first real one.
        columns: those of the media.
        types: `[tokens]`, of each kind of them.
        positions: `[planes, tokens]`, if they are given.
        ahead: how far these are ahead of the real columns.
    """

    ids: list[int]
    padding: int
    columns: list[int]
    types: list[torch.Tensor]
    positions: torch.Tensor | None
    ahead: torch.Tensor

    @classmethod
    def of(cls, request: ModelCall, row: int, types: list[torch.Tensor], stands_for: set[int]) -> _Row:
        """Row number `row`; `stands_for`: the ids of the tokens that stand for media."""
        types = [each[row if len(each) > 1 else 0] for each in types]
        ids, tokens = request.inputs[row].tolist(), request.tokens
        padding = 0 if request.new_columns is None else int((~request.new_columns[row]).sum())
        is_media = torch.tensor([token in stands_for for token in ids], device="cpu")
        for each in types:
            is_media |= each.bool().cpu()
        is_media[:padding] = False
        positions, ahead = request.positions, torch.zeros(1, tokens, device="cpu")
        if positions is not None:
            planes = positions.reshape(-1, *positions.shape[-2:])
            positions = planes[:, row if planes.shape[1] > 1 else 0].cpu()
            exact = positions.double() if positions.is_floating_point() else positions  # qwen3_omni's mostly are whole
            ahead = exact - torch.arange(-padding, tokens - padding, device="cpu")
        return cls(ids, padding, is_media.nonzero().flatten().tolist(), types, positions, ahead)

    def is_even(self, columns: range) -> bool:
        """Whether positions of these columns are all as far ahead, in each plane."""
        ahead = self.ahead[:, columns.start : columns.stop]
        return bool((ahead == ahead[:, :1]).all())

    def with_short_text(self, parts: list[Part]) -> list[Part]:
        """The parts, with the text before them where it is too short to find out what it is without them."""
        if not parts or parts[0].columns.start - self.padding >= MIN_TRIAL_TOKENS:
            return parts
        return [parts[0]._replace(columns=range(self.padding, parts[0].columns.stop)), *parts[1:]]

    def shifts(self, parts: Sequence[Part]) -> list[float] | None:
        """How far positions are ahead behind the media; `None` where that differs, or where text before has others."""
        first = self.padding
        start, stop = (parts[0].columns.start, parts[-1].columns.stop) if parts else (first + 1, first)
        if stop == len(self.ids) or self.ahead[:, first:start].any() or not self.is_even(range(stop, len(self.ids))):
            return None
        return self.ahead[:, stop].tolist()

    def named(self, parts: Sequence[Part], given: Mapping[str, Any], units: Units | None) -> list[int] | None:
        """The ids, with names for media; `None` where some stand for too few tokens. Raises as `_content` does."""
        ids, places = self.ids.copy(), set(self.columns)
        for columns, share in parts:
            arguments = given if units is None else {name: units.take(value, share) for name, value in given.items()}
            start, stop = columns.start, columns.stop
            content = [arguments, pack_tokens(ids[start:stop]), [each[start:stop] for each in self.types]]
            content.append(None if self.positions is None else self.positions[:, start : stop + 1])
            name = unpack_tokens(blake2b(_content(content), digest_size=_DIGEST_BYTES).digest())
            mine = [column for column in columns if column in places]
            if len(mine) < MIN_MEDIA_TOKENS:
                return None
            for i, column in enumerate(mine):
                ids[column] = name[i % len(name)]
        return ids[self.padding :]


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
