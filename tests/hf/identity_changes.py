"""A tiny llama, and ways in which it comes to compute other K and V: what tests of its identity have in common."""

import copy
import functools
import types

import pytest
import torch
from families import FAMILIES, stock_model
from torch import nn

LLAMA = FAMILIES["llama"]
TOKENS = torch.arange(3, 23)[None]


def llama() -> nn.Module:
    return copy.deepcopy(stock_model("llama"))


def attention(model) -> nn.Module:
    return model.model.layers[1].self_attn


def weight(model) -> nn.Parameter:
    return attention(model).k_proj.weight


def with_adapters(*names: str, **settings) -> tuple[nn.Module, nn.Module]:
    """A model and the `PeftModel` around it, with random adapters of these names; the first is active."""
    peft = pytest.importorskip("peft")
    model = llama()
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False, **settings}
    config = peft.LoraConfig(**settings)
    outer = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        outer.add_adapter(name, config)
    return model, outer.eval()


# Ways to change


def train_a_step(model):
    optimizer = torch.optim.SGD([weight(model)], lr=0.1)
    weight(model).grad = torch.ones_like(weight(model))
    optimizer.step()


@torch.no_grad()
def add_in_place(model):
    weight(model)[0, 0] += 1


def add_to_data(model):
    weight(model).data.add_(1)


def add_to_data_of_one_row(model):
    model.model.embed_tokens.weight.data[7] += 1


def add_to_data_of_last_row(model):
    model.model.embed_tokens.weight.data[-1] += 1


def edit_norm_through_numpy(model):
    model.model.norm.weight.detach().numpy()[5] = 3


def make_nan(model):
    weight(model).data.fill_(torch.nan)


def other_data(model):
    weight(model).data = weight(model).data + 1


def other_data_of_equal_content(model):
    weight(model).data = weight(model).data.clone()


def transpose_data(model):
    attention(model).q_proj.weight.data = attention(model).q_proj.weight.data.t()


def other_parameter(model):
    attention(model).k_proj.weight = nn.Parameter(torch.randn_like(weight(model)))


def parameter_of_another_layer(model):
    attention(model).k_proj.weight = model.model.layers[0].self_attn.k_proj.weight


def other_parameter_in_the_same_memory(model):
    attention(model).k_proj.weight = nn.Parameter(weight(model).data)


def add_a_bias(model):
    attention(model).k_proj.bias = nn.Parameter(torch.ones(32))


def swap_modules(model):
    own = attention(model)
    own.k_proj, own.v_proj = own.v_proj, own.k_proj


def rename_a_module(model):
    own = attention(model)
    own.other = own._modules.pop("o_proj")


def hand_a_module_on(model):
    """From the last of one module to the first of the next: names and objects are in the order that they were in."""
    layer = model.model.layers[0]
    moved = layer.self_attn._modules.popitem()
    layer.mlp._modules = dict([moved, *layer.mlp._modules.items()])


def hand_a_buffer_on(model):
    layer = model.model.layers[0]
    layer.mlp.up_proj._buffers["extra"] = layer.mlp.gate_proj._buffers.pop("extra")


def hand_a_forward_on(model):
    layer = model.model.layers[0]
    layer.mlp.up_proj.__dict__["forward"] = layer.mlp.gate_proj.__dict__.pop("forward")


def hand_a_config_on(model):
    layer = model.model.layers[0]
    layer.mlp.up_proj.__dict__["config"] = layer.mlp.gate_proj.__dict__.pop("config")


def remove_a_layer(model):
    del model.model.layers[1]


def repeat_a_layer(model):
    model.model.layers.append(model.model.layers[0])


def wrap_a_module(model):
    attention(model).k_proj = nn.Sequential(attention(model).k_proj, nn.Tanh()).eval()


def load_weights(model):
    model.load_state_dict(LLAMA.build(seed=99).state_dict())


def assign_weights(model):
    model.load_state_dict(LLAMA.build(seed=99).state_dict(), assign=True)


def to_bfloat16(model):
    model.to(torch.bfloat16)


def cut_rows(model):
    weight(model).data = weight(model).data[:-8]


def view_as_another_dtype(model):
    weight(model).data = weight(model).data.view(torch.int32).view(torch.float32).view(torch.bfloat16)[:, ::2]


def other_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_frequencies_through_data(model):
    model.model.rotary_emb.inv_freq.data[3] *= 0.5


def other_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def add_a_buffer(model):
    attention(model).register_buffer("extra", torch.zeros(1))


def other_class(model):
    model.__class__ = type("Other", (type(model),), {})


def forward_on_the_instance(model):
    own = attention(model)
    own.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), own)


def other_activation(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU().eval()


def other_number(model):
    attention(model).scaling = 0.1


def edit_config(model):
    model.config.rope_parameters["rope_theta"] = 5000.0


def other_config(model):
    attention(model).config = copy.deepcopy(model.config)


def other_attention(model):
    model.set_attn_implementation("eager")


def train(model):
    model.train()


CHANGES = [
    train_a_step,
    add_in_place,
    add_to_data,
    add_to_data_of_one_row,
    add_to_data_of_last_row,
    edit_norm_through_numpy,
    make_nan,
    other_data,
    other_data_of_equal_content,
    transpose_data,
    other_parameter,
    parameter_of_another_layer,
    other_parameter_in_the_same_memory,
    add_a_bias,
    swap_modules,
    rename_a_module,
    hand_a_module_on,
    remove_a_layer,
    repeat_a_layer,
    wrap_a_module,
    load_weights,
    assign_weights,
    to_bfloat16,
    cut_rows,
    view_as_another_dtype,
    other_frequencies,
    other_frequencies_through_data,
    other_buffer,
    add_a_buffer,
    other_class,
    forward_on_the_instance,
    other_activation,
    other_number,
    edit_config,
    other_config,
    other_attention,
    train,
]
# Seen in the sample only.
INVISIBLE = {
    add_to_data,
    add_to_data_of_one_row,
    add_to_data_of_last_row,
    edit_norm_through_numpy,
    make_nan,
    other_frequencies_through_data,
}
# Need not be seen in the middle of a call: nothing is found elsewhere, the next digest sees the rest.
LAYOUT_ONLY = {transpose_data, cut_rows, view_as_another_dtype}
by_name = functools.partial(pytest.mark.parametrize, ids=lambda value: getattr(value, "__name__", None))


def generate(model):
    model.generate(TOKENS, max_new_tokens=3, do_sample=False)
