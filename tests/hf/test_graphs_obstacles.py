"""Models and calls whose decode steps are not captured: right all the same, and the reason is counted."""

import functools

import pytest
import tape
import torch
from families import FAMILIES
from graphed import PROMPT, Both
from prompts import batch

from hf_paged import patch_model, unpatch_model
from hf_paged.capturable import model_obstacle
from hf_paged.compat import CACHE_NAME

CPU = torch.device("cpu")


def around_forward(model, change):
    """`change(outputs, length)` at the end of each forward pass over a cache of that length."""
    original = type(model)

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        cache = kwargs.get(CACHE_NAME)
        length = 0 if cache is None else cache.get_seq_length()
        outputs = original.forward(self, *args, **kwargs)
        if length >= len(PROMPT):  # the trial of packed prompts need not see it
            change(outputs, length)
        return outputs

    model.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})


def compute_with_length(model):
    """In Python, where a graph would have the length of its capture for ever."""

    def change(outputs, length):
        outputs.logits[..., length % 7 :: 7] += 1.0

    around_forward(model, change)


def wait_for_the_device(model):
    around_forward(model, lambda outputs, length: outputs.logits.sum().item())


def return_more(model):
    around_forward(model, lambda outputs, length: outputs.__setitem__("hidden_states", (outputs.logits,)))


def own_forward(model):
    layer = model.model.layers[0]
    layer.forward = layer.forward


def compiled(model):
    model._compiled_call_impl = model._call_impl


class Special(torch.Tensor):
    """As quantized weights are."""


def special_weight(model):
    weight = model.model.norm.weight.data
    model.model.norm.weight = torch.nn.Parameter(weight.as_subclass(Special))


OBSTACLES = {
    compute_with_length: "the model computes with the length of the cache",
    wait_for_the_device: "a capture has failed: RuntimeError: operation not permitted when stream is capturing",
    return_more: "outputs hidden_states",
    compiled: "LlamaForCausalLM is compiled",
    special_weight: "weights in a tensor subclass",
    own_forward: "LlamaDecoderLayer with a forward of its own",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_models_that_cannot_be_captured_say_so_once_a_call(change, quick):
    both = Both(prefix_caching=False)
    change(both.stock)
    unpatch_model(both.model)
    change(both.model)
    patch_model(both.model, attention_backend="triton", prefix_caching=False)
    assert both.ask(new=6) == both.ask(new=6) == 0
    assert both.reasons[f"no CUDA graphs: {OBSTACLES[change]}"] == 2
    assert len(both.graphs) == 0


def test_compiled_parts_are_captured(quick):
    """What is computed between attention may be compiled, which saves launches."""
    both = Both()
    torch._dynamo.reset()
    try:
        for layer in both.model.model.layers:
            for part in (layer.input_layernorm, layer.mlp):
                part.compile(backend="eager")
        assert both.ask() > 0
        assert both.ask() > 0
        assert both.reasons == {}
    finally:
        torch._dynamo.reset()


def test_weights_elsewhere():
    model = FAMILIES["llama"].build()
    assert model_obstacle(model, torch.device("cuda", 0)) == "weights on other devices"
    assert model_obstacle(model, CPU) is None


def test_attention_that_the_kernels_do_not_take(quick, monkeypatch):
    monkeypatch.setattr("hf_paged.backends.triton.takes", lambda *_: False)
    both = Both()
    assert both.ask() == 0
    assert both.reasons == {"no CUDA graphs: attention that does not read the buffers of its step": 1}


def test_a_failed_capture_is_not_tried_again(quick):
    both = Both()
    wait_for_the_device(both.stock)
    unpatch_model(both.model)
    wait_for_the_device(both.model)
    patch_model(both.model, attention_backend="triton")
    tried = []
    quick.capture = lambda forward: tried.append(forward) or tape.TapeDriver.capture(quick, forward)
    both.ask(new=4)
    both.ask(new=4)
    assert len(tried) == 1


def test_calls_that_are_not_replayed(quick):
    both = Both()
    both.ask()
    captures = quick.captures
    assert both.ask(prefill_chunk_size=8, new=2) == 1, "a prompt is no decode step"
    cache = both.model.generate(**batch([PROMPT]), max_new_tokens=1, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="carries no gradients"):
        both.model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[20]]), past_key_values=cache)
    assert both.reasons == {}
    with torch.autocast("cpu", torch.bfloat16):
        both.model.generate(**batch([PROMPT]), max_new_tokens=4)
    assert both.reasons == {"no CUDA graphs: autocast": 1}
    both.model.generate(**batch([PROMPT]), max_new_tokens=4, return_dict_in_generate=True, output_hidden_states=True)
    assert not any("CUDA" in reason for reason in both.reasons if "autocast" not in reason)
    assert quick.captures == captures


def test_other_attention_is_never_captured(quick):
    for backend in ("cpu", "reference"):
        both = Both(attention_backend=backend)
        assert both.ask() == 0
        assert both.reasons == {}


def test_without_a_gpu_nothing_is_said_of_graphs():
    both = Both(attention_backend="auto")
    assert both.ask() == 0
    assert both.reasons == {}
