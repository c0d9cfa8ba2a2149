"""The test models themselves: a wrong cache can only show in models whose output depends on it."""

import prompts
import pytest
import torch
from compare import every_family
from families import stock_model
from prompts import batch, tokens


@pytest.mark.parametrize("family", every_family())
def test_greedy_output_varies(family):
    inputs = batch([tokens(21), tokens(21, seed=1), tokens(21, seed=2)])
    start = 1 if "encoder_decoder" in family.tags else 21
    new = stock_model(family.name).generate(**inputs, do_sample=False, max_new_tokens=12)[:, start:]
    distinct = [len(set(row.tolist())) for row in new]
    assert min(distinct) >= 4, f"{family.name}: only {distinct} distinct tokens of 12"
    assert sum(distinct) >= 20, f"{family.name}: only {distinct} distinct tokens of 12"
    assert len({tuple(row.tolist()) for row in new}) == 3, f"{family.name}: the prompt makes no difference"


@pytest.mark.parametrize("family", every_family())
@torch.no_grad()
def test_output_depends_on_every_visible_token(family):
    model = stock_model(family.name)
    ids = torch.tensor([tokens(21)])

    def last_logits(changed):
        if "encoder_decoder" in family.tags:
            return model(input_ids=ids, decoder_input_ids=changed).logits[0, -1]
        return model(changed).logits[0, -1]

    expected = last_logits(ids)
    first = 21 - 8 if "sliding" in family.tags else 0
    for position in range(first, 21):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 20) % 100 + 3
        moved = (last_logits(changed) - expected).abs().max() / expected.std()
        assert moved > 1e-2, f"{family.name}: token {position} moves the last logits by only {moved:.1e}"


@pytest.mark.parametrize("family", every_family())
@torch.no_grad()
def test_output_depends_on_order(family):
    """Keys carry their positions: swapping two early tokens must show, or a permuted cache would not."""
    model = stock_model(family.name)
    ids = torch.tensor([tokens(21)])
    swapped = ids.clone()
    swapped[0, [15, 17]] = ids[0, [17, 15]]
    if "encoder_decoder" in family.tags:
        logits = [model(input_ids=ids, decoder_input_ids=changed).logits[0, -1] for changed in (ids, swapped)]
    else:
        logits = [model(changed).logits[0, -1] for changed in (ids, swapped)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[0].std(), family.name


def test_prompts_are_what_they_claim():
    assert prompts.num_distinct_tokens(prompts.identical()) == 19
    assert prompts.num_real_tokens(prompts.identical()) == 57
    assert prompts.num_distinct_tokens(prompts.shared_prefix()) == 18 + 1 + 5 + 9 + 4 + 12
    assert prompts.num_distinct_tokens(prompts.ragged()) == sum(prompts.LENGTHS)
    assert bool((prompts.holes()["attention_mask"].diff() != 0).sum(1).max() >= 2)
