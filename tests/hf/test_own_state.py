"""Models whose modules keep something from pass to pass: after a call it is what stock's keep, no pass is run twice."""

import copy
import functools
import math

import more_models
import prompts
import pytest
import torch
from pair import Pair
from test_hybrid import trials
from transformers import BartForConditionalGeneration, Lfm2ForCausalLM

from hf_paged.own_state import OWN_STATE, OwnState

NEW = 14  # beyond the first steps, which are padded until a step was tried
MODELS = {"bart": BartForConditionalGeneration, "lfm2": Lfm2ForCausalLM}


def pair_of(name: str) -> Pair:
    return Pair.of(copy.deepcopy(more_models.build(name))) if name in more_models.ENCODER_DECODERS else Pair(name)


def register(model, value) -> None:
    model.register_buffer("kept", value, persistent=False)


# How a model begins, and what each pass does with what it keeps.
COUNTERS = {
    "int": (lambda model: setattr(model, "kept", 0), lambda model: setattr(model, "kept", model.kept + 1)),
    "float": (lambda model: setattr(model, "kept", 0.0), lambda model: setattr(model, "kept", model.kept + 1.0)),
    "tensor": (
        lambda model: setattr(model, "kept", torch.zeros(1)),
        lambda model: setattr(model, "kept", model.kept + 1),
    ),
    "tensor, written to": (lambda model: setattr(model, "kept", torch.zeros(1)), lambda model: model.kept.add_(1)),
    "buffer": (lambda model: register(model, torch.zeros(1)), lambda model: setattr(model, "kept", model.kept + 1)),
    "buffer, written to": (lambda model: register(model, torch.zeros(1)), lambda model: model.kept.add_(1)),
}
NOT_NUMBERS = {
    "float": lambda model: setattr(model, "kept", math.nan),
    "tensor": lambda model: setattr(model, "kept", torch.tensor([1.0, math.nan])),
    "buffer": lambda model: register(model, torch.tensor([1.0, math.nan])),
}


@pytest.fixture
def doing(monkeypatch):
    """Has each pass of a model's class do something first."""

    def do(kind, what) -> None:
        forward = kind.forward

        @functools.wraps(forward)
        def doing_so(self, *args, **kwargs):
            what(self)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", doing_so)

    return do


@pytest.mark.parametrize(
    ("name", "kept", "inference"),
    [
        *((name, kept, False) for name in MODELS for kept in COUNTERS),
        *(("bart", kept, True) for kept in COUNTERS if "tensor" in kept or "buffer" in kept),
    ],
)
def test_passes_are_counted_as_on_stock(name, kept, inference, doing):
    begin, count = COUNTERS[kept]
    doing(MODELS[name], count)
    pair = pair_of(name)
    with torch.inference_mode(inference):
        pair.both(begin)
        pair.ask(prompts.single(), max_new_tokens=NEW)
    assert (int(pair.stock.kept), int(pair.model.kept)) == (NEW, NEW)
    assert trials(pair) == [OWN_STATE]


@pytest.mark.parametrize("kept", NOT_NUMBERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_number_and_stays_so_is_no_change(name, kept):
    pair = pair_of(name)
    pair.both(NOT_NUMBERS[kept])
    pair.ask(prompts.single(), max_new_tokens=NEW)
    assert trials(pair) == [None]


@pytest.mark.parametrize("kept", NOT_NUMBERS)
def test_prompts_are_cut_where_what_is_no_number_stays_so(kept):
    pair = Pair("bloom")
    pair.both(NOT_NUMBERS[kept])
    for last in range(3):
        pair.ask([prompts.tokens(30) + prompts.tokens(5, seed=last)])
    assert pair.reused == 30


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0,)], ids=str)
def test_writes(shape, dtype, inference):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with torch.inference_mode(inference):
        model[0].kept = torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)
        state = OwnState(model)
        assert not state.is_changed()
        model[0].kept.fill_(1)
        assert state.is_changed() == (not inference or model[0].kept.numel() > 0)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, torch.ones(())], ids=repr)
def test_other_kinds_of_what_is_equal_are_a_change(value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].kept = 1
    state = OwnState(model)
    model[0].kept = 1
    assert not state.is_changed()
    model[0].kept = value
    assert state.is_changed()


def test_what_is_new_or_gone_is_a_change():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    state = OwnState(model)
    model[0].kept = 1
    assert state.is_changed()
    state = OwnState(model)
    del model[0].kept
    assert state.is_changed()


def test_a_tensor_that_takes_the_place_of_an_equal_one_is_a_change():
    """Nobody knows who wrote it, nor what else there is to see of it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for value in (torch.zeros(1), torch.zeros(2)):
        model[0].kept = value
        state = OwnState(model)
        model[0].kept = value.clone()
        assert state.is_changed()
