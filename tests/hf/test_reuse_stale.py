"""Nothing stale is ever reused: changed weights and adapters, inputs that token ids do not describe, meddling hooks."""

import functools
import time

import pytest
import torch
from compare import copy_of
from families import FAMILIES
from pair import Pair, piece
from prompts import batch

from hf_paged import patch_model, unpatch_model

ROWS = [piece(27, 1), piece(13, 2)]
REUSED = 26 + 12  # of a question that was asked before

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
    pair = Pair()
    before = pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.reused == REUSED
    pair.both(change)
    after = pair.ask(ROWS)
    assert not torch.equal(before, after), "the change must matter"
    assert pair.reused == 0
    pair.ask(ROWS)
    assert pair.reused == REUSED, "and what the changed model computed is reused"


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

    class Meddler:
        def __init__(self, model):
            self.model, self.steps = model, 0

        def put(self, value):
            self.steps += 1
            if self.steps == 4:
                data_add(self.model)

        def end(self):
            pass

    pair = Pair()
    pair.ask(ROWS)

    def meddler(model):
        torch.manual_seed(11)
        return Meddler(model)

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
    pair, ids = Pair(), torch.tensor([piece(21, 1)])
    outputs = [
        model.generate(ids, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
        for model in (pair.stock, pair.model)
    ]
    pair.both(data_add)
    following = [
        model.generate(output.sequences, past_key_values=output.past_key_values, do_sample=False, max_new_tokens=12)
        for model, output in zip((pair.stock, pair.model), outputs, strict=True)
    ]
    assert torch.equal(*following)
    outputs.clear()
    pair.ask([[*following[0][0].tolist(), 5]])
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


# LoRA


def with_lora(model):
    peft = pytest.importorskip("peft")
    for name, seed in (("first", 5), ("second", 6)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        if name == "first":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.set_adapter("first")
    return model.eval()


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
    import peft

    model.set_adapter("second")
    model.delete_adapter("first")
    torch.manual_seed(17)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model.add_adapter("first", config)
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
    pair = Pair(wrap=with_lora)
    before = pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.reused == REUSED
    pair.both(change)
    after = pair.ask(ROWS)
    assert not torch.equal(before, after), "the change must matter"
    assert pair.reused == 0
    pair.ask(ROWS)
    assert pair.reused == REUSED


def test_merging_and_unmerging():
    """Merged weights round differently, so even the same adapter reuses nothing."""
    pair = Pair(wrap=with_lora)
    pair.ask(ROWS)
    for change in (merge, lambda model: model.unmerge_adapter(), merge):
        pair.both(change)
        pair.ask(ROWS)
        assert pair.reused == 0
        pair.ask(ROWS)
        assert pair.reused == REUSED


def test_adapters_that_are_switched_back_find_their_own_again():
    pair = Pair(wrap=with_lora)
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

    class Switcher:
        def __init__(self, model):
            self.model, self.steps = model, 0

        def put(self, value):
            self.steps += 1
            if self.steps == 4:
                self.model.set_adapter("second")
                self.model.generate(**batch([piece(5, 7)]), do_sample=False, max_new_tokens=2)

        def end(self):
            pass

    pair = Pair(wrap=with_lora)
    answer = pair.ask([ROWS[0]], streamer=Switcher, max_new_tokens=14)
    for name in ("first", "second"):
        pair.both(switch_to(name))
        pair.ask([[*answer[0].tolist(), 5]])
        assert pair.reused <= 27, "the prompt was computed with the first adapter, the answer with both"


def test_a_disabled_adapter_is_the_base_model():
    pair = Pair(wrap=with_lora)
    plain = copy_of(FAMILIES["llama"])
    pair.ask(ROWS)
    for _ in range(2):
        with pair.model.disable_adapter():
            answer = pair.model.generate(**batch(ROWS), do_sample=False, max_new_tokens=6)
        assert torch.equal(answer, plain.generate(**batch(ROWS), do_sample=False, max_new_tokens=6))
        pair.ask(ROWS)
        assert pair.reused == REUSED


# Calls that token ids do not describe


def embedded(model):
    torch.manual_seed(3)
    return torch.randn(1, 27, 64)


def four_dimensions(_):
    mask = torch.full((27, 27), torch.finfo(torch.float32).min).triu(1)
    mask[20:, 3:9] = torch.finfo(torch.float32).min
    return mask[None, None]


def with_holes(_):
    mask = torch.ones(1, 27, dtype=torch.long)
    mask[0, 5:9] = 0
    return mask


IDS = {"input_ids": torch.tensor([ROWS[0]])}
ODD = {
    "inputs_embeds": ({**IDS}, {"inputs_embeds": embedded}),
    "position_ids": (IDS, {"position_ids": lambda model: torch.arange(27)[None] * 2 + 3}),
    "later_positions": (IDS, {"position_ids": lambda model: torch.arange(27)[None] + 5}),
    "hidden_states": (IDS, {"output_hidden_states": True, "return_dict_in_generate": True}),
    "attentions": (IDS, {"output_attentions": True, "return_dict_in_generate": True}),
    "holes": (IDS, {"attention_mask": with_holes}),
    "right_padded": (IDS, {"attention_mask": lambda model: (torch.arange(27) < 20).long()[None]}),
    "no_cache": (IDS, {"use_cache": False}),
    "static": (IDS, {"cache_implementation": "static"}),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_calls_that_ids_do_not_describe_leave_nothing_wrong(name, odd):
    pair = Pair(name, wrap=(lambda model: _eager(model)) if odd == "attentions" else lambda model: model)
    inputs, how = ODD[odd]
    for _ in range(2):
        pair.ask(inputs, **how)
        if odd != "holes":  # without what is masked, those are plain tokens
            assert pair.reused == 0
    cold = pair.ask(IDS)
    if odd != "holes":
        assert pair.reused == 0, "what the odd calls computed is not what plain ids mean"
    pair.ask(inputs, **how)
    assert pair.reused == 0 or odd == "holes"
    assert torch.equal(pair.ask(IDS), cold)
    assert pair.reused == 26
    pair.ask([ROWS[0][:5] + ROWS[0][9:]])


def _eager(model):
    model.set_attn_implementation("eager")
    return model


def test_a_custom_mask_of_four_dimensions():
    """Through `model(...)` and one's own loop, which is where transformers takes such masks."""
    pair = Pair()
    results = []
    for model in (pair.stock, pair.model):
        output = model.generate(**IDS, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
        cache = output.past_key_values
        cache.crop(-(cache.get_seq_length() - 1) if cache.get_seq_length() > 1 else 0)
        mask = four_dimensions(model)[:, :, 1:, :]
        with torch.no_grad():
            logits = model(IDS["input_ids"][:, 1:], attention_mask=mask, past_key_values=cache).logits
        results.append(logits)
        del output, cache
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3)
    pair.ask(IDS)
    pair.ask(IDS, max_new_tokens=20)


def test_a_loop_of_ones_own_leaves_nothing():
    """A returned cache that plain `model(...)` calls go on with may be fed anything."""
    pair = Pair()
    output = pair.model.generate(**IDS, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    cache, told = output.past_key_values, output.sequences[0].tolist()
    with torch.no_grad():
        for token in piece(8, 5):
            pair.model(torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[3]]))
    following = pair.model.generate(
        torch.tensor([[*told[:-1], *piece(8, 5), 9]]), past_key_values=cache, do_sample=False, max_new_tokens=9
    )
    del output, cache
    pair.ask([told[:-1] + piece(8, 5) + [9]])
    assert pair.reused <= 28
    pair.ask([following[0].tolist()])


def test_a_prompt_of_embeddings_hides_its_ids():
    """Where ids and embeddings are both given, the embeddings count."""
    pair = Pair()
    pair.ask(IDS)
    pair.ask({**IDS, "inputs_embeds": embedded(None)})
    assert pair.reused == 0
    pair.ask(IDS)
    assert pair.reused == 26


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
    pair.both(_eager)
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
