"""Nothing stale is ever reused: LoRA adapters that are changed, switched, merged and disabled."""

import functools

import pytest
import torch
from adapters import lora_config, two_loras
from compare import copy_of
from families import FAMILIES
from mishaps import AtFourthStep
from pair import REUSED, ROWS, Pair, assert_change_is_noticed, piece
from prompts import batch


def adapter_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def switch_to(name):
    return functools.partial(_switch, name)


def _switch(name, model):
    model.set_adapter(name)


def scale(model):
    for layer in adapter_layers(model):
        layer.set_scale("first", 3.0)


def scaling_written(model):
    for layer in adapter_layers(model):
        layer.scaling["first"] *= 2


def reload_adapter(model):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name="first")
    set_peft_model_state_dict(model, {name: value.flip(0) for name, value in state.items()}, adapter_name="first")


def delete_and_add_again(model):
    model.set_adapter("second")
    model.delete_adapter("first")
    torch.manual_seed(17)
    model.add_adapter("first", lora_config())
    model.set_adapter("first")
    model.eval()


def data_of_the_adapter(model):
    for layer in adapter_layers(model):
        layer.lora_B["first"].weight.data.neg_()


def merge(model):
    model.merge_adapter()


def disable(model):
    model.base_model.disable_adapter_layers()


def combine(model):
    model.add_weighted_adapter(["first", "second"], [1.0, -1.0], "both", combination_type="linear")
    model.set_adapter("both")
    model.eval()  # PEFT leaves the new adapter's dropout in training mode


@pytest.mark.parametrize(
    "change",
    [
        switch_to("second"),
        scale,
        scaling_written,
        reload_adapter,
        delete_and_add_again,
        data_of_the_adapter,
        disable,
        combine,
    ],
    ids=lambda change: getattr(change, "__name__", "set_adapter"),
)
def test_a_changed_adapter_reuses_nothing(change):
    assert_change_is_noticed(Pair(wrap=two_loras), change)


def test_merging_and_unmerging():
    """Merged weights round differently, so even the same adapter reuses nothing."""
    pair = Pair(wrap=two_loras)
    pair.ask(ROWS)
    for change in (merge, lambda model: model.unmerge_adapter(), merge):
        pair.both(change)
        pair.ask(ROWS)
        assert pair.reused == 0
        pair.ask(ROWS)
        assert pair.reused == REUSED


def test_adapters_that_are_switched_back_find_their_own_again():
    pair = Pair(wrap=two_loras)
    seen = set()
    for name in ("first", "second", "first", "second", "none", "first", "second", "none", "second"):
        if name == "none":
            pair.both(lambda model: model.base_model.disable_adapter_layers())
        else:
            pair.both(lambda model: model.base_model.enable_adapter_layers())
            pair.both(switch_to(name))
        pair.ask(ROWS)
        assert pair.reused == (REUSED if name in seen else 0), f"{name} after {seen}"
        seen.add(name)


def test_an_adapter_that_is_switched_while_a_call_runs():
    """Even where another call with the second adapter has come and gone in between."""

    def switch(model):
        model.set_adapter("second")
        model.generate(**batch([piece(5, 7)]), do_sample=False, max_new_tokens=2)

    pair = Pair(wrap=two_loras)
    answer = pair.ask([ROWS[0]], streamer=lambda model: AtFourthStep(model, switch), max_new_tokens=14)
    for name in ("first", "second"):
        pair.both(switch_to(name))
        pair.ask([[*answer[0].tolist(), 5]])
        assert pair.reused <= 27, "the prompt was computed with the first adapter, the answer with both"


def test_a_disabled_adapter_is_the_base_model():
    pair = Pair(wrap=two_loras)
    plain = copy_of(FAMILIES["llama"])
    pair.ask(ROWS)
    for _ in range(2):
        with pair.model.disable_adapter():
            answer = pair.model.generate(**batch(ROWS), do_sample=False, max_new_tokens=6)
        assert torch.equal(answer, plain.generate(**batch(ROWS), do_sample=False, max_new_tokens=6))
        pair.ask(ROWS)
        assert pair.reused == REUSED
