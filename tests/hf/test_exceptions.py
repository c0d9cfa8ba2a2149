"""Whatever is raised in the midst of a call, no block stays in use and the next calls are right."""

import contextlib
import copy

import prompts
import pytest
import torch
from mishaps import BadCriterion, Boom, assert_usable, expected
from patched_copies import GREEDY, LLAMA, patched, returned_cache
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_paged import unpatch_model


class BadStreamer:
    def __init__(self, error, at):
        self.error, self.left = error, at

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise self.error("streamer")

    def end(self):
        pass


def bad_processor(error, at):
    left = [at]

    def processor(input_ids, scores):
        left[0] -= 1
        if left[0] < 0:
            raise error("processor")
        return scores

    return processor


@pytest.mark.parametrize(("at", "error"), [(0, Boom), (1, KeyboardInterrupt), (4, Boom)])
@pytest.mark.parametrize(
    "how", ["streamer", "criterion", "criterion in beams", "processor", "criterion in assisted", "returned dict"]
)
def test_exception_leaves_no_block_in_use(how, at, error):
    model = patched()
    bad = StoppingCriteriaList([BadCriterion(error, at)])
    calls = {
        "streamer": {"streamer": BadStreamer(error, at)},
        "criterion": {"stopping_criteria": bad},
        "criterion in beams": {"stopping_criteria": bad, "num_beams": 3},
        "processor": {"logits_processor": [bad_processor(error, at)]},
        "criterion in assisted": {"stopping_criteria": bad, "assistant_model": LLAMA.build(seed=99)},
        "returned dict": {"stopping_criteria": bad, "return_dict_in_generate": True, "output_scores": True},
    }
    inputs = prompts.single() if "assisted" in how else prompts.shared_prefix()
    with pytest.raises(error) as raised:
        model.generate(**inputs, do_sample=False, max_new_tokens=10, **calls[how])
    assert model.paged.stats().blocks_in_use == 0, "in use while somebody handles the exception, traceback and all"
    del raised
    assert_usable(model)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_exception_inside_the_model(layer, at):
    """Ctrl-C or an out-of-memory error strikes in the middle of a forward: some layers have written, some not."""
    model, left = patched(), [at]

    def hook(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    model.generate(**prompts.single(), **GREEDY)  # what the model can do has been found out before
    handle = model.model.layers[layer].self_attn.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt) as raised:
        model.generate(**prompts.shared_prefix(), **GREEDY)
    handle.remove()
    assert model.paged.stats().blocks_in_use == 0
    del raised
    assert_usable(model)


def test_exception_while_the_model_is_looked_at_for_the_first_time():
    """The very first call tries out what the model can do: Ctrl-C there must not leave a wrong answer behind."""
    model = patched()

    def hook(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt) as raised:
        model.generate(**prompts.shared_prefix(), **GREEDY)
    handle.remove()
    assert model.paged.stats().blocks_in_use == 0
    del raised
    model.paged.reset_stats()  # which say that nothing is reused where a hook might change it
    assert_usable(model)
    assert model.paged.stats().fallbacks == {}


def test_exception_with_a_cache_that_the_user_holds():
    """The user's cache survives a failed call, and letting go of it frees its blocks."""
    model = patched()
    output = returned_cache(model, prompts.single())
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    bad = StoppingCriteriaList([BadCriterion(Boom, 2)])
    with pytest.raises(Boom):
        model.generate(**whole, past_key_values=output.past_key_values, stopping_criteria=bad, **GREEDY)
    assert model.paged.stats().blocks_in_use > 0
    del output
    assert_usable(model)


def test_unpatching_inside_a_generate_is_refused_or_harmless():
    """A criterion that unpatches the model it runs on: whatever happens, nothing leaks and stock is back."""
    model = patched()

    class Unpatch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            unpatch_model(model)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with contextlib.suppress(RuntimeError):
        model.generate(**prompts.single(), stopping_criteria=StoppingCriteriaList([Unpatch()]), **GREEDY)
    unpatch_model(model)
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))
    assert not hasattr(copy.copy(model), "paged")
