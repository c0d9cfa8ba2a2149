"""Beam search: beams share the prompt and all that they have in common, and part without copying what they keep.

python examples/beams.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name))

inputs = tokenizer("Translate to French: the sea is calm tonight. " * 10, return_tensors="pt")
options = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 16}
for beam in model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]:
    print("-", tokenizer.decode(beam))

stats = model.paged.stats()
print(f"{stats.computed_tokens} of {stats.prompt_tokens} prompt tokens computed, {stats.copied_blocks} blocks copied")
