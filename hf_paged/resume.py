"""Stock-shaped prompts of which less is computed: rows that are equal once, and not what earlier calls have computed.

What such a model makes of a prompt in two pieces, equal rows left out, is tried on a real call first: then a prompt may
begin with what another call has left, as it would with a cache that is given back.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.cache import PagedCache
from hf_paged.capabilities import Capabilities
from hf_paged.compat import CACHE_NAME
from hf_paged.errors import PagedMemoryError, is_refusal
from hf_paged.forward import TOKEN_TYPES, ModelCall, run_padded
from hf_paged.probe import Capability, difference, in_one_line, tolerance_of
from hf_paged.prompt import Prompt, described, prompt_of
from hf_paged.stats import Counters
from hf_paged.trial import MIN_TRIAL_TOKENS
from hf_paged.weights import PLAIN_KINDS

_UNTRIED = "untried"


class StockShaped:
    """Runs passes in stock's shapes.

    Args:
        capabilities: asked for what is found out when it is first needed.
        counters: told where prompts cannot be shared.
    """

    def __init__(self, capabilities: Capabilities, counters: Counters):
        self._capabilities = capabilities
        self._counters = counters

    def run(
        self, model: PreTrainedModel, request: ModelCall, cache: PagedCache, known: Capability
    ) -> tuple[Any, int, int]:
        """The outputs, and the numbers of tokens that were computed and that earlier calls had computed.

        Of a prompt the outputs may be those of its last columns only. `known`: what is fast with the model as it is.
        """
        cache.copies_dense = not self._capabilities.may_have_gaps(model, request.call, known)
        ignores_padding = partial(self._capabilities.ignores_padding, model, request.call, known)
        ids, prompt = described(request, cache, ignores_padding), None
        if cache.prefilling and cache.dense_len == 0 and not known.sees_shapes:
            prompt = prompt_of(model, request, cache, ids)
        if prompt is None:
            return run_padded(request, cache, ids), request.real_tokens, 0
        return self._run_prompt(model, prompt, cache, known.later.resumes)

    def _run_prompt(
        self, model: PreTrainedModel, prompt: Prompt, cache: PagedCache, resumes: dict[frozenset[str], str | None]
    ) -> tuple[Any, int, int]:
        request = prompt.call
        if prompt.media is not None and prompt.ids is not None:
            cache.position_shifts = prompt.media.shifts
            for table in cache.tables:
                table.root = prompt.media.root(table.root)
        obstacle = resumes.get(prompt.names, _UNTRIED)
        if obstacle is None:
            return _run_less(prompt, cache)
        columns = _reuse(prompt, cache, list(range(request.rows)))
        _empty(cache)
        if not columns and len(prompt.rows) == request.rows:
            return run_padded(request, cache, prompt.ids), request.real_tokens, 0
        if obstacle != _UNTRIED:
            self._counters.fall_back(f"prompts not shared: {obstacle}")
            return run_padded(request, cache, prompt.ids), request.real_tokens, 0
        outputs, obstacle = _try_both(model, prompt, cache, columns or max(prompt.least_columns, request.tokens // 2))
        if obstacle != _UNTRIED:
            resumes[prompt.names] = obstacle
        return outputs, request.real_tokens, 0


def _reuse(prompt: Prompt, cache: PagedCache, rows: list[int]) -> int:
    """Let all tables, those of `rows`, hold what earlier calls have computed of as many first columns; returns these.

    0 where media lie behind them.
    """
    limit = prompt.call.tokens - prompt.keep
    while prompt.ids is not None and limit >= prompt.least_columns:
        wanted = [max(0, limit - prompt.padding(row)) for row in rows]
        found = [
            cache.pool.match(table, prompt.ids[row], most)
            for table, row, most in zip(cache.tables, rows, wanted, strict=True)
        ]
        if found == wanted:
            return limit if any(found) else 0
        _empty(cache)
        limit = min(
            prompt.padding(row) + count for row, count, most in zip(rows, found, wanted, strict=True) if count < most
        )
    return 0


def _empty(cache: PagedCache) -> None:
    for table in cache.tables:
        cache.pool.manager.crop(table, 0)


def _run_less(prompt: Prompt, cache: PagedCache) -> tuple[Any, int, int]:
    """One row of those that are equal, and the columns that no earlier call has computed; returns as `run` does."""
    request, rows = prompt.call, prompt.rows
    if len(rows) < request.rows:
        cache.sequences.select(rows)
    columns = _reuse(prompt, cache, rows)
    reused = [table.num_tokens for table in cache.tables]
    places = [rows.index(owner) for owner in prompt.owners]
    rest = _part(prompt, cache, range(columns, request.tokens))
    try:
        cache.add_columns(None if request.new_columns is None else request.new_columns[rows, :columns], columns)
        for layer in cache.paged_layers:
            layer.move_to(columns)
        ids = prompt.ids and [prompt.ids[row][count:] for row, count in zip(rows, reused, strict=True)]
        outputs = run_padded(rest, cache, ids)
    except BaseException:
        cache.release()
        raise
    if len(rows) < request.rows:
        cache.reorder_cache(torch.tensor(places, device="cpu"))
        outputs.logits = outputs.logits[torch.tensor(places, device=outputs.logits.device)]
    return outputs, rest.real_tokens, sum(reused[place] for place in places)


def _part(prompt: Prompt, cache: PagedCache, columns: range) -> ModelCall:
    """A call with some columns of the distinct rows, on `cache`; media go with the first columns."""
    request, rows = prompt.call, prompt.rows
    part, names = slice(columns.start, columns.stop), request.names
    given = {} if prompt.media is None else prompt.media.given
    taken = frozenset() if columns.start else given.keys()  # models write features into mappings that were empty
    kwargs = {**request.kwargs, **given, CACHE_NAME: cache}
    kwargs = {name: value for name, value in kwargs.items() if name in taken or name not in compat.MEDIA_INPUTS}
    index = torch.tensor(rows, device=request.inputs.device)
    for name in (request.input_name, names.positions, *TOKEN_TYPES):
        each = kwargs.get(name)
        if each is not None:
            each = each[..., part]
            kwargs[name] = each.index_select(-2, index) if each.shape[-2] == request.rows else each
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = kwargs["cache_position"][part]
    if request.mask is not None:
        kwargs[names.mask] = request.mask[index, : columns.stop]
    new = None if request.new_columns is None else request.new_columns[rows, part]
    return replace(request, kwargs=kwargs, inputs=kwargs[request.input_name], new_columns=new)


@torch.no_grad()
def _try_both(model: PreTrainedModel, prompt: Prompt, cache: PagedCache, columns: int) -> tuple[Any, str | None]:
    """A prompt as stock computes it, and then its distinct rows in two pieces, on a cache of their own.

    The first of these has `columns` columns. Returns the outputs of the former, and why prompts like this must not be
    computed like the latter, or `None`; `_UNTRIED` where there is too little of it, or no memory.
    """
    request, before = prompt.call, _attributes(model)
    outputs = run_padded(request, cache, prompt.ids)
    if columns < MIN_TRIAL_TOKENS:
        return outputs, _UNTRIED
    if _changed(before, _attributes(model)):
        return outputs, "modules that keep a state of their own"
    twin = PagedCache(cache.model_config, pool=cache.pool, settings=cache.settings, layout=cache.layout)
    twin.copies_dense = cache.copies_dense
    try:
        twin.ensure_rows(len(prompt.rows))
        pieces = range(columns), range(columns, request.tokens)
        with compat.random_state_kept(model):
            *_, last = [run_padded(_part(prompt, twin, piece), twin) for piece in pieces]
    except Exception as error:  # whatever a model does with what it did not expect, one piece is right
        is_short = isinstance(error, PagedMemoryError) or is_refusal(error)
        return outputs, _UNTRIED if is_short else in_one_line(error)
    finally:
        twin.release()
    expected = outputs.logits[prompt.rows, -1]
    error = difference(last.logits[:, -1], expected)
    if error <= tolerance_of(expected.dtype):
        return outputs, None
    return outputs, f"logits of a prompt in two pieces differ from stock by {error:.1g} of the largest"


def _attributes(model: PreTrainedModel) -> dict[tuple[int, str], Any]:
    """What modules hold as attributes, by number of the module and name: plain values, and tensors with versions."""
    return {
        (index, name): (value, _version(value)) if isinstance(value, torch.Tensor) else value
        for index, module in enumerate(model.modules())
        for name, value in vars(module).items()
        if isinstance(value, (torch.Tensor, *PLAIN_KINDS)) and name not in compat.NOTED_ONCE
    }


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which counts no writes, and says so with an error


def _changed(before: dict[tuple[int, str], Any], after: dict[tuple[int, str], Any]) -> bool:
    """Whether anything is another object, or was written to."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, tuple) and isinstance(other, tuple):
            return one[0] is other[0] and one[1] == other[1]
        return type(one) is type(other) and one == other

    return before.keys() != after.keys() or not all(same(value, after[name]) for name, value in before.items())
