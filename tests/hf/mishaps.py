"""Calls that go wrong, and what must hold after them: nothing is in use, and the next answers are right."""

import functools
import gc

import prompts
import torch
from families import stock_model
from patched_copies import GREEDY
from transformers import StoppingCriteria

BEAMS = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}


@functools.cache
def expected(prompt, beams: bool = False) -> torch.Tensor:
    return stock_model("llama").generate(**prompt(), **(BEAMS if beams else GREEDY))


def assert_usable(model):
    """Nothing is left in use, and the next calls are right."""
    gc.collect()
    stats = model.paged.stats()
    assert (stats.blocks_in_use, stats.bytes_in_use) == (0, 0)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected(prompts.shared_prefix))
    assert torch.equal(model.generate(**prompts.ragged(), **BEAMS), expected(prompts.ragged, beams=True))
    assert model.paged.stats().blocks_in_use == 0


class AtFourthStep:
    """A streamer that does something to the model in the midst of a call."""

    def __init__(self, model, change):
        self.model, self.change, self.steps = model, change, 0

    def put(self, value):
        self.steps += 1
        if self.steps == 4:
            self.change(self.model)

    def end(self):
        pass


class Boom(Exception):
    pass


class BadCriterion(StoppingCriteria):
    def __init__(self, error, at):
        self.error, self.left = error, at

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise self.error("criterion")
        return torch.zeros(len(input_ids), dtype=torch.bool)
