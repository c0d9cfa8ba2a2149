"""Random calls of random models, patched and stock: what is drawn, how it is compared, and how a failure is told.

`python tests/hf/fuzz.py --minutes 30` (`make fuzz MINUTES=30`) goes on until the time is over or something differs; a
failing case is made as small as hypothesis can make it, and printed as lines that reproduce it.
"""

import argparse
import copy
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import prompts
import torch
from families import FAMILIES, PAD
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from tolerances import TIE, bound

from hf_paged import patch_model

WINDOWED = ("mistral_sliding", "gemma2", "gemma3", "gpt_oss")
NAMES = (
    "llama", "qwen2", "qwen3", "mistral_sliding", "gemma2", "gemma3", "gpt2", "gpt_neox", "olmo2", "phi3", "smollm3",
    "mixtral", "granite", "opt", "bloom", "falcon_alibi", "falcon_rotary", "mpt", "deepseek_v3", "gpt_oss",
    "lfm2", "qwen3_next",
)  # fmt: skip
HEADED = ("llama", "qwen2", "qwen3", "mistral_sliding", "gemma2", "gemma3", "olmo2", "phi3", "mixtral", "granite")


@dataclass(frozen=True)
class Ask:
    """One `generate` call: prompts as pieces `(seed, length)`, padding to the left of each row, arguments."""

    rows: tuple[tuple[tuple[int, int], ...], ...]
    padding: tuple[int, ...] = ()
    arguments: dict = field(default_factory=dict)

    def inputs(self) -> dict:
        texts = [[token for number, length in row for token in prompts.tokens(length, number)] for row in self.rows]
        inputs = prompts.batch(texts)
        extra = max(self.padding, default=0)
        if extra:  # columns that are padding in every row
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            inputs["input_ids"] = torch.cat([torch.full((len(ids), extra), PAD), ids], dim=1)
            inputs["attention_mask"] = torch.cat([torch.zeros(len(ids), extra, dtype=torch.long), mask], dim=1)
        return inputs


@dataclass(frozen=True)
class Case:
    """A model, the settings it is patched with, and calls that follow one another."""

    family: str
    config: dict
    settings: dict
    asks: tuple[Ask, ...]

    def source(self) -> str:
        """Lines that reproduce the case, in `tests/hf`."""
        return f"from fuzz import Ask, Case, check\ncheck({self!r})"


@st.composite
def cases(draw, names=NAMES) -> Case:
    name = draw(st.sampled_from([name for name in names if not FAMILIES[name].missing()]))
    config = {}
    if name in HEADED:
        heads = draw(st.sampled_from([1, 2, 4]))
        kv_heads = draw(st.sampled_from([count for count in (1, 2, 4) if heads % count == 0]))
        config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if name in WINDOWED:
        # Not 1: stock's layers then keep all tokens (`[-0:]`) and mask as if they kept none.
        config["sliding_window"] = draw(st.sampled_from([2, 3, 5, 8, 9, 16, 17]))
    if name in ("qwen3", "gemma2", "gemma3"):
        config["head_dim"] = draw(st.sampled_from([8, 10, 16, 24]))
    if name in ("llama", "qwen2", "olmo2", "granite"):
        config["num_hidden_layers"] = draw(st.sampled_from([1, 2, 3]))
    chosen = {
        "block_size": draw(st.sampled_from([8, 16, 32])),
        "attention_backend": draw(st.sampled_from(["auto", "auto", "reference"])),
        "prefix_caching": draw(st.booleans()),
    }
    pieces = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=4))
    row = st.lists(st.sampled_from(pieces), min_size=1, max_size=3).map(tuple)
    asks = draw(st.lists(_asks(row), min_size=1, max_size=5))  # a hybrid finds nothing again before the third
    return Case(name, config, chosen, tuple(asks))


@st.composite
def _asks(draw, row) -> Ask:
    rows = tuple(draw(st.lists(row, min_size=1, max_size=4)))
    padding = (draw(st.sampled_from([0, 0, 1, 9])),)
    arguments = {"max_new_tokens": draw(st.integers(1, 12))}
    mode = draw(st.sampled_from(["greedy", "sample", "beam", "beam_sample"]))
    if "beam" in mode:
        arguments["num_beams"] = draw(st.integers(2, 4))
    if "sample" in mode:
        arguments |= {"do_sample": True, "temperature": draw(st.sampled_from([0.7, 1.3]))}
    else:
        arguments["do_sample"] = False
    if mode != "greedy":
        most = arguments.get("num_beams", 3)
        arguments["num_return_sequences"] = draw(st.integers(1, most))
    if draw(st.booleans()):
        arguments["eos_token_id"] = draw(st.lists(st.integers(3, 119), min_size=1, max_size=12, unique=True))
    if draw(st.integers(0, 3)) == 0:
        arguments["repetition_penalty"] = 1.3
    if draw(st.integers(0, 3)) == 0:
        arguments["prefill_chunk_size"] = draw(st.integers(1, 24))
    return Ask(rows, padding, arguments)


@torch.no_grad()
def check(case: Case) -> None:
    """Raises `AssertionError` where the patched model differs from stock, or keeps what it should have given back."""
    stock = FAMILIES[case.family].build(**case.config)
    model = patch_model(copy.deepcopy(stock), **case.settings)
    for number, ask in enumerate(case.asks):
        try:
            expected = _generate(stock, ask)
        except Exception:  # what stock refuses is nobody's business here
            continue
        actual = _generate(model, ask)
        _compare(f"call {number}", ask, expected, actual)
        del expected, actual
        stats = model.paged.stats()
        assert stats.prompt_tokens == stats.computed_tokens + stats.reused_tokens + stats.shared_tokens, stats
        assert stats.blocks_in_use == 0, f"call {number}: {stats.blocks_in_use} blocks in use"
        if model.paged._pool is not None:
            model.paged._pool.manager.check_integrity()


def _generate(model, ask: Ask):
    """Tokens, and of each step what the model was given and the scores it gave."""
    torch.manual_seed(9)
    steps = []

    def remember(ids, scores):
        steps.append((ids.clone(), scores.clone()))
        return scores

    return model.generate(**ask.inputs(), logits_processor=[remember], **ask.arguments), steps


def _compare(what: str, ask: Ask, expected, actual) -> None:
    """While both have the same tokens they must have the same scores; they part where stock's scores tie.

    Choosing is stock's own code, also where it searches with beams or draws.
    """
    (tokens, steps), (other_tokens, other_steps) = expected, actual
    for number, ((ids, scores), (other_ids, other_scores)) in enumerate(zip(steps, other_steps, strict=False)):
        assert ids.shape == other_ids.shape, (
            f"{what}, step {number}: {tuple(other_ids.shape)}, stock {tuple(ids.shape)}"
        )
        if not torch.equal(ids, other_ids):
            _assert_tie(f"{what}, step {number - 1}", ask, ids, other_ids, steps[number - 1][1])
            return
        rows = _running(ask, ids)
        wanted, got = scores[rows], other_scores[rows]
        error = torch.where(wanted == got, 0.0, (wanted - got).abs())
        assert bool((error <= bound(scores)).all()), (
            f"{what}: scores of step {number} differ by {float(error.max()):.2g} after\n  {ids.tolist()}"
        )
    if not torch.equal(tokens, other_tokens):
        width = min(tokens.shape[1], other_tokens.shape[1])
        last = steps[-1][1]
        assert len(steps) == len(other_steps), f"{what}: {len(other_steps)} steps, stock {len(steps)}"
        _assert_tie(f"{what}, last step", ask, tokens[:, :width], other_tokens[:, :width], last)


def _running(ask: Ask, ids: torch.Tensor) -> torch.Tensor:
    """Which rows have not ended; what a row is given after its end is padding, and its scores nobody's business."""
    ends = torch.tensor(ask.arguments.get("eos_token_id") or [-1])
    new = ids[:, ask.inputs()["input_ids"].shape[1] :]
    if "num_beams" in ask.arguments:
        return torch.ones(len(ids), dtype=torch.bool)
    return ~torch.isin(new, ends).any(dim=1)


def _assert_tie(what: str, ask: Ask, ids: torch.Tensor, other_ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Of equal scores the same token is taken, unless rounding decides; of a greedy choice that can be seen."""
    if not ask.arguments["do_sample"] and "num_beams" not in ask.arguments:
        rows = (ids != other_ids).any(dim=1)
        margins = scores[rows].topk(2).values.diff().abs()
        assert bool((margins <= TIE).all()), f"{what}: other tokens\n  {ids.tolist()}\n  {other_ids.tolist()}"
    warnings.warn(f"{what}: parted at a tie", stacklevel=2)


def options(examples: int, **more) -> settings:
    """Settings of a run: nothing is read from or left in a database."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        **more,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls of random models, patched and stock.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first batch (default: by the clock)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    end, number, count = time.time() + 60 * args.minutes, args.seed or int(time.time()), 0
    while time.time() < end:
        failing = _batch(number, end)
        count += _batch.count
        if failing is not None:
            print(f"FAILED, seed {number}; to see it again, in tests/hf:\n\n{failing.source()}\n", flush=True)
            check(failing)
            return 1
        number += 1
    print(f"{count} cases, nothing differs")
    return 0


def _batch(number: int, end: float, examples: int = 60, names=NAMES) -> Case | None:
    """The smallest failing case of one batch, or `None`."""
    smallest = []
    _batch.count = 0

    @seed(number)
    @options(examples, phases=[Phase.generate, Phase.shrink], verbosity=Verbosity.quiet, report_multiple_bugs=False)
    @given(cases(names))
    def run(case):
        if time.time() > end and not smallest:
            return
        _batch.count += 1
        try:
            check(case)
        except Exception:
            smallest[:] = [case]
            raise

    try:
        run()
    except Exception:
        return smallest[0]
    return None


if __name__ == "__main__":
    sys.exit(main())
