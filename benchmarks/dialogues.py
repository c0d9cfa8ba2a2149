"""``python -m benchmarks.dialogues``: calls that follow one another on the same prefix, stock against patched.

Each dialogue runs from nothing: the patched side forgets all prefixes before it, so its first turn computes everything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline
from transformers.generation.streamers import BaseStreamer

from hf_paged import paged
from hf_paged.core.prefix import PrefixIndex, pack_tokens, root_key
from hf_paged.identity import ModelIdentity

from . import environment, report, smollm2, text
from .measure import forget_prefixes
from .runner import Sides


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Calls in a row. Call ``i`` has ``shared`` tokens that all begin with, and ``own`` tokens of its own.

    ``is_chat``: through a text-generation pipeline, where each turn holds all turns before it; otherwise every call
    is a question of its own.
    """

    name: str
    title: str
    shared: int
    own: int
    calls: int
    new: int
    is_chat: bool
    whole_floor: float
    first_token_floor: float | None = None


DIALOGUES = (
    Dialogue(
        name="chat",
        title="6-turn chat on a 3,000-token system prompt, through a pipeline",
        shared=3000,
        own=16,
        calls=6,
        new=24,
        is_chat=True,
        whole_floor=2.5,
        first_token_floor=10.0,
    ),
    Dialogue(
        name="few-shot",
        title="16 questions under one 2,000-token prompt, one by one",
        shared=2000,
        own=24,
        calls=16,
        new=16,
        is_chat=False,
        whole_floor=3.0,
    ),
)

COLD_RUNS = 15
COLD_LIMIT = 1.02
INDEXED_BLOCKS, LOOKED_UP_TOKENS = 100_000, 10_000


class FirstToken(BaseStreamer):
    """Notes when the first new token comes; the prompt is what comes before it."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Turn:
    """One call: seconds to its first token and in all, prompt tokens that went through the model, and the answer."""

    first_seconds: float
    seconds: float
    computed_tokens: int | None
    answer: str


@dataclass(frozen=True)
class Comparison:
    """One dialogue on both sides."""

    dialogue: Dialogue
    stock: list[Turn]
    patched: list[Turn]

    @property
    def whole_ratio(self) -> float:
        """Stock's time over ours, all calls together."""
        return sum(t.seconds for t in self.stock) / sum(t.seconds for t in self.patched)

    @property
    def first_token_ratio(self) -> float:
        """How much sooner the first token comes from the second call on: the median of the calls."""
        return median(s.first_seconds / p.first_seconds for s, p in zip(self.stock[1:], self.patched[1:], strict=True))

    @property
    def exact(self) -> bool:
        """Whether all answers are equal."""
        return [t.answer for t in self.stock] == [t.answer for t in self.patched]


def play(dialogue: Dialogue, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """Run one dialogue from nothing."""
    forget_prefixes(model)
    ask = _chat(dialogue, model, tokenizer) if dialogue.is_chat else _questions(dialogue, model, tokenizer)
    turns = []
    for call in range(dialogue.calls):
        if hasattr(model, "paged"):
            model.paged.reset_stats()
        streamer = FirstToken()
        begin = time.perf_counter()
        answer = ask(call, streamer)
        end = time.perf_counter()
        computed = model.paged.stats().computed_tokens if hasattr(model, "paged") else None
        turns.append(Turn(streamer.stamps[1] - begin, end - begin, computed, answer))
    return turns


def _pieces(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    tokens = text.corpus(tokenizer)
    rest = tokens[dialogue.shared :]
    return tokens[: dialogue.shared], [rest[i * dialogue.own : (i + 1) * dialogue.own] for i in range(dialogue.calls)]


def _chat(
    dialogue: Dialogue, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int, BaseStreamer], str]:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    shared, own = _pieces(dialogue, tokenizer)
    messages = [{"role": "system", "content": tokenizer.decode(shared)}]

    def ask(call: int, streamer: BaseStreamer) -> str:
        messages.append({"role": "user", "content": tokenizer.decode(own[call])})
        out = pipe(messages, max_new_tokens=dialogue.new, do_sample=False, streamer=streamer)
        messages[:] = out[0]["generated_text"]
        return messages[-1]["content"]

    return ask


def _questions(
    dialogue: Dialogue, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int, BaseStreamer], str]:
    shared, own = _pieces(dialogue, tokenizer)

    def ask(call: int, streamer: BaseStreamer) -> str:
        ids = torch.tensor([shared + own[call]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=dialogue.new,
            do_sample=False,
            streamer=streamer,
        )
        return tokenizer.decode(out[0, ids.shape[1] :])

    return ask


def cold_factor(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Time of a call that hits nothing over that of the same call with ``prefix_caching=False``, 100 + 16 tokens."""
    ids = torch.tensor([text.corpus(tokenizer)[:100]])

    def once(enabled: bool) -> float:
        with paged(model, prefix_caching=enabled):
            _generate_16(model, ids)  # looks at what the model can do, once a patch
            forget_prefixes(model)
            begin = time.perf_counter()
            _generate_16(model, ids)
            return time.perf_counter() - begin

    pairs = [(once(True), once(False)) if i % 2 else (once(False), once(True))[::-1] for i in range(COLD_RUNS)]
    return median(on for on, _ in pairs) / median(off for _, off in pairs)


def look_up_seconds() -> float:
    """Time to find a prompt of 10,000 tokens among 100,000 blocks of 16, all of it being there: the median."""
    index = PrefixIndex(16)
    root = root_key(b"model", None)
    prompts = [[(chain * 7919 + i * 104729) % 49152 for i in range(LOOKED_UP_TOKENS)] for chain in range(160)]
    block = 0
    for prompt in prompts:
        parent = root
        for at in range(0, LOOKED_UP_TOKENS, 16):
            block += 1
            parent = index.add(parent, pack_tokens(prompt[at : at + 16]), [block])
    if len(index) != INDEXED_BLOCKS:
        raise AssertionError(f"{len(index)} blocks indexed")
    seconds = []
    for prompt in prompts:
        begin = time.perf_counter()
        match = index.match(root, prompt, LOOKED_UP_TOKENS)
        seconds.append(time.perf_counter() - begin)
        if match.num_tokens != LOOKED_UP_TOKENS:
            raise AssertionError(f"{match.num_tokens} tokens found")
    return median(seconds)


def identity_seconds(model: PreTrainedModel) -> float:
    """Time to see that a model is as it was, right after a forward has emptied the processor's caches: the median."""
    identity = ModelIdentity(model)
    identity.digest()
    seconds = []
    for _ in range(COLD_RUNS):
        with torch.no_grad():
            model(torch.tensor([[1]]))
        begin = time.perf_counter()
        identity.digest()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def _generate_16(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)


def table(comparisons: list[Comparison]) -> Table:
    """Return the comparisons for people."""
    made = Table(title="Calls on a common prefix: stock / patched", title_justify="left")
    made.add_column("dialogue", no_wrap=True)
    for name in ("stock s", "patched s", "ratio", "floor", "first token, later calls", "floor", "computed by call"):
        made.add_column(name, justify="right")
    made.add_column("answers equal")
    for each in comparisons:
        dialogue = each.dialogue
        floor = dialogue.first_token_floor
        made.add_row(
            dialogue.title,
            f"{sum(t.seconds for t in each.stock):.2f}",
            f"{sum(t.seconds for t in each.patched):.2f}",
            report.coloured(f"{each.whole_ratio:.2f}", each.whole_ratio >= dialogue.whole_floor),
            report.number(dialogue.whole_floor),
            report.coloured(
                f"{each.first_token_ratio:.1f}", None if floor is None else each.first_token_ratio >= floor
            ),
            report.number(floor),
            " ".join(str(turn.computed_tokens) for turn in each.patched),
            "yes" if each.exact else "[bold red]NO[/]",
        )
    return made


def as_json(each: Comparison) -> dict[str, object]:
    """Return one comparison as plain values."""
    return asdict(each) | {
        "whole_ratio": each.whole_ratio,
        "first_token_ratio": each.first_token_ratio,
        "answers_equal": each.exact,
    }


def main() -> int:
    """Run everything. The exit status is 1 where an answer differs from stock's."""
    parser = environment.parser("benchmarks.dialogues", __doc__)
    parser.add_argument("--only", choices=[d.name for d in DIALOGUES] + ["cold"], action="append")
    options = environment.parse(parser)
    described = environment.describe()
    tokenizer = smollm2.load_tokenizer()
    sides = Sides.of(smollm2.load_model(torch.float32))
    comparisons, figures = [], {}
    console = report.console()
    for dialogue in DIALOGUES:
        if options.only is None or dialogue.name in options.only:
            console.print(f"{dialogue.title} ...")
            stock = play(dialogue, sides.stock, tokenizer)
            comparisons.append(Comparison(dialogue, stock, play(dialogue, sides.patched, tokenizer)))
    if options.only is None or "cold" in options.only:
        figures = {
            "cold_factor": cold_factor(sides.peer, tokenizer),
            "look_up_seconds": look_up_seconds(),
            "identity_seconds": identity_seconds(sides.peer),
        }
    console.print(table(comparisons), environment.summary(described))
    if figures:
        console.print(
            f"A call that hits nothing takes {figures['cold_factor']:.3f} × the time with prefix_caching=False "
            f"(at most {COLD_LIMIT}); {LOOKED_UP_TOKENS:,} tokens are found among {INDEXED_BLOCKS:,} blocks in "
            f"{figures['look_up_seconds'] * 1e3:.1f} ms; seeing that the model is as it was takes "
            f"{figures['identity_seconds'] * 1e3:.1f} ms."
        )
    content = {"environment": described, **figures, "dialogues": [as_json(each) for each in comparisons]}
    name = "dialogues" if options.only is None else "partial.dialogues"
    path = options.out / f"{name}.json"
    environment.save(path, content)
    console.print(f"Written: {path}")
    return 0 if all(each.exact for each in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
