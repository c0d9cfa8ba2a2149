"""The heads of one model cut among processes, each with the blocks of its own heads.

torchrun --nproc-per-node 2 examples/tensor_parallel.py [model]
"""

import sys

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
dist.init_process_group("gloo")  # "nccl" on GPUs
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, tp_plan="auto").eval()
patch_model(model, max_memory={"cpu": "1GiB"})  # the same on all ranks, so that they decide alike

for question in ("What is a page?", "What is a block?"):
    inputs = tokenizer(f"You answer briefly and kindly, in one sentence. {question}", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    stats = model.paged.stats()
    if dist.get_rank() == 0:
        print(tokenizer.decode(out[0], skip_special_tokens=True))
        print(f"on each of {dist.get_world_size()} ranks: {stats.reused_tokens} prompt tokens reused so far")
dist.destroy_process_group()
