"""Where prompts are looked for and kept in the prefix index: those with media under roots of their own."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

from hf_paged.cache import PagedCache
from hf_paged.core.table import BlockTable
from hf_paged.prompt import Prompt


def placed(prompt: Prompt, cache: PagedCache, apart: bool) -> Prompt:
    """A prompt, whose media are known one by one if they are `apart`; the tables are told where it is kept then."""
    media = replace(prompt.media, apart=apart)
    for row, table in enumerate(cache.tables):
        (table.root, _), *_ = media.roots(cache.root.key, row)
        table.shifts = media.shifts_of(row)
    return prompt._replace(media=media)


def match(prompt: Prompt, cache: PagedCache, table: BlockTable, row: int, most: int) -> int:
    """Let an empty table hold what earlier calls have computed of a row, at most so many tokens; returns these.

    What is found elsewhere than where the table is kept is kept there, too, from then on.
    """
    ids, look_up, crop = prompt.ids[row], cache.pool.match, cache.pool.manager.crop
    found, mine = look_up(table, ids, most), table.root
    if prompt.media is None or found == most:
        return found
    best = found, mine
    for root, columns in prompt.media.roots(cache.root.key, row)[1:]:
        limit = min(most, columns - prompt.padding(row))
        if best[0] < limit:
            crop(table, 0)
            table.root = root
            found = look_up(table, ids, limit)
            best = max(best, (found, root), key=itemgetter(0))
    if best != (found, table.root):
        crop(table, 0)
        table.root = best[1]
        found = look_up(table, ids, best[0])
    if table.root != mine:
        table.root = mine
        table.keys.clear()
    return found
