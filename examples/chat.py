"""A chat through a pipeline: each turn computes only what is new in it.

python examples/chat.py [MODEL]
"""

import sys

from transformers import pipeline

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
chat = patch_model(pipeline("text-generation", model=name))

messages = [{"role": "system", "content": "You answer in one short sentence. " * 40}]
for question in ("What is a block table?", "And what is a page?", "Why are they alike?"):
    messages.append({"role": "user", "content": question})
    messages = chat(messages, max_new_tokens=24, do_sample=False)[0]["generated_text"]
    stats = chat.model.paged.stats()
    chat.model.paged.reset_stats()
    print(f"{question} {messages[-1]['content']!r}")
    print(f"  {stats.prompt_tokens} prompt tokens, {stats.computed_tokens} of them computed")
