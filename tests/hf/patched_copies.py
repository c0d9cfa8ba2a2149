"""Patched copies of tiny models, whose answers are compared with stock's: for tests of what people do with models."""

import prompts
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, stock_model

from hf_paged import patch_model

LLAMA = FAMILIES["llama"]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def expected_tokens(family=LLAMA):
    return stock_model(family.name).generate(**prompts.shared_prefix(), **GREEDY)


def assert_generates_as_stock(model, family=LLAMA):
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected_tokens(family))


def patched(family=LLAMA, **overrides):
    return patch_model(copy_of(family), **{"block_size": BLOCK_SIZE, **overrides})


def is_patched(model) -> bool:
    return hasattr(model, "paged")


def returned_cache(model, inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
