"""Eight samples of one long prompt: the prompt is computed and stored once.

python examples/samples.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name))

inputs = tokenizer("Once upon a time, in a town by the sea, " * 20, return_tensors="pt")
output = model.generate(**inputs, do_sample=True, num_return_sequences=8, max_new_tokens=16)

for row in output[:, inputs["input_ids"].shape[1] :]:
    print("-", tokenizer.decode(row))
print(model.paged)
