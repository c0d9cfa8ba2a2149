"""The one line: the same call before and after, with the same tokens.

python examples/quickstart.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer("The quickest way to a good answer is", return_tensors="pt")

stock = model.generate(**inputs, do_sample=False, max_new_tokens=16)
patch_model(model)  # the one line
patched = model.generate(**inputs, do_sample=False, max_new_tokens=16)

print(tokenizer.decode(patched[0]))
print("the same tokens:", stock.tolist() == patched.tolist())
