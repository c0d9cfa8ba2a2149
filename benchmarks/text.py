"""Real English text that every Python carries: the topics of ``help()``."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

from .scenarios import Scenario


def prompts(scenario: Scenario, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` ``[rows, longest]``, padded on the left.

    The shared part and each row's own part are consecutive pieces of the text, so that nothing else repeats.
    """
    tokens = corpus(tokenizer)
    shared, begin = tokens[: scenario.shared], scenario.shared
    rows = []
    for length in scenario.own:
        rows.append(shared + tokens[begin : begin + length])
        begin += length
    if begin > len(tokens):
        raise ValueError(f"{scenario.name} wants {begin} tokens of text, there are {len(tokens)}")
    padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    return padded["input_ids"], padded["attention_mask"]


@cache
def corpus(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the text as tokens, longest topics first."""
    text = "\n\n".join(sorted(topics.values(), key=len, reverse=True)[:24])
    return tokenizer(text, add_special_tokens=False)["input_ids"]
