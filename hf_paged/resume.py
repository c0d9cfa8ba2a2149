"""Stock-shaped prompts of which less is computed: rows that are equal once, and not what earlier calls have computed.

What such a model makes of a prompt in two pieces, equal rows left out, is tried on a real call first: then a prompt may
begin with what another call has left, as it would with a cache that is given back. The trial begins so itself where it
can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.cache import PagedCache
from hf_paged.capabilities import Capabilities
from hf_paged.compat import CACHE_NAME
from hf_paged.core.table import BlockTable
from hf_paged.draws import draws_kept
from hf_paged.errors import PagedMemoryError, is_refusal
from hf_paged.forward import TOKEN_TYPES, ModelCall, run_padded
from hf_paged.kept_states import KeptState, State, joined, state_of_row, tensors_of
from hf_paged.own_state import OWN_STATE, OwnState
from hf_paged.placing import match, placed
from hf_paged.probe import Capability, Later, difference, in_one_line, tolerance_of
from hf_paged.prompt import Prompt, described, prompt_of
from hf_paged.state import put_states, state_of
from hf_paged.stats import Counters
from hf_paged.trial import MIN_TRIAL_TOKENS

# Where a prompt parts from earlier ones, the next is likely to do so, too. A state is kept there, which takes a pass of
# its own, if it saves that many tokens.
MIN_PARTING_TOKENS = 32
# Pieces that a prompt ends with when layers that keep a state are tried, by the tokens from their begin on. They are
# short, because later logits depend less on it; one is as short as a convolution's kernel. Between the two last begins
# tokens go one at a time, another way through such layers: answers do, and later prompts begin with these.
_LAST_TOKENS = (14, 9, 2)
# Columns that a trial computes in any case. What earlier calls have left may come from a pass that saw the same tokens
# follow, so that a model that looks ahead does not show there; it does where new columns are cut off from one another.
_LEAST_NEW_TOKENS = max(_LAST_TOKENS[0], 2 * MIN_TRIAL_TOKENS)
# Largest difference of a state, as a part of its largest number, that is taken for rounding in float32, where at most
# 4e-6 was measured. Those of zamba2, whose steps forget to clamp, differ by 2e-3 after 7 single tokens.
_STATE_TOLERANCE = 1e-4
_UNTRIED = "untried"
_BEYOND = "beyond a window"
_EQUAL_ROWS = "equal rows"


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
            prompt = prompt_of(model, request, cache, ids, ignores_padding)
        if prompt is None:
            return run_padded(request, cache, ids), request.real_tokens, 0
        return self._run_prompt(model, prompt, cache, known)

    def _run_prompt(
        self, model: PreTrainedModel, prompt: Prompt, cache: PagedCache, known: Capability
    ) -> tuple[Any, int, int]:
        request, later, resumes = prompt.call, known.later, known.later.resumes
        if known.window_limit is not None and request.tokens > known.window_limit:
            # Which is counted. In pieces, masks of such models may be others, and that shows beyond the window (moshi).
            prompt = prompt if prompt.media is None else prompt._replace(ids=None)
            return self._run_whole(model, prompt, cache, resumes)
        if prompt.media is not None and prompt.ids is not None:
            prompt = placed(prompt, cache, prompt.media.may_part(resumes))
            if not prompt.media.apart and self._is_to_be_parted(prompt, cache, later):
                return _try_apart(model, prompt, cache, later), request.real_tokens, 0
        kind = _kind(prompt, cache)
        obstacle = resumes.get(kind, _UNTRIED)
        if obstacle is None:
            return _run_less(prompt, cache)
        rows = list(range(request.rows))
        known_columns = _reuse(prompt, cache, rows).columns
        columns = max(known_columns, _parting(prompt, cache, rows))
        _empty(cache)
        if not columns and len(prompt.rows) == request.rows:
            return _run_all(prompt, cache)
        if obstacle != _UNTRIED:
            if columns:
                self._counters.fall_back(f"prompts not shared: {obstacle}")
            return self._run_whole(model, prompt, cache, resumes)
        half = max(prompt.least_columns, request.tokens // 2)
        columns = columns or (request.tokens - _LAST_TOKENS[0] if cache.states else half)
        cuts = [request.tokens - _LAST_TOKENS[-1], columns] if _BEYOND in kind else [columns]
        # Media are always computed: whether they may be given without those of other rows is found out, too.
        known_columns = known_columns if prompt.media is None else 0
        outputs, obstacle = _try_both(model, prompt, cache, cuts, known_columns)
        if obstacle != _UNTRIED:
            resumes[kind] = obstacle
        return outputs, request.real_tokens, 0

    def _run_whole(
        self, model: PreTrainedModel, prompt: Prompt, cache: PagedCache, resumes: dict[frozenset[str], str | None]
    ) -> tuple[Any, int, int]:
        """A prompt that may not be cut; rows that are equal are computed once all the same, if that was tried."""
        if prompt.media is not None or len(prompt.rows) == prompt.call.rows:
            return _run_all(prompt, cache)
        kind = _kind(prompt, cache) | {_EQUAL_ROWS}
        obstacle = resumes.get(kind, _UNTRIED)
        if obstacle is None:
            return _run_less(prompt, cache, begins_anew=True)
        if obstacle != _UNTRIED:
            self._counters.fall_back(f"prompts not shared: {obstacle}")
            return _run_all(prompt, cache)
        outputs, obstacle = _try_both(model, prompt, cache, [])
        if obstacle != _UNTRIED:
            resumes[kind] = obstacle
        return outputs, prompt.call.real_tokens, 0

    def _is_to_be_parted(self, prompt: Prompt, cache: PagedCache, later: Later) -> bool:
        """Whether it is time to find out if media may be parted: others were there before, and nothing is known."""
        columns = _reuse(prompt, cache, list(range(prompt.call.rows))).columns
        _empty(cache)
        obstacles = {later.resumes.get(key) for key in prompt.media.keys} - {None}
        if columns:
            return False
        for obstacle in obstacles:
            self._counters.fall_back(f"prompts not shared: {obstacle}")
        is_first = prompt.media.names not in later.seen
        later.seen.add(prompt.media.names)
        return not obstacles and not is_first


def _kind(prompt: Prompt, cache: PagedCache) -> frozenset[str]:
    """What is found out of prompts by trying is known of all of this kind."""
    kind, request = prompt.names, prompt.call
    if cache.states and request.new_columns is not None:
        kind |= {"padding"}  # which another pass may have to hide from a state
    if prompt.media is None and cache.has_windows and request.tokens > min(filter(None, cache.windows)):
        kind |= {_BEYOND}  # where masks of a prompt in pieces may be others (moshi)
    return kind


def _try_apart(model: PreTrainedModel, prompt: Prompt, cache: PagedCache, later: Later) -> Any:
    """A prompt as stock computes it; what is known then of its media is noted, and it is kept accordingly."""
    keys, resumes = prompt.media.keys, later.resumes
    outputs, obstacle = _try_both(model, prompt, cache, prompt.media.trial_cuts)
    if obstacle is None:
        resumes.update(dict.fromkeys(keys))
        placed(prompt, cache, True)
    elif obstacle != _UNTRIED:
        resumes[next(key for key in keys[::-1] if resumes.get(key, _UNTRIED) == _UNTRIED)] = obstacle
    else:
        later.seen.discard(prompt.media.names)  # not tried again at once: memory is short
    return outputs


class _Reuse(NamedTuple):
    """Earlier calls have computed the first `columns` of a prompt, and left `states` of its rows behind them."""

    columns: int = 0
    states: Sequence[KeptState] = ()


def _reuse(prompt: Prompt, cache: PagedCache, rows: list[int], most: int | None = None) -> _Reuse:
    """Let all tables, those of `rows`, hold what earlier calls have computed of as many first columns, up to `most`.

    None where a cut there would go through media, or where some row has no state there.
    """
    limit = prompt.cut(prompt.call.tokens - prompt.keep if most is None else most)
    while prompt.ids is not None and limit:
        wanted = [max(0, limit - prompt.padding(row)) for row in rows]
        states = [
            _take(prompt, cache, table, row, most) for table, row, most in zip(cache.tables, rows, wanted, strict=True)
        ]
        found = [table.num_tokens for table in cache.tables]
        if found == wanted and (all(found) if cache.states else any(found)):
            return _Reuse(limit, states if cache.states else ())
        _empty(cache)
        if found == wanted:
            break
        limit = prompt.cut(
            min(
                prompt.padding(row) + count
                for row, count, most in zip(rows, found, wanted, strict=True)
                if count < most
            )
        )
    return _Reuse()


def _take(prompt: Prompt, cache: PagedCache, table: BlockTable, row: int, most: int) -> KeptState | None:
    """Let an empty table hold what earlier calls have computed of a row, at most so many tokens.

    Where layers keep a state: up to a token behind which one was kept, which is returned.
    """
    if not cache.states:
        match(prompt, cache, table, row, most)
        return None
    kept_states, ids = cache.pool.kept_states, prompt.ids[row]
    while (kept := kept_states.longest(table.root, ids, most)) is not None:
        if cache.pool.match(table, ids, kept.num_tokens) == kept.num_tokens:
            return kept
        cache.pool.manager.crop(table, 0)
        kept_states.forget(kept)  # K and V before it are gone
    return None


def _parting(prompt: Prompt, cache: PagedCache, rows: list[int]) -> int:
    """Columns up to which all of `rows` begin like earlier prompts, where states will be wanted; else 0."""
    if not cache.states or prompt.ids is None:
        return 0
    limit, common = prompt.call.tokens - prompt.keep, cache.pool.manager.common_tokens
    padding = list(map(prompt.padding, rows))
    columns = min(
        before + common(table.root, prompt.ids[row], limit - before)
        for table, row, before in zip(cache.tables, rows, padding, strict=True)
    )
    columns = prompt.cut(columns)
    return columns if columns >= max(padding) + MIN_TRIAL_TOKENS else 0


def _empty(cache: PagedCache) -> None:
    for table in cache.tables:
        cache.pool.manager.crop(table, 0)


def _go_on(prompt: Prompt, cache: PagedCache, rows: list[int], reuse: _Reuse) -> None:
    """Let a cache, whose tables hold what was found of `rows`, be as it was behind these columns."""
    new = prompt.call.new_columns
    cache.add_columns(None if new is None else new[rows, : reuse.columns], reuse.columns)
    for layer in cache.paged_layers:
        layer.move_to(reuse.columns)
    if reuse.states:
        put_states(cache.states, joined([kept.state for kept in reuse.states]))


def _run_all(prompt: Prompt, cache: PagedCache) -> tuple[Any, int, int]:
    """All of a prompt, as stock computes it; returns as `run` does."""
    return run_padded(prompt.call, cache, prompt.ids), prompt.call.real_tokens, 0


def _run_less(prompt: Prompt, cache: PagedCache, begins_anew: bool = False) -> tuple[Any, int, int]:
    """One row of those that are equal, and the columns that no earlier call has computed; returns as `run` does.

    `begins_anew`: all columns, in one piece.
    """
    request, rows = prompt.call, prompt.rows
    if len(rows) < request.rows:
        cache.sequences.select(rows)
    reuse = _Reuse() if begins_anew else _reuse(prompt, cache, rows)
    reused = [table.num_tokens for table in cache.tables]
    places = [rows.index(owner) for owner in prompt.owners]
    parting, computed_tokens = 0 if begins_anew else _parting(prompt, cache, rows), 0
    stops = [parting] if parting - reuse.columns >= MIN_PARTING_TOKENS else []
    try:
        _go_on(prompt, cache, rows, reuse)
        for start, stop in pairwise([reuse.columns, *stops, request.tokens]):
            part = _part(prompt, cache, range(start, stop))
            outputs = run_padded(part, cache, _ids(prompt, rows, range(start, stop)))
            computed_tokens += part.real_tokens
            if stop == parting:
                cache.keep_states(range(len(rows)))
    except BaseException:
        cache.release()
        raise
    if len(rows) < request.rows:
        cache.reorder_cache(torch.tensor(places, device="cpu"))
        outputs.logits = outputs.logits[torch.tensor(places, device=outputs.logits.device)]
    return outputs, computed_tokens, sum(reused[place] for place in places)


def _ids(prompt: Prompt, rows: list[int], columns: range) -> list[list[int]] | None:
    """Of the tokens of these rows in some columns, padding left out."""
    if prompt.ids is None:
        return None
    bounds = [[max(0, each - prompt.padding(row)) for each in (columns.start, columns.stop)] for row in rows]
    return [prompt.ids[row][start:stop] for row, (start, stop) in zip(rows, bounds, strict=True)]


def _part(prompt: Prompt, cache: PagedCache, columns: range) -> ModelCall:
    """A call with some columns of the distinct rows and their media, on `cache`."""
    request, rows = prompt.call, prompt.rows
    part, names = slice(columns.start, columns.stop), request.names
    media = {} if prompt.media is None else prompt.media.between(columns, rows)
    # Models write features into mappings that were empty.
    kwargs = {name: value for name, value in request.kwargs.items() if name not in compat.MEDIA_INPUTS}
    kwargs |= {**media, CACHE_NAME: cache}
    index = torch.tensor(rows, device=request.inputs.device)
    for name in (request.input_name, names.positions, *TOKEN_TYPES):
        each = kwargs.get(name)
        if each is not None:
            # Masks that let an image see all of itself are made of the types of all columns (gemma3).
            each = each[..., : columns.stop] if media and name == "token_type_ids" else each[..., part]
            kwargs[name] = each.index_select(-2, index) if each.shape[-2] == request.rows else each
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = kwargs["cache_position"][part]
    if request.mask is not None:
        kwargs[names.mask] = request.mask[index, : columns.stop]
    new = None if request.new_columns is None else request.new_columns[rows, part]
    return replace(request, kwargs=kwargs, inputs=kwargs[request.input_name], new_columns=new)


@torch.no_grad()
def _try_both(
    model: PreTrainedModel, prompt: Prompt, cache: PagedCache, cuts: list[int], known_columns: int = 0
) -> tuple[Any, str | None]:
    """A prompt as stock computes it, and then its distinct rows in pieces, on a cache of their own.

    These end at the columns `cuts`, or before; without any it is one. The first is not computed but what earlier calls
    have left of the first `known_columns`, where enough others follow. Returns the outputs of the former, and why
    prompts like this must not be computed like the latter, or `None`; `_UNTRIED` where there is too little of it, or no
    memory.
    """
    if prompt.media is not None and len(prompt.media.parts) > 1 and len(prompt.rows) > 1:
        # Without one of the rows: others may have been computed together with that.
        owners = [max(owner, prompt.rows[1]) for owner in prompt.owners]
        prompt = prompt._replace(owners=owners)
    request, before = prompt.call, OwnState(model)
    outputs = run_padded(request, cache, prompt.ids)
    whole = _states(cache, prompt.rows)
    stops, least = {*cuts, request.tokens}, MIN_TRIAL_TOKENS
    if cache.states:
        least += max(map(prompt.padding, prompt.rows))
    if cache.states and cuts:
        first, second, last = (request.tokens - each for each in _LAST_TOKENS)
        stops.update([first, *range(second, last + 1)])
    if request.tokens - known_columns < _LEAST_NEW_TOKENS:
        known_columns = 0
    if known_columns:
        stops.add(request.tokens - MIN_TRIAL_TOKENS)
    if min(stops) < least or (prompt.media is not None and any(map(prompt.media.reaches_over, stops))):
        return outputs, _UNTRIED
    if before.is_changed():
        return outputs, OWN_STATE
    twin = PagedCache(cache.model_config, pool=cache.pool, settings=cache.settings, layout=cache.layout)
    twin.copies_dense = cache.copies_dense
    try:
        twin.ensure_rows(len(prompt.rows))
        begin = _begin_trial(prompt, cache, twin, known_columns)
        states: list[State] = []
        with draws_kept(model):
            for start, stop in pairwise(sorted({begin, *stops})):
                last = run_padded(_part(prompt, twin, range(start, stop)), twin)
                if [stop] == cuts[-1:]:
                    states = _states(twin, range(len(prompt.rows)))
            off = _apart(_states(twin, range(len(prompt.rows))), whole)
    except Exception as error:  # whatever a model does with what it did not expect, one piece is right
        is_short = isinstance(error, PagedMemoryError) or is_refusal(error)
        return outputs, _UNTRIED if is_short else in_one_line(error)
    finally:
        twin.release()
    expected = outputs.logits[prompt.rows, -1]
    how = "in two pieces" if cuts else "without the rows that are equal"
    error, tolerance = difference(last.logits[:, -1], expected), tolerance_of(expected.dtype)
    if error > tolerance:
        return outputs, f"logits of a prompt {how} differ from stock by {error:.1g} of the largest"
    if off > (_STATE_TOLERANCE if expected.dtype == torch.float32 else tolerance):
        return outputs, f"states behind a prompt {how} differ from stock by {off:.1g} of the largest"
    if states:  # else they were found there
        _keep(prompt, cache, states, cuts[-1])
    return outputs, None


def _begin_trial(prompt: Prompt, cache: PagedCache, twin: PagedCache, known_columns: int) -> int:
    """Let `twin` begin with what earlier calls have left of so many columns; returns those that it found."""
    for row, table in zip(prompt.rows, twin.tables, strict=True):
        table.root = cache.tables[row].root
    reuse = _reuse(prompt, twin, prompt.rows, known_columns)
    twin.untrack()  # nobody is to find what is tried
    if reuse.columns:
        _go_on(prompt, twin, prompt.rows, reuse)
    return reuse.columns


def _states(cache: PagedCache, rows: Sequence[int]) -> list[State]:
    """Copies of what layers keep of these rows besides K and V."""
    return [state_of_row(map(state_of, cache.states), row) for row in rows]


def _apart(actual: Sequence[State], expected: Sequence[State]) -> float:
    """The largest difference of states, as a part of the largest number of each tensor."""
    pairs = [
        pair for states in zip(actual, expected, strict=True) for pair in zip(*map(tensors_of, states), strict=True)
    ]
    return max((difference(*pair) for pair in pairs), default=0.0)


def _keep(prompt: Prompt, cache: PagedCache, states: list[State], columns: int) -> None:
    """Keep the states that the distinct rows had behind so many columns, if their layers have any."""
    if cache.states and prompt.ids is not None:
        for row, state in zip(prompt.rows, states, strict=True):
            (tokens,) = _ids(prompt, [row], range(columns))
            cache.pool.kept_states.keep(cache.tables[row].root, tokens, state.copy)
