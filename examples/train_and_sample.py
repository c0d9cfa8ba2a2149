"""Sampling between the steps of a LoRA fine-tune: old K and V are never used for new weights.

python examples/train_and_sample.py [MODEL]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name)
model = patch_model(get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"])))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
inputs = tokenizer("The answer to everything is 42. " * 8, return_tensors="pt")

for step in range(3):
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    model.base_model.model.paged.reset_stats()
    for _ in range(2):  # the second call finds what the first has left, which was made with these weights
        model.generate(**inputs, do_sample=True, num_return_sequences=4, max_new_tokens=8)
    stats = model.base_model.model.paged.stats()
    print(f"step {step}: loss {loss.item():.3f}, {stats.computed_tokens} of {stats.prompt_tokens} tokens computed")
