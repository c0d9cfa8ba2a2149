"""Stock and a patched copy of it whose decode steps are graphs, on tapes (the fixtures `driver` and `quick`)."""

import copy

import pytest
import torch
from families import FAMILIES
from prompts import batch, tokens

from hf_paged import patch_model

PROMPT = tokens(19, seed=1)


class Both:
    """Stock, and a patched copy of it."""

    def __init__(self, changes=None, family="llama", **settings):
        if FAMILIES[family].missing():
            pytest.skip(FAMILIES[family].missing())  # this transformers is older than the family
        self.stock = FAMILIES[family].build(**changes or {})
        settings = {"attention_backend": "triton", "block_size": 16} | settings
        self.model = patch_model(copy.deepcopy(self.stock), **settings)

    @property
    def graphs(self):
        return self.model.paged._graphs

    @property
    def replayed(self):
        return self.model.paged.stats().replayed_steps

    @property
    def reasons(self):
        return self.model.paged.stats().fallbacks

    def ask(self, rows=(PROMPT,), new=5, change=None, **arguments):
        """Tokens of both, which must be equal; returns the number of steps that were replayed."""
        before, answers = self.replayed, []
        arguments = {"do_sample": False} | arguments
        for each in (self.stock, self.model):
            torch.manual_seed(7)
            extra = {name: value() for name, value in (change or {}).items()}
            answers.append(each.generate(**batch(list(rows)), max_new_tokens=new, **arguments, **extra))
        assert torch.equal(*answers), f"stock {answers[0].tolist()}, ours {answers[1].tolist()}"
        self.model.paged._pool.manager.check_integrity()
        assert self.model.paged.stats().blocks_in_use == 0, "a graph holds a cache"
        return self.replayed - before
