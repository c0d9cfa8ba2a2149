"""A model asked in the usual ways, stock and patched: what is the same, what is fast, and why not.

`python tests/hf/walk.py --write FILE` does so with every model of `zoo.py` and writes the table between the markers of
FILE, `--summary README` what it says, in short, between those of another one; `make capabilities` calls it.
"""

import argparse
import copy
import json
import re
import signal
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import prompts
import torch
import transformers
import zoo
from tolerances import TIE, bound

from hf_paged import patch_model

BLOCK_SIZE = 8
AGAIN = ("next turns", "chat")  # what earlier calls have computed comes again: in a batch, and in turns of one prompt
MODES = ("greedy", "samples", "beams", *AGAIN)
TURNS = 3
SLOW_SECONDS = 90
MARKERS = ("<!-- capabilities: begin -->", "<!-- capabilities: end -->")
# Named first where not all can be.
WELL_KNOWN = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss",
    "phi3", "deepseek_v3", "qwen3_next", "falcon", "whisper", "bart", "bloom", "mamba", "llama4_text",
)  # fmt: skip
MOST_NAMES = 8
TITLE = "| model types | " + " | ".join(MODES) + " | why not fast |"


@dataclass(frozen=True)
class Cell:
    """One model in one mode.

    Attributes:
        mode: of `MODES`.
        way: "fast" (read from blocks, each distinct prompt token computed once), "reused" (and what an earlier call had
            computed is not computed again), "padded" (on blocks in stock's shapes), "padded, reused" or "stock".
        reason: why it is not fast, or None.
        wrong: how it differs from stock, or None.
    """

    mode: str
    way: str
    reason: str | None
    wrong: str | None


def _inputs(mode: str) -> dict:
    system = prompts.tokens(30)
    if mode == "samples":
        return prompts.batch([prompts.tokens(33, seed=3)])
    if mode == "chat":
        return prompts.batch([prompts.tokens(37, seed=4)])
    rows = [system + prompts.tokens(length, seed=50 + length) for length in (1, 9)]
    rows += [system[:7] + prompts.tokens(4, seed=60), prompts.tokens(3, seed=61)]
    if mode == "next turns":
        rows = [row + prompts.tokens(6, seed=90) for row in rows]
    return prompts.batch(rows)


ARGUMENTS = {
    "greedy": {"do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3},
    "next turns": {"do_sample": False},
    "chat": {"do_sample": False},
}


def walk(stock: torch.nn.Module, new_tokens: int = 10, **settings) -> list[Cell]:
    """What a patched copy of `stock` does in each mode. Raises what stock raises where it cannot generate at all."""
    model = patch_model(copy.deepcopy(stock), block_size=BLOCK_SIZE, **settings)
    cells = []
    for mode in MODES:
        expected = _ask(stock, mode, new_tokens)
        model.paged.reset_stats()
        actual = _ask(model, mode, new_tokens)
        stats = model.paged.stats()
        cells.append(Cell(mode, *_way(stats, mode), _first_difference(expected, actual)))
        del actual
    return cells


@torch.no_grad()
def _ask(model, mode, new_tokens):
    """What a model says in each turn, and the logits of it; after the first to what it has said and something more."""
    inputs, turns = _inputs(mode), []
    for turn in range(TURNS if mode == "chat" else 1):
        torch.manual_seed(5)
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **ARGUMENTS[mode],
        )
        turns.append((output.sequences, output.logits))
        inputs = prompts.batch([output.sequences[0].tolist() + prompts.tokens(6, seed=90 + turn)])
        del output  # and its cache
    return turns


def _way(stats, mode) -> tuple[str, str | None]:
    """How the calls were computed, and why they were not fast."""
    reasons = list(stats.fallbacks)
    for reason in reasons:
        if reason.startswith("stock generate: "):
            return "stock", reason.removeprefix("stock generate: ")
    padded = [reason for reason in reasons if not reason.startswith(("prefixes not reused: ", "prompts not shared: "))]
    is_reused = mode in AGAIN and stats.reused_tokens
    if padded:
        return "padded, reused" if is_reused else "padded", padded[0]
    if is_reused:
        return "reused", None
    return "fast", reasons[0] if reasons else None


def _first_difference(expected, actual) -> str | None:
    """That of the first turn in which there is one; what follows a tie is not compared."""
    for turn, other in zip(expected, actual, strict=True):
        difference = _difference(turn, other)
        if difference is not None or not torch.equal(turn[0], other[0]):
            return difference
    return None


def _difference(expected, actual) -> str | None:
    """Other tokens than stock's, except at a tie; logits that are further away than rounding explains."""
    (tokens, logits), (other_tokens, other_logits) = expected, actual
    if len(tokens) != len(other_tokens):
        return f"{len(other_tokens)} rows, stock {len(tokens)}"
    prompt = tokens.shape[1] - len(logits)
    width = min(tokens.shape[1], other_tokens.shape[1])
    different = (tokens[:, :width] != other_tokens[:, :width]).any(dim=0).nonzero().flatten()
    steps = int(different[0]) - prompt + 1 if len(different) else min(len(logits), len(other_logits))
    for step in range(steps):
        error = (logits[step] - other_logits[step]).abs()
        if not bool((error.nan_to_num(float("inf")) <= bound(logits[step])).all()):
            return f"logits of new token {step} differ by {float(error.max()):.2g}"
    if len(different):
        best = logits[steps - 1].topk(2).values
        if float((best[:, 0] - best[:, 1]).min()) > TIE:
            return f"new token {steps - 1} is another one"
    return None


def walk_type(model_type: str, new_tokens: int = 10) -> list[Cell] | str:
    """The cells of one type of models, or why there are none.

    Random weights may bring two experts, or two tokens, so close that rounding decides. That does not happen twice:
    what is wrong with other weights, too, is wrong.
    """
    for seed in (1, 2):
        try:
            cells = walk(zoo.build(model_type, seed), new_tokens)
        except zoo.NotTiny as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if not any(cell.wrong for cell in cells):
            break
    return cells


# The table of all models


def main() -> int:
    parser = argparse.ArgumentParser(description="What is fast with which model.")
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument(
        "--results", type=Path, metavar="JSON", help="add to the results there; types in it are skipped"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="put what the table says between the markers of FILE"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = _read(args.results)
    for name in args.types or zoo.model_types():
        if name not in results:
            results[name] = _in_time(name)
            print(name, _brief(results[name]), flush=True)
            if args.results:
                args.results.write_text(json.dumps(results, default=asdict, indent=1))
    if args.write:
        write_between_markers(args.write, render(results))
    if args.summary:
        write_between_markers(args.summary, summarise(results))
    wrong = [name for name, cells in results.items() if not isinstance(cells, str) and any(c.wrong for c in cells)]
    print(f"{len(wrong)} wrong: {' '.join(wrong)}" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def write_between_markers(path: Path, text: str) -> None:
    pattern = re.compile(f"(?<={MARKERS[0]}\n).*?(?={MARKERS[1]})", re.DOTALL)
    path.write_text(pattern.sub(lambda _: text, path.read_text()))


def _read(path: Path | None) -> dict[str, list[Cell] | str]:
    found = json.loads(path.read_text()) if path and path.exists() else {}
    return {name: why if isinstance(why, str) else [Cell(**cell) for cell in why] for name, why in found.items()}


def _in_time(model_type: str) -> list[Cell] | str:
    """`walk_type`, or that it took too long."""

    def give_up(*_):
        raise TimeoutError(f"took more than {SLOW_SECONDS} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SLOW_SECONDS)
    try:
        return walk_type(model_type)
    finally:
        signal.alarm(0)


def _brief(cells: list[Cell] | str) -> str:
    if isinstance(cells, str):
        return f"- {cells}"
    return " ".join(cell.way if cell.wrong is None else f"WRONG({cell.wrong})" for cell in cells)


def _rows(results: dict[str, list[Cell] | str]) -> list[tuple[tuple[str, ...], str, list[str]]]:
    """Ways by mode, reason, and the models that these are true of; most models first."""
    alike = defaultdict(list)
    for name, cells in results.items():
        if not isinstance(cells, str):
            reasons = dict.fromkeys(cell.reason for cell in cells if cell.reason)
            ways = tuple(cell.way if cell.wrong is None else f"**wrong**: {cell.wrong}" for cell in cells)
            alike[ways, "; ".join(reasons)].append(name)
    return [(*key, names) for key, names in sorted(alike.items(), key=lambda item: -len(item[1]))]


def summarise(results: dict[str, list[Cell] | str]) -> str:
    """Markdown: as `render`, with some names of each row and how many there are."""
    lines = [
        "| | model types | " + " | ".join(MODES) + " | why not fast |",
        "| ---: " + "| --- " * (len(MODES) + 2) + "|",
    ]
    for ways, reason, names in _rows(results):
        shown = [*(each for each in WELL_KNOWN if each in names), *(each for each in names if each not in WELL_KNOWN)]
        more = ", …" if len(names) > MOST_NAMES else ""
        lines.append(f"| {len(names)} | {', '.join(shown[:MOST_NAMES])}{more} | {' | '.join(ways)} | {reason} |")
    return "\n".join([*lines, ""])


def render(results: dict[str, list[Cell] | str]) -> str:
    """Markdown: a row for each set of models that are alike, most of them first; then those that were not built."""
    rows = _rows(results)
    lines = [
        f"transformers {transformers.__version__}, float32, on the CPU.",
        "",
        TITLE,
        "| --- " * (len(MODES) + 2) + "|",
    ]
    for ways, reason, names in rows:
        lines.append(f"| {', '.join(names)} | {' | '.join(ways)} | {reason} |")
    counts = Counter("; ".join(dict.fromkeys(ways)) for ways, _, names in rows for _ in names)
    lines += [
        "",
        f"{sum(counts.values())} model types: {', '.join(f'{n} {ways}' for ways, n in counts.most_common())}.",
    ]
    missing = {name: why for name, why in results.items() if isinstance(why, str)}
    lines += ["", f"Not among them, {len(missing)}:", ""]
    lines += [f"- {name}: {why}" for name, why in missing.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
