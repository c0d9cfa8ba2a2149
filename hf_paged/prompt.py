"""What a stock-shaped pass is over: whether token ids say all that its K and V depend on, and which rows are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hf_paged.cache import PagedCache
from hf_paged.forward import KNOWN_ARGUMENTS, ModelCall, at_usual_positions, says_nothing
from hf_paged.media import Media, media_of


class Prompt(NamedTuple):
    """A prompt whose token ids, padding, position ids and media, if there are any, say all that K and V depend on.

    Attributes:
        call: its pass.
        keep: as many of its last columns must be computed, for their logits.
        owners: of each row, the first one that is equal.
        ids: of each row's tokens, padding left out, where they and `media` say it all.
        media: what else it consists of.
    """

    call: ModelCall
    keep: int
    owners: list[int]
    ids: list[list[int]] | None
    media: Media | None

    @property
    def rows(self) -> list[int]:
        """Those that are not equal to one before them."""
        return sorted(set(self.owners))

    @property
    def names(self) -> frozenset[str]:
        """What is known of such prompts is known by these."""
        return frozenset() if self.media is None else self.media.key

    def cut(self, columns: int) -> int:
        """As many of the first `columns` may go through the model without the others."""
        return columns if self.media is None else self.media.cut(columns)

    @property
    def least_columns(self) -> int:
        """As many are tried out together."""
        return 1 if self.media is None else self.media.stop

    def padding(self, row: int) -> int:
        """Columns without a token, which come before the row's first one where `ids` say it all."""
        new = self.call.new_columns
        return 0 if new is None else self.call.tokens - int(new[row].sum())


def prompt_of(
    model: PreTrainedModel,
    request: ModelCall,
    cache: PagedCache,
    ids: list[list[int]] | None,
    ignores_padding: Callable[[], bool],
) -> Prompt | None:
    """The prompt that a pass is over; `None` where more may matter, or where all of its logits are wanted.

    `ids`: what `described` gave. `ignores_padding`: as there.
    """
    keep = request.kwargs.get("logits_to_keep") or (1 if request.last_only else 0)
    if model.training or not isinstance(keep, int) or not 0 < keep < request.tokens:
        return None
    if request.input_name != "input_ids" or request.kwargs.get("return_dict") is False or not _goes_by_columns(request):
        return None
    others, owners = _unusual(request), _owners(request)
    if not others:
        return Prompt(request, keep, owners, ids, None)
    new = request.new_columns
    if not _hides_nothing(request) and (new is None or not _is_padded_left(request.mask, new) or not ignores_padding()):
        return None
    media = media_of(model.config, request, others, cache.alone)
    if media is None:
        return None
    ids = [media.ids[row // media.repeats] for row in range(request.rows)]
    owners = _first_equal([owner, *each] for owner, each in zip(owners, ids, strict=True))
    return Prompt(request, keep, owners, None if cache.root is None else ids, media)


def described(request: ModelCall, cache: PagedCache, ignores_padding: Callable[[], bool]) -> list[list[int]] | None:
    """Ids of each row's new tokens, where these and those before them say all that their K and V depend on.

    `ignores_padding`: asked whether that may be so although there is padding on the left.
    """
    if cache.root is None or request.input_name != "input_ids" or _unusual(request) or not request.tokens:
        return None
    if request.positions is not None and request.positions.dim() < 2:
        return None
    columns = cache.columns_with(request.new_columns, request.tokens)
    if columns is None:
        is_plain = _hides_nothing(request) and at_usual_positions(request, cache)
        return request.inputs.tolist() if is_plain else None
    if not _is_padded_left(request.mask, columns) or not columns.any(dim=1).all() or not ignores_padding():
        return None
    places = [row.nonzero().flatten().tolist() for row in columns[:, cache.dense_len :]]
    if request.positions is not None:
        planes = request.positions.reshape(-1, *request.positions.shape[-2:])
        planes = planes.expand(-1, *request.inputs.shape).tolist()
        for row, (real, table) in enumerate(zip(places, cache.tables, strict=True)):
            shifts = table.shifts or [0] * len(planes)
            usual = [[table.num_tokens + shift + place for place in range(len(real))] for shift in shifts]
            if [[plane[row][column] for column in real] for plane in planes] != usual:
                return None
    listed = request.inputs.tolist()
    return [[row[column] for column in real] for row, real in zip(listed, places, strict=True)]


def _is_padded_left(mask: torch.Tensor | None, columns: torch.Tensor) -> bool:
    """Whether a mask hides no other columns than are left out, `columns [rows, columns]`, and these come first."""
    if mask is None or mask.shape != columns.shape or not torch.equal(mask.bool().cpu(), columns):
        return False
    return not bool((columns[:, :-1] & ~columns[:, 1:]).any())


def _goes_by_columns(request: ModelCall) -> bool:
    """Whether mask and position ids of a prompt, if there are any, have one number for each token."""
    mask, positions = request.mask, request.positions
    if mask is not None and mask.shape != request.inputs.shape:
        return False
    return positions is None or (positions.dim() in (2, 3) and positions.shape[-1] == request.tokens)


def _unusual(request: ModelCall) -> list[str]:
    """Names of arguments that say more than tokens do."""
    kwargs = request.kwargs
    others = [name for name, value in kwargs.items() if name not in KNOWN_ARGUMENTS]
    return [name for name in others if not says_nothing(name, kwargs[name], request)]


def _hides_nothing(request: ModelCall) -> bool:
    return request.mask is None or request.hides_nothing


def _owners(request: ModelCall) -> list[int]:
    """Of each row, the first one with equal ids, mask and positions."""
    parts = [request.inputs]
    parts += [] if request.mask is None else [request.mask]
    if request.positions is not None:
        planes = request.positions.reshape(-1, *request.positions.shape[-2:])
        parts += [plane.expand(request.inputs.shape) for plane in planes]
    return _first_equal(torch.cat([part.long() for part in parts], dim=1).tolist())


def _first_equal(rows: Iterable[Iterable[int]]) -> list[int]:
    """Of each row, the number of the first one that is equal."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(each), row) for row, each in enumerate(rows)]
