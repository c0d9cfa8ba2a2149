"""Attention over paged K and V on a GPU: decode, shared prefixes and prefill in one kernel, and a merge of parts.

A program takes one item of work (work.py) and one KV head. Its query heads share the rows of one tile, so that
K and V are read once for all of them, and once for all queries of the item:

    tile of 16 rows, 4 query heads a KV head      row  0  1  2  3 | 4  5  6  7 | ...
                                                query  0  0  0  0 | 1  1  1  1 |
                                                 head  0  1  2  3 | 0  1  2  3 |

    keys, values    [kv_heads, slots, dim, or bytes of a record], any strides of heads and slots
    query, out      [rows, heads, dim], any strides of rows and heads

The softmax runs in base 2 over tiles of tokens (FlashAttention-2, https://arxiv.org/abs/2307.08691). Parts of one query
are merged by log-sum-exp (Flash-Decoding; Hydragen, https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .device_formats import constants_of, load_numbers, rotated, rows_of, stride_of, takes_records
from .formats import KVRecords
from .language import dot, loop_bound
from .launch import DTYPES, is_interpreted
from .packed import in_order, is_packed, no_sums, packed_query, packed_scores, packed_sums
from .trial import Shape, packs_right
from .tuning import MAX_DIM, PAGE_TOKENS, Tile, max_group, padded_dim
from .work import ITEM_NUMBERS, Launch, Work

_LOG2_E = math.log2(math.e)
# Parts that one program of the merge reads at a time.
_MERGED_AT_ONCE = 32


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _walk(
    sums, b_max, b_sum, queries, b_unit, i_query, p_pages, p_keys, p_values,
    lo, gap_lo, gap_hi, hi, first, window, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, IS_PACKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Take indices `[lo, gap_lo)` and `[gap_hi, hi)` of the pages into the running softmax.

    `gap_lo` and `gap_hi` are multiples of pages, or `hi`. Unless `MASKED`, `[lo, hi)` are whole tiles from a page on.

    Args:
        sums: products of weights and values so far, one `[rows, BLOCK_VALUE]` or those of `packed_sums`.
        queries, b_unit: operands of the scores, and factors `[rows]` that make scores in units of base 2 of these.
    """
    begin, skipped = lo, 0
    if MASKED:  # one loop: pieces before the gap come as if they were right before its end
        start = lo // PAGE * PAGE
        before = tl.where(gap_lo > lo, gap_lo - start, 0)
        begin = gap_hi - (before + BLOCK_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        skipped = begin - start
    for i in tl.range(loop_bound(begin, INTERPRETED), loop_bound(hi, INTERPRETED), BLOCK_TOKENS, num_stages=STAGES):
        at, end = i, hi
        if MASKED:
            at, end = tl.where(i < gap_hi, i - skipped, i), tl.where(i < gap_hi, gap_lo, hi)
        o_token = at + tl.arange(0, BLOCK_TOKENS)
        inside = (o_token >= lo) & (o_token < end)
        o_page = at // PAGE + tl.arange(0, BLOCK_TOKENS // PAGE)
        if MASKED:
            i_page = tl.load(p_pages + o_page, mask=o_page * PAGE < end, other=0)
        else:
            i_page = tl.load(p_pages + o_page)
        p_key_rows = rows_of(p_keys, i_page, KEY_STRIDE, PAGE)
        p_value_rows = rows_of(p_values, i_page, VALUE_STRIDE, PAGE)
        if IS_PACKED:
            b_score = packed_scores(queries, p_key_rows, inside, KEY_DIM, BLOCK_KEY, FORMAT, MASKED, INTERPRETED)
        else:
            b_key = load_numbers(
                p_key_rows, inside, queries[0].dtype, KEY_DIM, BLOCK_KEY, FORMAT, KEY_GROUP, MASKED
            )  # fmt: skip
            b_score = tl.zeros([b_max.shape[0], BLOCK_TOKENS], dtype=tl.float32)
            b_score = dot(queries[0], tl.trans(b_key), b_score, INTERPRETED)
        b_factor = b_unit
        if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1; units and softcap are in base 2
            b_score = softcap * (2.0 * tl.sigmoid(2.0 * b_score * b_unit[:, None] / softcap) - 1.0)
            b_factor = tl.full(b_unit.shape, 1.0, dtype=tl.float32)
        if MASKED:
            visible = inside[None, :] & (o_token[None, :] <= (first + i_query)[:, None])
            if HAS_WINDOW:
                visible = visible & (o_token[None, :] > (first + i_query - window)[:, None])
            b_score = tl.where(visible, b_score, float("-inf"))
        # The factor, which is positive, is left to the exponent: one instruction less for every score.
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * b_factor)
        # Rows that have seen nothing yet have no maximum to subtract.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_score * b_factor[:, None] - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        if IS_PACKED:
            sums = packed_sums(
                b_weight, p_value_rows, inside, sums, b_decay, VALUE_DIM, BLOCK_VALUE, FORMAT, MASKED, INTERPRETED
            )
        else:
            b_value = load_numbers(
                p_value_rows, inside, queries[0].dtype, VALUE_DIM, BLOCK_VALUE, FORMAT, VALUE_GROUP, MASKED
            )
            sums = (dot(b_weight.to(b_value.dtype), b_value, sums[0] * b_decay[:, None], INTERPRETED),)
        b_max = b_new_max
    return sums, b_max, b_sum


@triton.jit
def _attend_kernel(
    p_query, p_keys, p_values, p_out, p_lse, p_sinks, p_items, p_pages, p_rows,
    scale, softcap, window, heads,
    stride_query_row, stride_query_head, stride_key_head, stride_value_head,
    stride_out_row, stride_out_head,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    PAGE: tl.constexpr, ITEM: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, ROTATION: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_FINAL: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid `(items, kv_heads)`. Final results go to `rows[query]`, parts to rows of their own, with log-sum-exps."""
    p_item = p_items + tl.program_id(0) * ITEM
    i_kv_head = tl.program_id(1)
    start = tl.load(p_item)
    count = tl.load(p_item + 1)
    table = tl.load(p_item + 2)
    lo = tl.load(p_item + 3)
    hi = tl.load(p_item + 4)
    first = tl.load(p_item + 5)
    part = tl.load(p_item + 6)

    o_row = tl.arange(0, BLOCK_ROWS)
    i_query = o_row // GROUP
    i_head = (i_kv_head * GROUP + o_row % GROUP).to(tl.int64)
    is_query = i_query < count
    i_query_row = tl.load(p_rows + start + i_query, mask=is_query, other=0).to(tl.int64)
    o_key_dim = tl.arange(0, BLOCK_KEY)
    o_value_dim = tl.arange(0, BLOCK_VALUE)
    b_query = tl.load(
        p_query + (i_query_row * stride_query_row + i_head * stride_query_head)[:, None] + o_key_dim[None, :],
        mask=is_query[:, None] & (o_key_dim < KEY_DIM)[None, :],
        other=0.0,
    )
    if ROTATION > 0:  # as keys are
        b_query = rotated(b_query.to(tl.float32), ROTATION).to(b_query.dtype)
    b_unit = tl.full([BLOCK_ROWS], 1.0, dtype=tl.float32) * scale
    if IS_PACKED:
        queries, b_factor = packed_query(b_query, FORMAT)
        b_unit = b_unit * b_factor
        sums = no_sums(BLOCK_ROWS, BLOCK_TOKENS, BLOCK_VALUE, FORMAT)
    else:
        queries = (b_query,)
        sums = (tl.zeros([BLOCK_ROWS, BLOCK_VALUE], dtype=tl.float32),)
    p_head_keys = p_keys + i_kv_head.to(tl.int64) * stride_of(stride_key_head, FORMAT)
    p_head_values = p_values + i_kv_head.to(tl.int64) * stride_of(stride_value_head, FORMAT)
    p_table = p_pages + table

    # Every query of the item sees [open_lo, open_hi): whole tiles there need no mask.
    open_lo = lo
    if HAS_WINDOW:
        open_lo = tl.minimum(tl.maximum(lo, first + count - window), hi)
    open_lo = tl.minimum((open_lo + PAGE - 1) // PAGE * PAGE, hi)
    open_hi = tl.maximum(tl.minimum(hi, first + 1), open_lo)
    open_hi = open_lo + (open_hi - open_lo) // BLOCK_TOKENS * BLOCK_TOKENS

    b_max = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    sums, b_max, b_sum = _walk(
        sums, b_max, b_sum, queries, b_unit, i_query, p_table, p_head_keys, p_head_values,
        open_lo, open_hi, open_hi, open_hi, first, window, softcap,
        KEY_STRIDE, VALUE_STRIDE, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, PAGE, STAGES,
        FORMAT, KEY_GROUP, VALUE_GROUP, IS_PACKED, HAS_SOFTCAP, HAS_WINDOW, False, INTERPRETED,
    )  # fmt: skip
    sums, b_max, b_sum = _walk(
        sums, b_max, b_sum, queries, b_unit, i_query, p_table, p_head_keys, p_head_values,
        lo, open_lo, open_hi, hi, first, window, softcap,
        KEY_STRIDE, VALUE_STRIDE, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_TOKENS, PAGE, 1,
        FORMAT, KEY_GROUP, VALUE_GROUP, IS_PACKED, HAS_SOFTCAP, HAS_WINDOW, True, INTERPRETED,
    )  # fmt: skip

    b_acc = in_order(sums, FORMAT) if IS_PACKED else sums[0]
    is_empty = b_sum == 0.0
    b_out = b_acc / tl.where(is_empty, 1.0, b_sum)[:, None]
    b_lse = tl.where(is_empty, float("-inf"), b_max + tl.log2(tl.where(is_empty, 1.0, b_sum)))
    stored = is_query[:, None] & (o_value_dim < VALUE_DIM)[None, :]
    if IS_FINAL:
        if HAS_SINKS:
            b_sink = tl.load(p_sinks + i_head, mask=is_query, other=0.0).to(tl.float32) * 1.4426950408889634
            b_out = b_out / (1.0 + tl.exp2(b_sink - b_lse))[:, None]
        i_out_row = i_query_row
    else:
        i_out_row = part.to(tl.int64) + i_query
        tl.store(p_lse + i_out_row * heads + i_head, b_lse, mask=is_query)
    tl.store(
        p_out + (i_out_row * stride_out_row + i_head * stride_out_head)[:, None] + o_value_dim[None, :],
        b_out.to(p_out.dtype.element_ty),
        mask=stored,
    )


@triton.jit
def _merge_kernel(
    p_parts_out, p_parts_lse, p_out, p_sinks, p_part_starts, p_parts, p_rows, heads, stride_out_row, stride_out_head,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_PARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid `(queries, heads)`. Log-sum-exps are in base 2; those of empty parts are -inf."""
    i_query = tl.program_id(0)
    i_head = tl.program_id(1)
    o_dim = tl.arange(0, BLOCK_VALUE)
    begin = tl.load(p_part_starts + i_query)
    end = tl.load(p_part_starts + i_query + 1)
    b_acc = tl.zeros([BLOCK_VALUE], dtype=tl.float32)
    b_sum = 0.0
    b_max = float("-inf")
    if HAS_SINKS:
        b_max = tl.load(p_sinks + i_head).to(tl.float32) * 1.4426950408889634
        b_sum = 1.0
    for at in range(loop_bound(begin, INTERPRETED), loop_bound(end, INTERPRETED), BLOCK_PARTS):
        o_part = at + tl.arange(0, BLOCK_PARTS)
        is_part = o_part < end
        i_row = tl.load(p_parts + o_part, mask=is_part, other=0).to(tl.int64) * heads + i_head
        b_lse = tl.load(p_parts_lse + i_row, mask=is_part, other=float("-inf"))
        b_part = tl.load(
            p_parts_out + i_row[:, None] * VALUE_DIM + o_dim[None, :],
            mask=is_part[:, None] & (o_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        b_new_max = tl.maximum(b_max, tl.max(b_lse, 0))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_lse - b_shift)
        b_decay = tl.exp2(b_max - b_shift)
        b_acc = b_acc * b_decay + tl.sum(b_part * b_weight[:, None], 0)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 0)
        b_max = b_new_max
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)
    i_row = tl.load(p_rows + i_query).to(tl.int64)
    p_row = p_out + i_row * stride_out_row + i_head.to(tl.int64) * stride_out_head
    tl.store(p_row + o_dim, b_out.to(p_out.dtype.element_ty), mask=o_dim < VALUE_DIM)


# -- launchers ---------------------------------------------------------------------------------------------------------


def takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, records: KVRecords | None = None) -> bool:
    """Whether the kernels do `query [rows, heads, dim]` over `keys`, `values [kv_heads, slots, dim or bytes]`."""
    is_read = query.dtype == keys.dtype == values.dtype if records is None else takes_records(records)
    return (
        is_read
        and query.dtype in DTYPES
        and query.device == keys.device == values.device
        and max(_dims(keys, values, records)) <= MAX_DIM
        and query.shape[1] % keys.shape[0] == 0
        and query.shape[1] // keys.shape[0] <= max_group(query.dtype)
        and query.stride(2) == keys.stride(2) == values.stride(2) == 1
    )


def _dims(keys: torch.Tensor, values: torch.Tensor, records: KVRecords | None) -> tuple[int, int]:
    """Of K and of V."""
    return (keys.shape[2], values.shape[2]) if records is None else (records.key_dim, records.value_dim)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: Work,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    records: KVRecords | None = None,
    packed: bool | None = None,
) -> torch.Tensor:
    """Attention of `query [rows, heads, key_dim]` over paged `keys`, `values [kv_heads, slots, dim or record bytes]`.

    Args:
        work: which row sees what.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[heads]` logits that take part in the softmax and carry no value.
        records: what `keys` and `values` hold, where they hold records.
        packed: whether codes of records go into products as they are; `None`: where that is there, and right.

    Returns:
        `[rows, heads, value_dim]` in the query's dtype.
    """
    rows, heads, _ = query.shape
    assert takes(query, keys, values, records), "see `takes`"
    assert rows == work.num_queries, "one row per query"
    _, value_dim = _dims(keys, values, records)
    sinks = None if sinks is None else sinks.contiguous()
    out = torch.empty(rows, heads, value_dim, dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):
        if not work.num_parts:
            for launch in work.launches:
                _attend_items(query, keys, values, out, None, launch, work, scale, softcap, sinks, records, packed)
            return out
        part_out, part_lse = attend_parts(query, keys, values, work, scale, softcap, records, packed)
        _merge_kernel[(rows, heads)](
            part_out, part_lse, out, sinks, work.part_starts, work.parts, work.rows,
            heads, out.stride(0), out.stride(1),
            VALUE_DIM=value_dim, BLOCK_VALUE=padded_dim(value_dim), BLOCK_PARTS=_MERGED_AT_ONCE,
            HAS_SINKS=sinks is not None, INTERPRETED=is_interpreted(), num_warps=4,
        )  # fmt: skip
    return out


def attend_parts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: Work,
    scale: float,
    softcap: float | None = None,
    records: KVRecords | None = None,
    packed: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results `[parts, heads, value_dim]` and their log-sum-exps in base 2, `[parts, heads]`, in float32."""
    heads, (_, value_dim) = query.shape[1], _dims(keys, values, records)
    part_out = torch.empty(work.num_parts, heads, value_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(work.num_parts, heads, dtype=torch.float32, device=query.device)
    for launch in work.launches:
        _attend_items(query, keys, values, part_out, part_lse, launch, work, scale, softcap, None, records, packed)
    return part_out, part_lse


def _attend_items(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    launch: Launch,
    work: Work,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    records: KVRecords | None,
    packed: bool | None,
) -> None:
    tile: Tile = launch.tile
    if scale <= 0.0:  # the kernel takes the largest score for the largest product
        query, scale = query * scale, 1.0
    heads, kv_heads = query.shape[1], keys.shape[0]
    key_dim, value_dim = _dims(keys, values, records)
    features = {
        "IS_FINAL": lse is None, "HAS_SINKS": sinks is not None, "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": work.window is not None,
    }  # fmt: skip
    if packed is None:
        packed = is_packed(records, query.dtype, tile.rows)
        if packed and not is_interpreted():
            shape = Shape(records.kv_format.name, key_dim, value_dim, heads // kv_heads, tile, *features.values())
            packed = packs_right(shape, query.device)
    _attend_kernel[(launch.items.shape[0], kv_heads)](
        query, keys, values, out, lse, sinks, launch.items, work.pages, work.rows,
        scale * _LOG2_E, (softcap or 0.0) * _LOG2_E, work.window or 0, heads,
        query.stride(0), query.stride(1), keys.stride(0), values.stride(0),
        out.stride(0), out.stride(1),
        KEY_STRIDE=keys.stride(1), VALUE_STRIDE=values.stride(1),
        GROUP=heads // kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_KEY=padded_dim(key_dim), BLOCK_VALUE=padded_dim(value_dim),
        BLOCK_ROWS=tile.rows, BLOCK_TOKENS=tile.tokens, PAGE=PAGE_TOKENS, ITEM=ITEM_NUMBERS, STAGES=tile.stages,
        **constants_of(records), IS_PACKED=packed, **features, INTERPRETED=is_interpreted(),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


# -- the same in plain torch -------------------------------------------------------------------------------------------


def attend_parts_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: Work,
    scale: float,
    softcap: float | None = None,
    records: KVRecords | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_parts`, item by item, in float64; also where results are final."""
    heads, group = query.shape[1], query.shape[1] // keys.shape[0]
    items = [item for launch in work.launches for item in launch.items.tolist()]
    num_parts = max(part + count for _, count, *_, part, _ in items)
    _, value_dim = _dims(keys, values, records)
    part_out = torch.zeros(num_parts, heads, value_dim, dtype=torch.float64, device=query.device)
    part_lse = torch.full((num_parts, heads), -torch.inf, dtype=torch.float64, device=query.device)
    for start, count, table, lo, hi, first, part, _ in items:
        index = torch.arange(lo, hi, device=query.device)
        slots = work.pages[table + index // PAGE_TOKENS].long() * PAGE_TOKENS + index % PAGE_TOKENS
        q = query[work.rows[start : start + count].long()].double().transpose(0, 1)  # [heads, count, dim]
        k, v = keys[:, slots], values[:, slots]
        if records is not None:
            k, v = records.decode_keys(k, torch.float32), records.decode_values(v, torch.float32)
        k, v = (each.double().repeat_interleave(group, 0) for each in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = first + torch.arange(count, device=query.device).unsqueeze(1)
        hidden = index > at
        if work.window is not None:
            hidden |= index <= at - work.window
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1))
        part_out[part : part + count] = (weights @ v).transpose(0, 1)
        part_lse[part : part + count] = lse.transpose(0, 1) * _LOG2_E
    return part_out, part_lse


def merge_reference(
    part_out: torch.Tensor, part_lse: torch.Tensor, work: Work, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Parts `[parts, heads, dim]` with base-2 log-sum-exps `[parts, heads]` to results `[rows, heads, dim]`."""
    out = part_out.new_zeros(work.num_queries, *part_out.shape[1:])
    starts, parts = work.part_starts.tolist(), work.parts.long()
    for query, row in enumerate(work.rows.tolist()):
        mine = parts[starts[query] : starts[query + 1]]
        lse = part_lse[mine]
        if sinks is not None:
            lse = torch.cat([lse, sinks.to(lse).unsqueeze(0) * _LOG2_E])
        weights = torch.softmax(lse / _LOG2_E, dim=0)[: len(mine)].nan_to_num(0.0)
        out[row] = (weights.unsqueeze(-1) * part_out[mine]).sum(0)
    return out
