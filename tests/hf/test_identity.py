"""Every way in which a model comes to compute other K and V is seen, and nothing else is."""

import copy
import functools
import gc
import threading
import types

import pytest
import torch
from families import FAMILIES, stock_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import hf_paged.identity
import hf_paged.sample
from hf_paged.identity import ModelIdentity, encodable, fingerprint
from hf_paged_kernels import takes

LLAMA = FAMILIES["llama"]
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(params=["native", "torch"], autouse=True)
def reader(request, monkeypatch) -> str:
    """What reads the sample: the native library whatever it takes, or torch everything."""
    if request.param == "torch":
        monkeypatch.setattr(hf_paged.sample, "takes", lambda tensor: False)
    elif not takes(torch.zeros(1)):
        pytest.skip("the native library was not built")
    return request.param


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
    attention(model).k_proj = nn.Sequential(attention(model).k_proj, nn.Tanh())


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
    model.model.layers[0].mlp.act_fn = nn.ReLU()


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
by_name = functools.partial(pytest.mark.parametrize, ids=lambda value: getattr(value, "__name__", None))


@by_name("change", CHANGES)
def test_a_change_gives_another_digest_once(change):
    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    assert identity.digest() == before
    change(model)
    after = identity.digest()
    assert after != before
    assert identity.digest() == after


@by_name("change", CHANGES)
def test_unchanged_sees_what_needs_no_sample(change):
    model = llama()
    identity = ModelIdentity(model)
    assert not identity.unchanged(), "there was no digest yet"
    digest = identity.digest()
    assert identity.unchanged()
    assert identity.unchanged(digest)
    assert not identity.unchanged(b"of another thread")
    change(model)
    assert identity.unchanged() is (change in INVISIBLE)
    assert identity.digest() != digest
    assert identity.unchanged()


@by_name("change", [hand_a_buffer_on, hand_a_forward_on, hand_a_config_on])
def test_things_that_only_come_to_belong_to_another_module(change):
    model = llama()
    giver = model.model.layers[0].mlp.gate_proj
    giver.register_buffer("extra", torch.zeros(1))
    giver.forward, giver.config = types.MethodType(type(giver).forward, giver), model.config
    identity = ModelIdentity(model)
    before = identity.digest()
    change(model)
    assert not identity.unchanged()
    assert identity.digest() != before


def test_things_without_tensors_that_are_replaced_by_their_like():
    """A module of the same class, and a `forward` of an instance."""
    model = llama()
    mlp = model.model.layers[0].mlp
    forward_on_the_instance(model)
    identity = ModelIdentity(model)
    digests = {identity.digest()}
    mlp.act_fn = type(mlp.act_fn)()
    digests.add(identity.digest())
    forward_on_the_instance(model)
    digests.add(identity.digest())
    assert len(digests) == 3
    assert identity.unchanged()


def test_class_forward_replaced(monkeypatch):
    model = llama()
    identity = ModelIdentity(model)
    before, original = identity.digest(), type(attention(model)).forward
    monkeypatch.setattr(
        type(attention(model)), "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs)
    )
    assert identity.digest() != before


def test_another_object_with_the_id_of_a_dead_one():
    model = llama()
    layer, data = attention(model).k_proj, weight(model).data
    layer.weight = nn.Parameter(data)
    identity = ModelIdentity(model)
    before, old_id = identity.digest(), id(layer.weight)
    layer._parameters["weight"] = None
    others = []
    while id(layer.weight) != old_id and len(others) < 1000:
        layer._parameters["weight"] = nn.Parameter(data)
        others.append(layer.weight)
    if id(layer.weight) != old_id:
        pytest.skip("Python did not give the id again")
    assert not identity.unchanged()
    assert identity.digest() != before


def test_edits_undone_between_two_looks_in_other_epochs():
    """An epoch never comes back, even where the weights do: blocks in between may be of either."""
    model = llama()
    identity = ModelIdentity(model)
    digests = [identity.digest()]
    for _ in range(2):
        weight(model).data.neg_()
        digests.append(identity.digest())
    assert len(set(digests)) == 3


def test_every_row_is_sampled():
    """Tall, wide, narrow, three-dimensional, not contiguous; of a vector every element."""
    shapes = [(700, 48), (3, 700), (600, 2), (600, 1), (5, 120, 64), (1000,), ()]
    model = llama()
    extra = {f"t{index}": torch.randn(shape) for index, shape in enumerate(shapes)}
    extra |= {"transposed": torch.randn(300, 50).t(), "strided": torch.randn(300, 50)[:, ::3]}
    for name, tensor in extra.items():
        model.register_buffer(name, tensor)
    identity = ModelIdentity(model)
    before = identity.digest()
    for name, tensor in extra.items():
        rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor[None] if tensor.dim() == 0 else tensor
        for row in sorted({0, len(rows) // 2, len(rows) - 1}):
            rows.data[row] += 1
            after = identity.digest()
            assert after != before, f"{name}, row {row}"
            before = after


def test_columns_vary_with_the_row():
    """An edit of one column is in the sample of some row."""
    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    for column in range(0, 64, 9):
        model.model.embed_tokens.weight.data[:, column] += 1
        after = identity.digest()
        assert after != before, f"column {column}"
        before = after


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.float8_e4m3fn,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
    ],
    ids=str,
)
def test_dtypes(dtype):
    model = llama()
    model.register_buffer("extra", torch.zeros(300, 5).to(dtype))
    model.register_buffer("empty", torch.zeros(0, 5).to(dtype))
    identity = ModelIdentity(model)
    before, content = identity.digest(), fingerprint(model)
    assert identity.digest() == before
    model.extra.data[250] = torch.ones(5).to(dtype)
    assert identity.digest() != before
    assert fingerprint(model) != content


def test_either_reader_reads_all_that_it_can(reader, monkeypatch):
    def fail(*args):
        raise AssertionError("this one was not to be asked")

    other = "_TorchSample" if reader == "native" else "_native_sample"
    monkeypatch.setattr(hf_paged.sample, other, fail)
    model = llama()
    ModelIdentity(model).digest()


def test_a_change_is_not_lost_where_recording_it_fails(monkeypatch):
    def interrupt(tensors):
        raise KeyboardInterrupt

    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    add_to_data(model)
    with monkeypatch.context() as patched:
        patched.setattr("hf_paged.identity.Sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            identity.digest()
    assert identity.digest() != before


def test_conjugates_and_negatives_of_the_same_memory():
    """Views that only say that the content is to be read otherwise."""
    model = llama()
    model.register_buffer("complex", torch.randn(4, 4, dtype=torch.complex64))
    identity = ModelIdentity(model)
    digests = [identity.digest()]
    model.complex.data = model.complex.data.conj()
    digests.append(identity.digest())
    weight(model).data = torch._neg_view(weight(model).data)
    digests.append(identity.digest())
    assert len(set(digests)) == 3
    assert identity.digest() == digests[-1]


def test_same_bytes_as_another_dtype():
    model = llama().to(torch.bfloat16)
    identity = ModelIdentity(model)
    before, content = identity.digest(), fingerprint(model)
    weight(model).data = weight(model).data.view(torch.float16)
    assert not identity.unchanged()
    assert identity.digest() != before
    assert fingerprint(model) != content


def test_tensors_of_inference_mode_have_no_version():
    model = llama()
    with torch.inference_mode():
        model.register_buffer("extra", torch.zeros(4, 4))
    identity = ModelIdentity(model)
    before = identity.digest()
    assert identity.digest() == before
    with torch.inference_mode():
        model.extra.add_(1)
    assert identity.digest() != before


def test_inside_of_tensor_subclass():
    model = llama()
    a, b = torch.randn(32, 64), torch.randn(32, 64)
    attention(model).k_proj.weight = nn.Parameter(TwoTensor(a, b), requires_grad=False)
    identity = ModelIdentity(model)
    before, content = identity.digest(), fingerprint(model)
    assert identity.digest() == before
    b.numpy()[:] += 1
    assert identity.digest() != before
    assert fingerprint(model) != content


# What does not change it


def generate(model):
    model.generate(TOKENS, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def forward_with_outputs(model):
    model(TOKENS, output_hidden_states=True, output_attentions=True)


def backward(model):
    model(TOKENS).logits.sum().backward()


def require_gradients(model):
    model.requires_grad_(False)
    weight(model).requires_grad_(True)
    model.enable_input_require_grads()


def checkpoint_gradients(model):
    model.gradient_checkpointing_enable()
    generate(model)


@by_name("call", [generate, forward_with_outputs, backward, require_gradients, checkpoint_gradients])
def test_calls_do_not_change_it(call):
    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    call(model)
    assert identity.unchanged()
    assert identity.digest() == before
    assert identity.obstacle() is None


@pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if family.packed and not family.missing()]
)
def test_forward_of_every_packed_family_does_not_change_it(family):
    model = copy.deepcopy(stock_model(family))
    identity = ModelIdentity(model)
    before = identity.digest()
    generate(model)
    assert identity.digest() == before
    assert identity.obstacle() is None


def test_two_models_and_their_copies_differ():
    model = llama()
    digests = {ModelIdentity(each).digest() for each in (model, model, copy.deepcopy(model))}
    assert len(digests) == 3, "an epoch belongs to one identity"


def test_replaced_weights_and_models_are_let_go():
    import weakref

    model = llama()
    identity = ModelIdentity(model)
    identity.digest()
    storage, module = weakref.ref(weight(model).data.untyped_storage()), weakref.ref(model.model.layers[0])
    other_data(model)
    del model.model.layers[0]
    assert storage() is None
    assert module() is None
    model.__dict__["_identity"], whole = identity, weakref.ref(model.model)
    del model, identity
    assert whole() is None, "a model that holds its identity goes without the garbage collector"


def test_threads():
    model = llama()
    identity = ModelIdentity(model)
    digests = []
    threads = [threading.Thread(target=lambda: digests.extend(identity.digest() for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 80
    assert len(set(digests)) == 1


# Circumstances: two-way


def test_autocast_and_precision_are_two_way():
    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not identity.unchanged()
        in_bfloat16 = identity.digest()
    with torch.autocast("cpu", dtype=torch.float16):
        in_float16 = identity.digest()
    assert identity.digest() == before
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision != "medium" else "high")
    try:
        with_precision = identity.digest()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert identity.digest() == before
    assert len({before, in_bfloat16, in_float16, with_precision}) == 4


def test_training_is_two_way():
    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    model.train()
    assert identity.digest() != before
    model.eval()
    assert identity.digest() == before


# Adapters


def test_adapters_switched_to_and_fro():
    model, outer = with_adapters("one", "two")
    identity = ModelIdentity(model)
    digests = {"one": identity.digest()}
    outer.set_adapter("two")
    assert not identity.unchanged()
    digests["two"] = identity.digest()
    with outer.disable_adapter():
        digests["none"] = identity.digest()
    outer.base_model.set_adapter(["one", "two"])
    digests["both"] = identity.digest()
    assert len(set(digests.values())) == 4
    outer.set_adapter("one")
    assert identity.digest() == digests["one"]
    outer.set_adapter("two")
    assert identity.digest() == digests["two"]
    with outer.disable_adapter():
        assert identity.digest() == digests["none"]


def test_modules_to_save_switched_to_and_fro():
    model, outer = with_adapters("one", "two", modules_to_save=["v_proj"])
    identity = ModelIdentity(model)
    before = identity.digest()
    outer.set_adapter("two")
    assert identity.digest() != before
    outer.set_adapter("one")
    assert identity.digest() == before
    attention(model).v_proj.set_adapter("two")
    assert identity.digest() != before, "one module alone"


def adapter_layer(model):
    return attention(model).k_proj


def merge(model, outer):
    outer.merge_adapter()


def scale(model, outer):
    adapter_layer(model).scaling["one"] = 0.3


def train_the_adapter(model, outer):
    with torch.no_grad():
        adapter_layer(model).lora_A["one"].weight.add_(1)


def edit_data_of_the_adapter(model, outer):
    adapter_layer(model).lora_B["one"].weight.data[3] += 1


def load_weights_under_the_same_name(model, outer):
    import peft

    state = {name: value + 1 for name, value in peft.get_peft_model_state_dict(outer, adapter_name="one").items()}
    peft.set_peft_model_state_dict(outer, state, adapter_name="one")


def delete_and_add_under_the_same_name(model, outer):
    config = outer.peft_config["one"]
    outer.delete_adapter("one")
    outer.add_adapter("one", config)
    outer.set_adapter("one")
    outer.eval()


def mix_under_a_name(model, outer):
    outer.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed", combination_type="linear")
    outer.set_adapter("mixed")


def unload(model, outer):
    outer.unload()


@by_name(
    "change",
    [
        merge,
        scale,
        train_the_adapter,
        edit_data_of_the_adapter,
        load_weights_under_the_same_name,
        delete_and_add_under_the_same_name,
        mix_under_a_name,
        unload,
    ],
)
def test_changes_of_adapters(change):
    model, outer = with_adapters("one", "two")
    identity = ModelIdentity(model)
    before, content = identity.digest(), fingerprint(model)
    assert identity.digest() == before
    change(model, outer)
    assert identity.digest() != before
    assert fingerprint(model) != content
    assert identity.digest() == identity.digest()


def test_merged_and_unmerged_are_not_taken_for_the_same():
    model, outer = with_adapters("one")
    identity = ModelIdentity(model)
    digests = [identity.digest()]
    outer.merge_adapter()
    digests.append(identity.digest())
    outer.unmerge_adapter()
    digests.append(identity.digest())
    assert len(set(digests)) == 3, "rounding may have changed the weights"


def test_merge_state_counts_alone():
    model, _ = with_adapters("one")
    identity = ModelIdentity(model)
    before = identity.digest()
    adapter_layer(model).merged_adapters.append("one")
    assert identity.digest() != before
    adapter_layer(model).merged_adapters.clear()
    assert identity.digest() == before


# Offloading


def test_weights_offloaded_to_memory_are_followed():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)
    assert weight(model).is_meta
    identity = ModelIdentity(model)
    before, content = identity.digest(), fingerprint(model)
    generate(model)
    assert identity.digest() == before
    assert identity.obstacle() is None
    state["model.layers.1.self_attn.k_proj.weight"].numpy()[:] += 1
    assert identity.digest() != before
    assert fingerprint(model) != content


def test_weights_offloaded_to_disk_are_an_obstacle(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    identity = ModelIdentity(model)
    assert "disk" in identity.obstacle()
    before = identity.digest()
    generate(model)
    assert identity.digest() != before, "nobody has looked at the files"
    assert fingerprint(model) == fingerprint(model)


def test_weights_without_strides_are_an_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    assert identity.obstacle() is None
    attention(model).register_buffer("extra", torch.ones(2, 2).to_sparse())
    assert "strides" in identity.obstacle()


def test_accelerate_hooks_are_no_obstacle():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    identity = ModelIdentity(model)
    before = identity.digest()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    after = identity.digest()
    assert after != before, "forward was replaced on the instances"
    generate(model)
    assert identity.digest() == after
    assert identity.obstacle() is None


# Obstacles


def hook_a_module(model):
    return attention(model).register_forward_hook(lambda *args: None)


def hook_before_a_module(model):
    return attention(model).register_forward_pre_hook(lambda *args: None)


def hook_every_module(model):
    return nn.modules.module.register_module_forward_hook(lambda *args: None)


def hook_before_every_module(model):
    return nn.modules.module.register_module_forward_pre_hook(lambda *args: None)


@by_name("hook", [hook_a_module, hook_before_a_module, hook_every_module, hook_before_every_module])
def test_forward_hooks_are_an_obstacle(hook):
    model = llama()
    identity = ModelIdentity(model)
    handle = hook(model)
    try:
        assert "hook" in identity.obstacle()
    finally:
        handle.remove()
    assert identity.obstacle() is None


def test_training_mode_of_any_module_is_an_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    attention(model).train()
    assert "training" in identity.obstacle()
    model.eval()
    assert identity.obstacle() is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_depend_on_the_length_are_an_obstacle(rope):
    identity = ModelIdentity(model := LLAMA.build(rope_parameters={"rope_theta": 10000.0, **rope}))
    assert "rotary" in identity.obstacle()
    assert model.model.rotary_emb.rope_type == rope["rope_type"]


# One look for a call's begin, one for its end


def test_look_is_digest_and_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    digest, obstacle = identity.look()
    assert obstacle is None
    assert digest == identity.digest()
    add_to_data(model)
    assert identity.look() == (identity.digest(), None) != (digest, None)
    attention(model).train()
    assert identity.look() == (None, identity.obstacle()) != (None, None)


def test_a_look_that_was_begun_is_a_look():
    model = llama()
    identity = ModelIdentity(model)
    assert identity.begin_look() is None, "there is nothing to compare with yet"
    digest = identity.digest()
    assert identity.look(identity.begin_look()) == (digest, None)
    add_to_data(model)
    begun = identity.begin_look()
    assert begun.differs(), "what is begun sees the edit, and not only the look that it is given to"
    after = identity.look(begun)
    assert after != (digest, None)
    assert identity.look(identity.begin_look()) == after


@by_name("change", [add_in_place, other_parameter, other_data, edit_config, add_a_bias])
def test_changes_between_the_begin_of_a_look_and_its_end(change):
    model = llama()
    identity = ModelIdentity(model)
    digest = identity.digest()
    begun = identity.begin_look()
    change(model)
    assert identity.look(begun) == (identity.digest(), None) != (digest, None)


def test_a_begun_look_compares_with_the_sample_that_holds_now():
    model = llama()
    identity = ModelIdentity(model)
    identity.digest()
    begun = identity.begin_look()
    add_to_data(model)
    digest = identity.digest()  # another thread's
    assert identity.look(begun) == (digest, None)
    add_to_data(model)
    assert identity.look(begun) != (digest, None)


def test_no_look_is_begun_with_tensors_that_are_gone():
    model = llama()
    identity = ModelIdentity(model)
    identity.digest()
    other_parameter(model)
    gc.collect()
    assert identity.begin_look() is None


def test_holds_is_unchanged_and_no_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    digest = identity.digest()
    assert identity.holds(digest)
    assert not identity.holds(b"of another thread")
    handle = hook_a_module(model)
    assert identity.unchanged(digest)
    assert not identity.holds(digest)
    handle.remove()
    assert identity.holds(digest)
    add_in_place(model)
    assert not identity.holds(digest)


@by_name("ask", [ModelIdentity.look, lambda identity: identity.holds(b"")])
def test_one_walk_each(ask, monkeypatch):
    model, walks = llama(), []
    identity = ModelIdentity(model)
    original = hf_paged.identity.Tree.of
    monkeypatch.setattr("hf_paged.identity.Tree.of", lambda model: walks.append(model) or original(model))
    ask(identity)
    assert len(walks) == 1


# Fingerprint


def test_fingerprint_is_of_the_content(tmp_path):
    model = llama()
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path, dtype=torch.float32)) == before
    assert fingerprint(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)) != before
    generate(model)
    assert fingerprint(model) == before


def test_fingerprint_of_a_patched_model():
    from hf_paged import paged

    model = llama()
    before = fingerprint(model)
    with paged(model):
        assert fingerprint(model) == before


def test_fingerprint_is_the_same_in_whatever_order_attributes_were_set():
    model = llama()
    before = fingerprint(model)
    for module in model.modules():
        for name, value in reversed(list(vars(module).items())):
            del vars(module)[name]
            vars(module)[name] = value
    assert fingerprint(model) == before


def test_sets_are_told_in_an_order_of_their_own():
    """Their own one differs from process to process."""
    assert encodable({"norm", "bias", "gate", "lm_head"}) == ["bias", "gate", "lm_head", "norm"]
    model = llama()
    model.config.kept_apart = {"norm", "bias"}
    before = fingerprint(model)
    model.config.kept_apart = {"norm", "gate"}
    assert fingerprint(model) != before


@by_name(
    "change", [add_in_place, other_frequencies_through_data, to_bfloat16, edit_config, other_attention, load_weights]
)
def test_fingerprint_sees(change):
    model = llama()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_fingerprint_sees_a_single_element_that_no_sample_does():
    model = llama()
    identity = ModelIdentity(model)
    digest, content = identity.digest(), fingerprint(model)
    model.model.embed_tokens.weight.data[0, 1] += 1
    assert fingerprint(model) != content
    assert identity.digest() == digest, "the limit that the docstring tells of"
    other = llama()
    other.model.embed_tokens.weight.data[0, 2] += 1
    assert fingerprint(other) != fingerprint(model)
