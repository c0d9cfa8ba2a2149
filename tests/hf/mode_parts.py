"""What generation modes are made of: runs and their outcomes, ends of rows, processors, streamers, draft models."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from families import FIRST_TOKEN, Family, stock_model
from transformers import LogitsProcessor, StoppingCriteria

NEW = 10  # new tokens of a usual call: into another block, and one after the last row's end (`ends_of_rows`)


@dataclass
class Outcome:
    """What one run returned, in a form that can be compared.

    `tokens`: one tensor of sequences per call. `tensors`: name → tensors, in order. `rows`: name → for each tensor
    a boolean `[rows, query tokens]` of the positions worth comparing (padding is nobody's business).
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    rows: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    streamed: list[torch.Tensor] = field(default_factory=list)
    caches: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # anything else that must be equal

    def add(self, output) -> None:
        if isinstance(output, torch.Tensor):
            self.tokens.append(output)
            return
        self.tokens.append(output.sequences)
        for name in ("scores", "logits", "sequences_scores", "beam_indices"):
            value = getattr(output, name, None)
            if value is not None:
                self.tensors.setdefault(name, []).extend([value] if isinstance(value, torch.Tensor) else value)
        self.caches.append(getattr(output, "past_key_values", None))


@dataclass(frozen=True)
class Run:
    """One model in one mode: the model, its family, the inputs, and a function that patches helper models."""

    model: torch.nn.Module
    family: Family
    inputs: dict
    patch: Callable = lambda model: model  # identity on the stock side

    @property
    def is_encoder_decoder(self) -> bool:
        return self.model.config.is_encoder_decoder

    def generate(self, *, inputs: dict | None = None, **kwargs):
        torch.manual_seed(7)
        return self.model.generate(**(self.inputs if inputs is None else inputs), **kwargs)


@dataclass(frozen=True)
class Mode:
    """`plain`: a packed family must take the fast path, computing each distinct prompt token once.

    `copies`: into how many rows `generate` expands each prompt. `attention`: the implementation set on both models.
    """

    name: str
    inputs: Callable[[], dict]
    call: Callable[[Run], Outcome]
    plain: bool = False
    copies: int = 1
    attention: str | None = None
    greedy: bool = True  # tokens are an argmax of logits, so that a tie can be told from an error


class RowsEnd(StoppingCriteria):
    """Row i is done after 2 + 3 × (i mod 3) new tokens; with `eos_token_id`, finished rows are then padded."""

    def __init__(self, prompt_length: int, eos_token_id: int | None = None):
        self.prompt_length = prompt_length
        if eos_token_id is not None:
            self.eos_token_id = torch.tensor([eos_token_id])

    def __call__(self, input_ids, scores, **kwargs):
        limits = 2 + 3 * (torch.arange(input_ids.shape[0]) % 3)
        return input_ids.shape[1] - self.prompt_length >= limits


class ShiftLogits(LogitsProcessor):
    """A user's own processor: depends on the tokens so far and on the row."""

    def __call__(self, input_ids, scores):
        rows = torch.arange(len(input_ids))
        scores = scores.clone()
        scores[rows, input_ids[:, -1]] -= 3.0
        scores[rows, (input_ids.sum(-1) + rows) % scores.shape[-1]] += 1.0
        return scores


class RecordingStreamer:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ended += 1


def allowed_tokens(batch_id: int, input_ids: torch.Tensor) -> list[int]:
    start = (int(input_ids[-1]) * 7 + batch_id) % 40 + FIRST_TOKEN
    return list(range(start, start + 60))


def prompt_length(run: Run) -> int:
    return 1 if run.is_encoder_decoder else run.inputs["input_ids"].shape[1]


def ends_of_rows(run: Run) -> list[int]:
    """End-of-sequence ids that occur at different steps: token 2 of row 0, token 5 of row 1, token 8 of row 2."""
    rows, width = run.inputs["input_ids"].shape
    if (run.family.name, rows, width) not in _ENDS:
        sequences = stock_model(run.family.name).generate(**run.inputs, do_sample=False, max_new_tokens=NEW)
        new = sequences[:, prompt_length(run) :]
        _ENDS[run.family.name, rows, width] = [int(new[row, 2 + 3 * row]) for row in range(min(3, len(new)))]
    return _ENDS[run.family.name, rows, width]


_ENDS: dict[tuple[str, int, int], list[int]] = {}


def draft(run: Run, *, near: bool, patched: bool = False) -> torch.nn.Module:
    """A draft model: `near` = the same model with noise, so that some of its tokens are accepted; else a stranger."""
    if near:
        model = copy.deepcopy(stock_model(run.family.name))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    else:
        model = run.family.build(seed=99)
    return run.patch(model) if patched else model
