"""Fine-tune with Trainer and LoRA, merge, and serve the result: one patch, from the first step to the last answer.

python examples/finetune_and_serve.py [MODEL]
"""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=64))

row = tokenizer("Question: What is the name of the ship? Answer: The ship is called Marigold.")["input_ids"]
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder, max_steps=8, learning_rate=5e-3, per_device_train_batch_size=1, save_strategy="no", report_to=[]
    )
    Trainer(adapted, settings, train_dataset=[{"input_ids": row, "labels": row}] * 8).train()

served = adapted.merge_and_unload().eval()  # the same model object, still patched
ask = pipeline("text-generation", model=served, tokenizer=tokenizer)
rules = "You work at the harbour and answer in one sentence. " * 10
for question in ("What is the name of the ship?", "Where is the ship?", "What is the name of the ship?"):
    text = f"{rules}Question: {question} Answer:"
    answer = ask(text, max_new_tokens=10, do_sample=False, return_full_text=False)[0]["generated_text"]
    stats = served.paged.stats()
    print(f"{answer.strip()!r} ({stats.computed_tokens} of {stats.prompt_tokens} tokens computed so far)")
