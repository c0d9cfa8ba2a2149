"""A stock model and a patched copy of it: both are asked the same, and must answer the same."""

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, PAD, VOCAB
from mode_parts import Run, draft
from prompts import batch, tokens
from tolerances import TIE
from versions import skip_if_older

from hf_paged import patch_model
from hf_paged.stats import PagedStats

ROUNDED_TIE = 2**-7  # of the best logit: two steps of bfloat16 at most, in which equal tokens are not promised
NEW = 6  # new tokens of a usual call


class Pair:
    """`stock` and `model`, with equal weights; whoever changes one of them changes the other, too (`both`)."""

    def __init__(self, name: str = "llama", wrap=lambda model: model, **overrides):
        family = FAMILIES[name]
        if family.missing():
            pytest.skip(family.missing())
        self._set(wrap(copy_of(family)), wrap(copy_of(family)), overrides)

    @classmethod
    def of(cls, stock: torch.nn.Module, **overrides) -> "Pair":
        """`stock`, and a patched copy of it."""
        pair = cls.__new__(cls)
        pair._set(stock, copy.deepcopy(stock), overrides)
        return pair

    def _set(self, stock, twin, overrides) -> None:
        self.stock = stock
        self.model = patch_model(twin, **{"block_size": BLOCK_SIZE, **overrides})

    @property
    def paged(self):
        return self.model.paged

    @property
    def pool(self):
        return self.paged._pool.manager

    def both(self, change) -> None:
        """The same change to both models."""
        for model in (self.stock, self.model):
            torch.manual_seed(11)
            change(model)

    def ask(self, rows, *, salt=None, **kwargs) -> torch.Tensor:
        """Stock's answer to `rows` (lists of token ids, or the inputs themselves); the patched model's must equal it.

        Arguments that are functions of a model are called with each of the two.
        """
        inputs = batch(rows) if isinstance(rows, list) else rows
        answers = []
        self.paged.reset_stats()
        for model in (self.stock, self.model):
            given = {name: value(model) if callable(value) else value for name, value in kwargs.items()}
            if model is self.model and salt is not None:
                given["cache_salt"] = salt
            torch.manual_seed(7)
            output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **given})
            answers.append(output if isinstance(output, torch.Tensor) else output.sequences)
            del output, given
        expected, actual = answers
        if not torch.equal(expected, actual):
            self._check_tie(inputs, kwargs, expected, actual)
        self.check()
        return expected

    def hold(self, rows) -> list:
        """What both models return for `rows`, caches and all."""
        return [
            model.generate(torch.tensor(rows), do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
            for model in (self.stock, self.model)
        ]

    def go_on(self, outputs: list) -> torch.Tensor:
        """Stock's answer from its cache in `outputs` (of `hold`) on; the patched model's from its own must equal it."""
        expected, actual = (
            model.generate(output.sequences, past_key_values=output.past_key_values, do_sample=False, max_new_tokens=12)
            for model, output in zip((self.stock, self.model), outputs, strict=True)
        )
        assert torch.equal(expected, actual)
        return expected

    def check_salts_and_weights(self, prompts: list[list[int]], salt: str | None, known: int) -> None:
        """Of the first prompt so many tokens are `known`, but not under a salt, nor with other weights."""
        first, second = prompts
        self.ask([first], salt=salt)
        assert self.reused == (0 if salt else known)
        self.both(lambda model: model.lm_head.weight.data.mul_(1.5))
        self.ask([second], salt=salt)
        assert self.reused == 0

    def skip_where_older_stock_refuses(self, rows, **kwargs) -> None:
        """Older versions of some models cannot answer at all, so that there is nothing to compare with."""
        inputs = batch(rows) if isinstance(rows, list) else rows
        given = {name: value(self.stock) if callable(value) else value for name, value in kwargs.items()}
        try:
            self.stock.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **given})
        except Exception as error:
            skip_if_older(f"stock refuses: {type(error).__name__}: {error}")

    def check(self) -> PagedStats:
        """Nothing is in use, every block is in one state, and the counts add up."""
        if self.paged._pool is not None:
            if self.pool.in_use:
                gc.collect()
            assert self.pool.in_use == 0, f"{self.pool.in_use} blocks left in use"
            self.paged._pool.manager.check_integrity()
        stats = self.paged.stats()
        assert stats.prompt_tokens == stats.computed_tokens + stats.reused_tokens + stats.shared_tokens, stats
        assert min(stats.computed_tokens, stats.reused_tokens, stats.shared_tokens) >= 0, stats
        return stats

    @property
    def reused(self) -> int:
        """Prompt tokens that the last question took from earlier ones."""
        return self.paged.stats().reused_tokens

    @property
    def computed(self) -> int:
        """Prompt tokens that went through the model for the last question."""
        return self.paged.stats().computed_tokens

    @torch.no_grad()
    def _check_tie(self, inputs, kwargs, expected, actual) -> None:
        """Greedy answers may part where stock's two best logits are as good as equal; nothing else may."""
        message = f"{kwargs}\n  stock   {expected.tolist()}\n  patched {actual.tolist()}"
        assert expected.shape[0] == actual.shape[0], message
        width = min(expected.shape[1], actual.shape[1])
        different = (expected[:, :width] != actual[:, :width]).nonzero().tolist()
        assert different, message
        assert set(kwargs) <= {"max_new_tokens", "prefill_chunk_size"}, message
        row, position = min(different, key=lambda place: place[1])
        padding = int((inputs["attention_mask"][row] == 0).sum()) if "attention_mask" in inputs else 0
        logits = self.stock(expected[row : row + 1, padding:position]).logits[0, -1]
        is_rounded = torch.equal(logits, logits.bfloat16().to(logits.dtype))  # under autocast
        best = logits.topk(2).values
        assert float(best[0] - best[1]) <= (ROUNDED_TIE * float(best[0].abs()) if is_rounded else TIE), message
        warnings.warn(f"tie: {message}", stacklevel=3)


def evict(pair: Pair, count: int | None = None) -> int:
    """Take the memory of the `count` least recently used cached blocks away, as a large call would; all by default."""
    manager = pair.paged._pool.manager
    with manager.lock:
        return manager.budget.evict(manager.cached if count is None else count)


def piece(length: int, name: int) -> list[int]:
    """A stretch of a prompt; stretches of other names begin with other tokens."""
    first = 3 + name % (VOCAB - 3)
    return [first, *tokens(length - 1, seed=1000 + name)]


def text(row: torch.Tensor) -> list[int]:
    """What a row says, padding on either side left out."""
    return [token for token in row.tolist() if token != PAD]


def distinct_pieces(count: int, length: int) -> list[list[int]]:
    """Prompts that have no first token in common."""
    return [piece(length, name) for name in range(count)]


def patched_draft() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A draft model for the patched model, patched itself, and an unpatched one for stock."""
    helper, near = (draft(Run(None, FAMILIES["llama"], {}), near=True) for _ in range(2))
    return patch_model(helper, block_size=BLOCK_SIZE), near


ROWS = [piece(27, 1), piece(13, 2)]  # a question, for tests of what comes between asking it twice
REUSED = 26 + 12  # of `ROWS` where they were asked before


def eager(model):
    model.set_attn_implementation("eager")
    return model


def assert_change_is_noticed(pair: Pair, change: Callable) -> None:
    """An equal call finds `ROWS` again, but not behind a change of both models."""
    before = pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.reused == REUSED
    pair.both(change)
    after = pair.ask(ROWS)
    assert not torch.equal(before, after), "the change must matter"
    assert pair.reused == 0
    pair.ask(ROWS)
    assert pair.reused == REUSED, "and what the changed model computed is reused"
