"""``python -m benchmarks.disk``: more prompts in rotation than memory has room for, with a disk below and without.

One model, one filled tier: ways of choosing between fetching and computing take turns on it, with the disk as it is and
with one that is read so slowly that computing is quicker; and the same prompts are computed without a tier.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from unittest import mock

import torch
from rich.table import Table
from transformers import PreTrainedModel

from hf_paged import paged, patch_model
from hf_paged.core.fetch import Choice, FetchPolicy, Option
from hf_paged.core.records import RecordFile

from . import environment, report, smollm2, text

BLOCK_SIZE, NEW = 16, 4
# The choice may take this much longer than the better of always and never: what two runs of one of them differ by.
NOISE = 1.05


class AlwaysFetch(FetchPolicy):
    """Reads whatever there is."""

    def choose(self, options: Sequence[Option]) -> Choice | None:
        return Choice(options[-1], False)


class NeverFetch(FetchPolicy):
    """Computes everything."""

    def choose(self, options: Sequence[Option]) -> Choice | None:
        return None


POLICIES = {"by estimate": FetchPolicy, "always": AlwaysFetch, "never": NeverFetch}


# Of one prompt after the other, in this order. Nothing is read where all is computed, so that it has no disk.
FAST, SLOW = "as it is", "slow"
ORDER = (
    *[("by estimate", FAST), ("always", FAST)] * 3,
    ("never", FAST),
    ("by estimate", SLOW),
    ("always", SLOW),
)


@dataclass(frozen=True)
class Round:
    """All prompts once: seconds, tokens that went through the model, what was read, and both estimates at the end."""

    way: str
    disk: str
    seconds: float
    computed_tokens: int
    fetched_bytes: int
    fetch_choices: int
    recompute_choices: int
    disk_bytes_per_second: float
    compute_tokens_per_second: float
    answers_equal: bool = True


def play(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Ask every prompt once; returns the answers."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        answers.append(out[0].tolist())
    return answers


def timed(
    way: str, disk: str, model: PreTrainedModel, prompts: list[list[int]], expected: list[list[int]]
) -> tuple[Round, list[list[int]]]:
    """One round, and its answers; they are compared where there are others already."""
    model.paged.reset_stats()
    begin = time.perf_counter()
    answers = play(model, prompts)
    seconds = time.perf_counter() - begin
    stats = model.paged.stats()
    figures = [getattr(stats, name) for name in list(Round.__annotations__)[3:-1]]
    return Round(way, disk, seconds, *figures, answers_equal=not expected or answers == expected), answers


@contextmanager
def reading_at(bytes_per_second: float | None) -> Iterator[None]:
    """Reading takes at least as long as on a disk of that speed."""
    read = RecordFile.read

    def slow(self: RecordFile, slot: int, into: memoryview, checksum: int) -> bool:
        time.sleep(len(into) / bytes_per_second)
        return read(self, slot, into, checksum)

    if bytes_per_second is None:
        yield
    else:
        with mock.patch.object(RecordFile, "read", slow):
            yield


def rounds(options: argparse.Namespace) -> Iterator[Round]:
    """Fill the tier, then play every way that was asked for."""
    model = smollm2.load_model(torch.float32)
    model.generation_config.eos_token_id = None
    tokens = text.corpus(smollm2.load_tokenizer())
    # Each prompt begins with another token, so that none has a beginning in common with another.
    prompts = [[100 + i, *tokens[i * 397 :][: options.tokens - 1]] for i in range(options.prompts)]
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    blocks = options.fits * -(-(options.tokens + NEW) // BLOCK_SIZE) + 1
    memory = {"cpu": blocks * BLOCK_SIZE * token_bytes}
    with paged(model, block_size=BLOCK_SIZE, max_memory=memory):
        play(model, prompts[:1])
        model.paged.clear()
        played, expected = timed("no tier", "none", model, prompts, [])
        yield played
    with tempfile.TemporaryDirectory() as folder:
        patch_model(model, block_size=BLOCK_SIZE, max_memory=memory | {"disk": "100GiB"}, offload_folder=folder)
        yield timed("filling the tier", FAST, model, prompts, expected)[0]
        tier = model.paged._pool.tiers
        for way, disk in ORDER:
            tier.levels[-1].flush()
            fresh = POLICIES[way]()
            fresh.tokens_computed = tier.policy.tokens_computed  # known from filling; reading is yet to be tried
            tier.policy = fresh
            with reading_at(options.read_rate * 1e6 if disk == SLOW else None):
                yield timed(way, disk, model, prompts, expected)[0]
        model.paged.release()


def losses(played: Sequence[Round]) -> dict[str, float]:
    """For each disk: how many times as long as the better of always and never the choice has taken."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for each in played:
        seconds.setdefault((each.way, each.disk), []).append(each.seconds)
    never = median(seconds["never", FAST])
    return {
        disk: median(seconds["by estimate", disk]) / min(median(seconds["always", disk]), never)
        for disk in (FAST, SLOW)
    }


def table(played: list[Round]) -> Table:
    """Return the rounds for people."""
    made = Table(title="Prompts in rotation", title_justify="left")
    made.add_column("fetching", no_wrap=True)
    made.add_column("disk", no_wrap=True)
    for name in ("seconds", "tokens computed", "MB read", "fetched", "computed anew", "read MB/s", "tokens/s"):
        made.add_column(name, justify="right")
    made.add_column("answers equal")
    for each in played:
        made.add_row(
            each.way,
            each.disk,
            f"{each.seconds:.2f}",
            f"{each.computed_tokens:,}",
            f"{each.fetched_bytes / report.MEGABYTE:,.0f}",
            str(each.fetch_choices),
            str(each.recompute_choices),
            f"{each.disk_bytes_per_second / report.MEGABYTE:,.0f}",
            f"{each.compute_tokens_per_second:,.0f}",
            "yes" if each.answers_equal else "[bold red]NO[/]",
        )
    return made


def main() -> int:
    """Run everything. The exit status is 1 where an answer differs, or the choice is slower than the better of two."""
    parser = environment.parser("benchmarks.disk", __doc__)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=800, help="of each prompt")
    parser.add_argument("--fits", type=int, default=10, help="prompts that memory has room for")
    parser.add_argument("--read-rate", type=float, default=10, help="MB/s of the slow disk (default 10)")
    options = environment.parse(parser)
    described = environment.describe()
    console, played = report.console(), []
    for each in rounds(options):
        console.print(f"{each.way}, disk {each.disk}: {each.seconds:.2f} s")
        played.append(each)
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    lost = losses(played)
    console.print(table(played), environment.summary(described), asked)
    for disk, factor in lost.items():
        console.print(f"disk {disk}: the choice takes {factor:.3f} times as long as the better of always and never")
    is_whole = all(asked[name] == parser.get_default(name) for name in ("prompts", "tokens", "fits", "read_rate"))
    path = options.out / ("disk.json" if is_whole else "partial.disk.json")
    content = {
        "environment": described,
        "settings": asked,
        "choice_over_better": lost,
        "rounds": [asdict(each) for each in played],
    }
    environment.save(path, content)
    console.print(f"Written: {path}")
    return int(max(lost.values()) > NOISE or not all(each.answers_equal for each in played))


if __name__ == "__main__":
    sys.exit(main())
