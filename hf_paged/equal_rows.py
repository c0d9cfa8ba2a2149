"""Rows that a stock-shaped pass has computed one by one and that came out the same: stored once from then on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_paged.cache import PagedCache
from hf_paged.dense import DenseView


def share_equal_rows(cache: PagedCache) -> None:
    """Let rows whose K and V are equal bit by bit, in all layers, hold the same blocks.

    Whatever else their prompts consist of, images or inputs of an encoder, has gone into these. States are left alone,
    and so are rows with blocks on the host.
    """
    if any(chain.reaches_host for table in cache.tables for chain in table.chains):
        return
    num_groups = len(cache.pool.manager.pools)
    views = [DenseView(cache.tables, group, cache.dense_len, cache.columns) for group in range(num_groups)]
    groups: list[list[int]] = [list(range(len(cache.tables)))]
    if cache.columns is not None:
        groups = _partition(groups[0], cache.columns)
    for store in filter(None, cache.pool.stores):
        for memory in (store.keys, store.values):
            several = [group for group in groups if len(group) > 1]
            if not several:
                return
            rows = views[store.group].of(memory)
            groups = [part for group in several for part in _partition(group, rows)]
    owners = list(range(len(cache.tables)))
    for group in groups:
        for row in group:
            owners[row] = group[0]
    cache.sequences.select(owners)


def _partition(rows: Iterable[int], content: torch.Tensor) -> list[list[int]]:
    """The rows in groups of equal `content [rows, ...]`."""
    groups: list[list[int]] = []
    for row in rows:
        equal = (group for group in groups if torch.equal(content[group[0]], content[row]))
        group = next(equal, None)
        if group is None:
            groups.append(group := [])
        group.append(row)
    return groups
