"""Forward hooks of others are given the shapes that they are given on stock: they may tell rows and columns apart."""

import prompts
import pytest
import torch
from compare import BLOCK_SIZE
from pair import Pair
from prompts import batch, tokens

from hf_paged import patch_model

ROWS = [tokens(13, seed) for seed in (3, 4, 6)]
PUSH = 2 * torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(3))


def last_column(module, args, output):
    """Steers what the next token is predicted from, as one does by position."""
    output = output.clone()
    output[:, -1] += PUSH[0, 0]
    return output


def fifth_column(module, args, output):
    output = output.clone()
    if output.shape[1] > 5:
        output[:, 4] += PUSH[0, 0]
    return output


def each_row_its_own(module, args, output):
    """A batch of 3 that is steered three ways."""
    return output + PUSH


def _hooked(pair: Pair, hook):
    return [model.model.layers[0].register_forward_hook(hook) for model in (pair.stock, pair.model)]


@pytest.mark.parametrize("first", ["without", "with"])
@pytest.mark.parametrize("hook", [last_column, fifth_column, each_row_its_own], ids=lambda hook: hook.__name__)
def test_steering_by_row_and_column_is_that_of_stock(hook, first):
    pair = Pair()
    plain = pair.ask(ROWS) if first == "without" else None
    handles = _hooked(pair, hook)
    for kwargs in ({}, {"eos_token_id": list(range(4, 60))}, {"prefill_chunk_size": 7}):
        steered = pair.ask(ROWS, **kwargs)
        assert plain is None or not torch.equal(steered, plain), "the hook must matter"
        assert pair.paged.stats().fallbacks["LlamaDecoderLayer with a forward hook"] == 1
    for handle in handles:
        handle.remove()
    pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}, "fast again"
    assert pair.reused > 0


def test_recorded_activations_have_the_shapes_of_stock():
    pair = Pair()
    inputs = prompts.ragged()
    pair.ask(inputs)
    seen = {pair.stock: [], pair.model: []}
    for model, shapes in seen.items():
        model.model.layers[1].register_forward_hook(lambda module, args, output, shapes=shapes: shapes.append(output))
    pair.ask(inputs, eos_token_id=list(range(4, 60)))
    expected, actual = seen.values()
    assert [each.shape for each in actual] == [each.shape for each in expected]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[0][real], expected[0][real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_hook_that_comes_between_two_calls_on_one_cache():
    pair = Pair()
    answers = []
    for model in (pair.stock, pair.model):
        inputs = batch(ROWS)
        first = model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
        model.model.layers[0].register_forward_hook(last_column)
        ids = torch.cat([first.sequences, inputs["input_ids"][:, :5]], dim=1)
        mask = torch.ones_like(ids)
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        answers.append(model.generate(**given, do_sample=False, max_new_tokens=8))
    assert torch.equal(*answers)


def test_hooks_of_torch_are_no_obstacle():
    """Old style weight norm computes a weight in a pre-hook, whatever passes."""
    pair = Pair()
    pair.both(lambda model: torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj))
    with pytest.warns(FutureWarning):
        pair.both(lambda model: torch.nn.utils.weight_norm(model.model.layers[0].mlp.down_proj))
    assert pair.model.model.layers[0].mlp.down_proj._forward_pre_hooks
    pair.ask(ROWS)
    assert list(pair.paged.stats().fallbacks) == ["prefixes not reused: Linear with a forward pre-hook"]


def test_a_module_that_takes_the_place_of_another_is_tried_anew():
    class LastColumn(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return getattr(super().__getattr__("inner"), name) if name == "layer_type" else super().__getattr__(name)

        def forward(self, *args, **kwargs):
            return last_column(self, args, self.inner(*args, **kwargs))

    def wrap(model):
        model.model.layers[0] = LastColumn(model.model.layers[0]).eval()

    pair = Pair()
    before = pair.ask(ROWS)
    pair.both(wrap)
    assert not torch.equal(pair.ask(ROWS), before)
    patch_model(pair.model, block_size=2 * BLOCK_SIZE)
    pair.ask(ROWS)


def test_a_forward_that_takes_the_place_of_another_is_tried_anew():
    def wrap(model):
        layer = model.model.layers[0]
        inner = layer.forward
        layer.forward = lambda *args, **kwargs: last_column(layer, args, inner(*args, **kwargs))

    pair = Pair()
    before = pair.ask(ROWS)
    pair.both(wrap)
    assert not torch.equal(pair.ask(ROWS), before)
