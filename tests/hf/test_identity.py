"""Every way in which a model comes to compute other K and V is seen, and nothing else is."""

import copy
import threading
import types

import pytest
import torch
from families import FAMILIES, stock_model
from identity_changes import (
    CHANGES,
    INVISIBLE,
    LAYOUT_ONLY,
    TOKENS,
    add_to_data,
    attention,
    by_name,
    forward_on_the_instance,
    generate,
    hand_a_buffer_on,
    hand_a_config_on,
    hand_a_forward_on,
    llama,
    other_data,
    train,
    weight,
)
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import hf_paged.identity
import hf_paged.sample
from hf_paged.identity import ModelIdentity, fingerprint

pytestmark = pytest.mark.usefixtures("reader")


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


@by_name("change", [change for change in CHANGES if change not in LAYOUT_ONLY])
def test_holds_sees_what_needs_no_sample(change):
    model = llama()
    identity = ModelIdentity(model)
    assert not identity.holds(b""), "there was no digest yet"
    digest = identity.digest()
    assert identity.holds(digest)
    assert not identity.holds(b"of another thread")
    change(model)
    assert identity.holds(digest) is (change in INVISIBLE)
    after = identity.digest()
    assert after != digest
    assert identity.holds(after) is (change is not train)


@by_name("change", [hand_a_buffer_on, hand_a_forward_on, hand_a_config_on])
def test_things_that_only_come_to_belong_to_another_module(change):
    model = llama()
    giver = model.model.layers[0].mlp.gate_proj
    giver.register_buffer("extra", torch.zeros(1))
    giver.forward, giver.config = types.MethodType(type(giver).forward, giver), model.config
    identity = ModelIdentity(model)
    before = identity.digest()
    change(model)
    assert not identity.holds(before)
    assert identity.digest() != before


def test_things_without_tensors_that_are_replaced_by_their_like():
    """A module of the same class, and a `forward` of an instance."""
    model = llama()
    mlp = model.model.layers[0].mlp
    forward_on_the_instance(model)
    identity = ModelIdentity(model)
    digests = {identity.digest()}
    mlp.act_fn = type(mlp.act_fn)().eval()
    digests.add(identity.digest())
    forward_on_the_instance(model)
    digests.add(last := identity.digest())
    assert len(digests) == 3
    assert identity.holds(last)


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
    assert not identity.holds(before)
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
    assert identity.holds(before)
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
        assert not identity.holds(before)
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
