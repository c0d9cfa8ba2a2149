"""Media taken apart: which of a prompt's columns stand for which images, and the arguments for some of them alone.

Arguments say nothing about that, but an encoder makes as many features of an image as there are columns for it, in the
order of the rows. Where all images are as large, or a grid says how large each is, it follows which columns are whose:

    units of the arguments      [ image 0 ][ image 1 ][ image 2 ]
    columns of row 0            text 0 0 0 0 text 1 1 1 1 2 2 2 2 text      parts: image 0, images 1 and 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from hf_paged.encoded_later import EncodedLater


class Part(NamedTuple):
    """Columns of a row, text between them included, that stand for these units of the media and for no other ones."""

    columns: range
    units: range


@dataclass(frozen=True)
class Units:
    """Equal images, or tiles of such, that arguments consist of, or images of unequal size.

    Attributes:
        axis: of all tensors, along which one unit follows the other.
        sizes: of each unit, in a tensor that is as long as all of them together; 1 in one of a row a unit.
    """

    axis: int
    sizes: list[int]

    def take(self, value: Any, units: Sequence[int]) -> Any:
        """The share of these units, in this order, of an argument; what is no tensor is for all of them."""
        if isinstance(value, EncodedLater):
            return value.of_others(lambda argument: self.take(argument, units))
        if not isinstance(value, torch.Tensor):
            return value
        per_unit = value.shape[self.axis] == len(self.sizes)
        bounds = [*accumulate([1] * len(self.sizes) if per_unit else self.sizes, initial=0)]
        stretches = [range(bounds[first], bounds[stop]) for first, stop in _runs(units)]
        shares = [value.narrow(self.axis, each.start, len(each)) for each in stretches]
        return shares[0] if len(shares) == 1 else torch.cat(shares, dim=self.axis)


def units_of(given: Mapping[str, Any]) -> Units | None:
    """How arguments may be taken apart; `None` where that is not certain."""
    tensors = _tensors(given)
    pictures = [each for each in tensors or () if each.is_floating_point() and each.dim() > 1]
    if tensors is None or len(pictures) != 1 or not all(each.dim() for each in tensors):
        return None  # of images and sounds it is not clear whose columns are whose
    (picture,), others = pictures, [each for each in tensors if each is not pictures[0]]
    for grid in others:
        if grid.dim() == 2 and grid.shape[1] == 3 and not grid.is_floating_point():
            sizes = grid.prod(dim=1).tolist()
            if min(sizes) > 0 and sum(sizes) == len(picture) and all(len(each) == len(sizes) for each in others):
                return Units(0, sizes)
    # Images or tiles of one row, behind an axis for rows.
    axis = int(picture.dim() == 5 and len(picture) == 1 and all(each.shape[:2] == picture.shape[:2] for each in others))
    count = picture.shape[axis]
    if not count or not all(each.shape[axis] == count and _is_uniform(each, axis) for each in others):
        return None  # where sizes or masks differ, so may the numbers of columns
    return Units(axis, [1] * count)


def _tensors(given: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """All tensors of arguments; `None` where there is something else that consists of several."""
    found: list[torch.Tensor] = []
    for value in given.values():
        if isinstance(value, EncodedLater) and len(value) == len(value.inputs) == 1:
            (arguments,) = value.inputs.values()
            inner = _tensors(arguments)
            if inner is None:
                return None
            found += inner
        elif isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, Mapping | list | tuple):
            return None
    return found


def _is_uniform(tensor: torch.Tensor, axis: int) -> bool:
    return bool((tensor == tensor.narrow(axis, 0, 1)).all())


def parts_of(rows: Sequence[Sequence[int]], units: Units | None) -> list[list[Part]] | None:
    """The parts of each row, of which the `rows` are the columns that stand for media, in order.

    Of one row that cannot be taken apart, one part; `None` where it is not known which of several rows media are of.
    """
    if not any(rows):
        return None
    parts = None if units is None else _parts_of(rows, units)
    if parts is None and len(rows) == 1:
        return [[Part(range(rows[0][0], rows[0][-1] + 1), range(1 if units is None else len(units.sizes)))]]
    return parts


def _parts_of(rows: Sequence[Sequence[int]], units: Units) -> list[list[Part]] | None:
    total, size = sum(map(len, rows)), sum(units.sizes)
    ends = {place * total: unit for unit, place in enumerate(accumulate(units.sizes), start=1)}
    stretches = [[*_runs(row)] for row in rows]
    stops = {place * size for place in accumulate(stop - start for row in stretches for start, stop in row)}
    if not (stops <= ends.keys() or ends.keys() <= stops):
        return None  # units end within stretches, and stretches within units: there are other features than columns
    found: list[list[Part]] = []
    columns = unit = 0
    for row in stretches:
        parts, first = [], None
        for start, stop in row:
            columns += stop - start
            first = start if first is None else first
            end = ends.get(columns * size)
            if end is not None:
                parts.append(Part(range(first, stop), range(unit, end)))
                unit, first = end, None
        if first is not None:
            return None
        found.append(parts)
    return found


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where stretches of adjacent numbers begin and end."""
    edges = [i for i, (one, other) in enumerate(pairwise(numbers), start=1) if other != one + 1]
    for first, last in pairwise([0, *edges, len(numbers)]):
        if last > first:
            yield numbers[first], numbers[last - 1] + 1


def joined(parts: Sequence[Part], is_text: Callable[[range], bool]) -> list[Part]:
    """The parts of a row, those of them in one between which there is something else than text, by `is_text`."""
    found: list[Part] = []
    for part in parts:
        if found and not is_text(range(found[-1].columns.stop, part.columns.start)):
            last = found.pop()
            part = Part(range(last.columns.start, part.columns.stop), range(last.units.start, part.units.stop))
        found.append(part)
    return found
