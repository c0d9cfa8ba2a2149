"""Questions of different lengths under one system prompt: no padding, and the system prompt once.

python examples/system_prompt.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import paged

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name)

system = "The following facts are true. " * 50
questions = ["Two and two is", "The capital of France, a country in the west of Europe, is", "Water boils at"]
inputs = tokenizer([system + question for question in questions], padding=True, return_tensors="pt")

with paged(model):  # for the length of the block
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    print(model.paged)
for question, row in zip(questions, output[:, inputs["input_ids"].shape[1] :], strict=True):
    print(question, "...", tokenizer.decode(row))
