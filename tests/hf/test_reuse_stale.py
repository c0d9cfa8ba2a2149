"""Nothing stale is ever reused: changed weights and settings, meddling hooks."""

import time

import pytest
import torch
from families import FAMILIES
from mishaps import AtFourthStep
from pair import REUSED, ROWS, Pair, assert_change_is_noticed, eager, piece

from hf_paged import patch_model, unpatch_model

# Changes of weights and settings


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([piece(12, 9)])
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_optimizer_step(model):
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=0.02, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def data_add(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data.add_(0.3 * torch.randn(weight.shape))


def data_of_the_last_layer_only(model):
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(-1)


def data_of_one_row(model):
    model.model.embed_tokens.weight.data[ROWS[0][0]] *= -1


def data_replaced(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.flip(0)


def edited_through_numpy(model):
    array = model.model.layers[0].self_attn.v_proj.weight.detach().numpy()
    array *= -1


def in_place_under_no_grad(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3:9] *= -2


def in_place_in_inference_mode(model):
    with torch.inference_mode():
        model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)


def loaded_state_dict(model):
    other = FAMILIES["llama"].build(seed=77)
    model.load_state_dict(other.state_dict())


def loaded_state_dict_assigned(model):
    model.load_state_dict(FAMILIES["llama"].build(seed=77).state_dict(), assign=True)


def replaced_parameter(model):
    projection = model.model.layers[0].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().flip(1))


def replaced_module(model):
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False).eval()


def swapped_layers(model):
    layers = model.model.layers
    weights = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    for layer, state in zip(layers, weights[::-1], strict=True):
        layer.load_state_dict(state)


def rope_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def rope_buffer_through_data(model):
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


def rope_buffer_replaced(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def norm_attribute(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 20.0


def scaling_of_attention(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def patched_forward(model):
    layer = model.model.layers[0].mlp
    plain = type(layer).forward
    layer.forward = lambda hidden: plain(layer, hidden) * -1


def to_double(model):
    model.double()
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)


def tied_head(model):
    """Only the head: K and V stay as they are, but nobody is asked to know that."""
    model.lm_head.weight.data.mul_(-1)


CHANGES = [
    optimizer_step,
    fused_optimizer_step,
    data_add,
    data_of_the_last_layer_only,
    data_of_one_row,
    data_replaced,
    edited_through_numpy,
    in_place_under_no_grad,
    in_place_in_inference_mode,
    loaded_state_dict,
    loaded_state_dict_assigned,
    replaced_parameter,
    replaced_module,
    swapped_layers,
    rope_buffer,
    rope_buffer_through_data,
    rope_buffer_replaced,
    norm_attribute,
    scaling_of_attention,
    patched_forward,
    to_double,
    tied_head,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_reuses_nothing(change):
    assert_change_is_noticed(Pair(), change)


def test_weights_that_are_changed_in_every_step_of_training():
    """Generate, train, generate, as reinforcement learning does."""
    pair = Pair()
    for _ in range(4):
        pair.ask(ROWS, do_sample=True, num_return_sequences=2)
        assert pair.reused == 0
        pair.ask(ROWS)
        assert pair.reused == REUSED
        pair.both(lambda model: (model.train(), optimizer_step(model), model.eval()))


def test_weights_that_change_and_come_back():
    pair = Pair()
    pair.ask(ROWS)
    for _ in range(2):
        pair.both(data_of_the_last_layer_only)
        pair.ask(ROWS)
        assert pair.reused == 0


def test_weights_that_change_while_a_call_runs():
    """What such a call computed is of two models, so nobody may find it."""

    pair = Pair()
    pair.ask(ROWS)

    def meddler(model):
        torch.manual_seed(11)
        return AtFourthStep(model, data_add)

    rows = [[*ROWS[0], 5, 6]]
    answer = pair.ask(rows, streamer=meddler, max_new_tokens=12)
    pair.ask([answer[0].tolist()])
    assert pair.reused == 0
    pair.ask(ROWS)
    assert pair.reused == 26, "of the answer just now, which begins with the first row"


def edits_itself(model):
    """Of a class whose `generate` writes into the weights before it calls stock's."""

    class Edits(type(model)):
        def generate(self, *args, **kwargs):
            time.sleep(0.05)  # a look that was begun too early has read all by now
            data_of_the_last_layer_only(self)
            return super().generate(*args, **kwargs)

    model.__class__ = Edits
    return model


def test_weights_that_a_generate_of_the_models_own_changes_first(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the second one is what could read too early
    pair = Pair(wrap=edits_itself)
    answers = [pair.ask(ROWS) for _ in range(3)]
    assert not torch.equal(answers[0], answers[1]), "the change must matter"
    assert pair.reused == 0


def test_weights_that_change_while_a_cache_is_held():
    pair = Pair()
    outputs = pair.hold([piece(21, 1)])
    pair.both(data_add)
    following = pair.go_on(outputs)
    outputs.clear()
    pair.ask([[*following[0].tolist(), 5]])
    assert pair.reused == 0


def test_autocast_is_another_model():
    """K and V of a bfloat16 pass must not be found in float32."""
    pair = Pair()
    pair.ask(ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair.ask(ROWS, max_new_tokens=1)
        assert pair.reused == 0
    pair.ask(ROWS)
    assert pair.reused == 0


def test_rope_that_depends_on_the_length():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24}

    def with_rope(_):
        return FAMILIES["llama"].build(max_position_embeddings=24, rope_parameters=rope)

    pair = Pair(wrap=with_rope)
    for rows in ([piece(20, 1)], [piece(20, 1) + piece(15, 2)], [piece(20, 1)], [piece(20, 1) + piece(15, 2)]):
        pair.ask(rows, max_new_tokens=10)
        assert pair.reused == 0
    assert any("rotary" in reason for reason in pair.paged.stats().fallbacks)


# Somebody in between


@pytest.mark.parametrize("kind", ["hook", "pre_hook", "global_hook"])
def test_hooks_that_change_activations(kind):
    pair = Pair()
    before = pair.ask(ROWS)
    handles = []

    def register(model):
        mlp = model.model.layers[0].mlp
        if kind == "hook":
            handles.append(mlp.register_forward_hook(lambda module, args, output: -output))
        elif kind == "pre_hook":
            handles.append(mlp.register_forward_pre_hook(lambda module, args: (-args[0],)))

    if kind == "global_hook":
        handles.append(
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, args, output: -output if type(module).__name__ == "LlamaMLP" else None
            )
        )
    try:
        pair.both(register)
        for _ in range(2):
            assert not torch.equal(pair.ask(ROWS), before), "the hook must matter"
            assert pair.reused == 0
            assert any("hook" in reason for reason in pair.paged.stats().fallbacks), pair.paged.stats().fallbacks
        assert "hook" in repr(pair.paged)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(pair.ask(ROWS), before)


def test_training_mode_reuses_nothing_and_says_so():
    pair = Pair()
    pair.ask(ROWS)
    pair.both(lambda model: model.train())
    for _ in range(2):
        pair.ask(ROWS)
        assert pair.reused == 0
        assert any("train" in reason for reason in pair.paged.stats().fallbacks), pair.paged.stats().fallbacks
    pair.both(lambda model: model.eval())
    pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.reused == REUSED


def test_another_attention_implementation_answers_as_stock():
    pair = Pair()
    pair.ask(ROWS)
    pair.both(eager)
    pair.ask(ROWS)
    pair.ask(ROWS)


def test_unpatching_in_between_forgets():
    pair = Pair()
    pair.ask(ROWS)
    unpatch_model(pair.model)
    pair.both(data_add)
    patch_model(pair.model, block_size=8)
    pair.ask(ROWS)
    assert pair.reused == 0
