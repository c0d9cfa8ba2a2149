"""Adapters, and weights that lie elsewhere: their changes are seen, and switched to and fro they come back."""

import pytest
import torch
from identity_changes import attention, by_name, generate, llama, weight, with_adapters

from hf_paged.identity import ModelIdentity, fingerprint

pytestmark = pytest.mark.usefixtures("reader")


# Adapters


def test_adapters_switched_to_and_fro():
    model, outer = with_adapters("one", "two")
    identity = ModelIdentity(model)
    digests = {"one": identity.digest()}
    outer.set_adapter("two")
    assert not identity.holds(digests["one"])
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
