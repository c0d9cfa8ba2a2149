"""More prompts than memory has room for: blocks that must leave go to disk, and come back instead of being computed.

python examples/small_memory.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
patch_model(model, max_memory={"cpu": "32MiB", "disk": "1GiB"})

topics = ("rivers", "bridges", "castles", "markets")
for _ in range(2):
    for topic in topics:  # each prompt takes more than half of the budget
        prompt = f"All about {topic}. " + f"There is much to be said about {topic}, and little time. " * 30
        model.paged.reset_stats()
        model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=4)
        stats = model.paged.stats()
        print(f"{topic}: {stats.computed_tokens} of {stats.prompt_tokens} tokens computed, "
              f"{stats.fetched_bytes / 1e6:.1f} MB fetched, {stats.blocks_disk} blocks on disk")  # fmt: skip
