"""LoRA adapters of PEFT that are loud enough to change what tiny models say."""

import pytest
import torch

peft = pytest.importorskip("peft")


def lora_config():
    """For PEFT's models that have a `generate` of their own. The weights are drawn when the adapter is made."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )


def lora(model):
    torch.manual_seed(5)
    return peft.get_peft_model(model, lora_config()).eval()


def two_loras(model):
    """The adapters "first", which is active, and "second"."""
    torch.manual_seed(5)
    model = peft.get_peft_model(model, lora_config(), adapter_name="first")
    torch.manual_seed(6)
    model.add_adapter("second", lora_config())
    model.set_adapter("first")
    return model.eval()
