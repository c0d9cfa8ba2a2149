"""Prefixes on disk: a process that starts tomorrow does not compute the long prompt again.

python examples/save_and_load.py FOLDER [MODEL]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

folder = Path(sys.argv[1])
name = sys.argv[2] if len(sys.argv) > 2 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name))
if (folder / "manifest.json").exists():
    print(f"{model.paged.load(folder)} tokens read")

inputs = tokenizer("A handbook that is read again and again. " * 50, return_tensors="pt")
model.generate(**inputs, max_new_tokens=8, do_sample=False)
stats = model.paged.stats()
print(f"{stats.prompt_tokens} prompt tokens, {stats.computed_tokens} of them computed")
print(f"{model.paged.save(folder)} tokens written")
