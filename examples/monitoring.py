"""What to watch: counters and gauges after each call, and the reasons of calls that could not be fast.

python examples/monitoring.py [MODEL]
"""

import dataclasses
import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name))

for question in ("Who wrote it?", "When?", "And where?"):
    inputs = tokenizer("Here is a long text about a book. " * 30 + question, return_tensors="pt")
    before = model.paged.stats()
    model.generate(**inputs, do_sample=False, max_new_tokens=8)
    after = model.paged.stats()
    asked, reused = after.prompt_tokens - before.prompt_tokens, after.reused_tokens - before.reused_tokens
    print(f"{question} hit rate {reused / asked:.0%}, {after.bytes_reserved / 2**20:.1f} MiB held")

print(json.dumps(dataclasses.asdict(model.paged.stats()), indent=2))  # for a log or a dashboard
print(model.paged)  # for people
