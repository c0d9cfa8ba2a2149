"""Two tenants of one model: with a salt each, neither sees, nor can time, what the other has asked.

python examples/tenants.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name))
inputs = tokenizer("The same question, word for word. " * 20, return_tensors="pt")

for tenant in ("tenant-a", "tenant-a", "tenant-b"):
    model.paged.reset_stats()
    model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_salt=tenant)
    print(f"{tenant}: {model.paged.stats().reused_tokens} of {inputs['input_ids'].shape[1]} tokens reused")
