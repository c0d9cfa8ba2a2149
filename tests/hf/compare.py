"""Runs a mode on a stock model and on a patched copy of it, and compares what came out."""

import copy
import functools
import gc
import warnings
from collections.abc import Callable

import modes
import prompts
import pytest
import torch
from families import FAMILIES, Family, stock_model
from mode_parts import Mode, Outcome, Run
from tolerances import TIE, assert_close

BLOCK_SIZE = 8  # prompts of 20 tokens then fill several blocks


def assert_blocks_given_back(model, what: str = "") -> None:
    """No block is in use; references in cycles get one collection to let go of theirs."""
    if model.paged.stats().blocks_in_use:
        gc.collect()
    stats = model.paged.stats()
    assert (stats.blocks_in_use, stats.bytes_in_use) == (0, 0), f"{what}: {stats.blocks_in_use} blocks left in use"


def applicable(family: Family, mode_name: str) -> str | None:
    """Why the pair is not tested, or None."""
    return family.missing() or modes.lookup(modes.EXCLUDED, family, mode_name)


def copy_of(family: Family, mode: Mode | None = None) -> torch.nn.Module:
    """A stock model of one's own, with the attention that the mode asks for."""
    model = copy.deepcopy(stock_model(family.name))
    if mode is not None and mode.attention:
        model.set_attn_implementation(mode.attention)
    return model


@functools.cache
@torch.no_grad()
def _stock_outcome(family_name: str, mode_name: str) -> Outcome | Exception:
    family, mode = FAMILIES[family_name], modes.MODES[mode_name]
    try:
        return mode.call(Run(copy_of(family, mode), family, mode.inputs()))
    except Exception as error:
        return error


def stock_outcome(family: Family, mode: Mode) -> Outcome:
    """What stock returns, computed once a session; skips where stock refuses and the tables say that it may."""
    outcome = _stock_outcome(family.name, mode.name)
    if isinstance(outcome, Outcome):
        return outcome
    reason = modes.lookup(modes.STOCK_MAY_REFUSE, family, mode.name)
    if reason is None:
        raise outcome
    return pytest.skip(f"stock refuses: {reason} ({type(outcome).__name__}: {outcome})")


@torch.no_grad()
def patched_outcome(model, family: Family, mode: Mode, patch: Callable) -> Outcome:
    """The same call on an already patched model; `patch` is for the helper models that a mode brings."""
    return mode.call(Run(model, family, mode.inputs(), patch))


def assert_same(family: Family, mode: Mode, stock: Outcome, patched: Outcome) -> None:
    """Equal tokens, close tensors, the same stream. A tie in stock's own logits ends the comparison with a warning."""
    what = f"{family.name} × {mode.name}"
    for index, (expected, actual) in enumerate(zip(stock.tokens, patched.tokens, strict=True)):
        if _tokens_tie(family, mode, f"{what}, call {index}", expected, actual):
            return
    assert stock.notes == patched.notes, f"{what}: {patched.notes}, stock {stock.notes}"
    assert len(stock.streamed) == len(patched.streamed), (
        f"{what}: {len(patched.streamed)} puts, stock {len(stock.streamed)}"
    )
    for index, (expected, actual) in enumerate(zip(stock.streamed, patched.streamed, strict=True)):
        assert torch.equal(expected, actual), f"{what}, put {index}: {actual.tolist()}, stock {expected.tolist()}"
    assert stock.tensors.keys() == patched.tensors.keys(), f"{what}: {set(stock.tensors) ^ set(patched.tensors)}"
    for name, values in stock.tensors.items():
        _assert_tensors(f"{what}, {name}", values, patched.tensors[name], stock.rows.get(name))


def _assert_tensors(what: str, expected: list, actual: list, rows: list | None) -> None:
    assert len(expected) == len(actual), f"{what}: {len(actual)} tensors, stock {len(expected)}"
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        assert wanted.shape == got.shape, f"{what}[{index}]: shape {tuple(got.shape)}, stock {tuple(wanted.shape)}"
        if rows is not None:
            wanted, got = wanted[rows[index]], got[rows[index]]
        assert_close(got, wanted, f"{what}[{index}]")


def _tokens_tie(family: Family, mode: Mode, what: str, expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """False if equal, True if they part at a tie; fails if they part anywhere else."""
    if expected.shape == actual.shape and torch.equal(expected, actual):
        return False
    width = min(expected.shape[1], actual.shape[1])
    different = (expected[:, :width] != actual[:, :width]).nonzero() if len(expected) == len(actual) else []
    if len(different) == 0:
        pytest.fail(f"{what}: shape {tuple(actual.shape)}, stock {tuple(expected.shape)}")
    row, position = min(different.tolist(), key=lambda place: place[1])
    margin = _margin(family, mode, expected[row], position)
    wanted, got = int(expected[row, position]), int(actual[row, position])
    message = (
        f"{what}: row {row}, position {position}: token {got}, stock {wanted} "
        f"(top-2 margin of stock {'unknown' if margin is None else format(margin, '.2g')})\n"
        f"  stock   {expected[row].tolist()}\n  patched {actual[row].tolist()}"
    )
    if margin is None or margin > TIE:
        pytest.fail(message)
    warnings.warn(f"tie: {message}", stacklevel=2)
    return True


@torch.no_grad()
def _margin(family: Family, mode: Mode, sequence: torch.Tensor, position: int) -> float | None:
    """How far stock's best token is ahead of its second best at a position, where that can be told simply."""
    if not mode.greedy or mode.inputs not in (prompts.single, prompts.single_without_mask, prompts.diverse):
        return None  # scores are not plain logits, or the row is padded
    if "encoder_decoder" in family.tags:
        return None
    best = stock_model(family.name)(sequence[None, :position]).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def all_pairs(names: list[str] | None = None) -> list:
    """Families × modes for `parametrize`: pairs that do not apply are skipped with their reason."""
    pairs = []
    for family in FAMILIES.values():
        for mode in modes.MODES.values():
            if names is not None and mode.name not in names:
                continue
            reason = applicable(family, mode.name)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            pairs.append(pytest.param(family, mode, id=f"{family.name}-{mode.name}", marks=marks))
    return pairs


def every_family(condition: Callable[[Family], bool] = lambda family: True) -> list:
    """The families that a condition picks, for `parametrize`."""
    chosen = [family for family in FAMILIES.values() if condition(family)]
    return [
        pytest.param(
            family, id=family.name, marks=[pytest.mark.skip(reason=reason)] if (reason := family.missing()) else []
        )
        for family in chosen
    ]
