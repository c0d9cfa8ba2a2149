"""One rank of `test_wrapped.py`: generates with stock and with a patched model whose heads are cut among the ranks.

Usage: distributed_worker.py FOLDER_OF_A_MODEL FOLDER_FOR_RESULTS, with the variables that torchrun sets and the
import path of the tests.
"""

import json
import sys
from pathlib import Path

import prompts
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

from hf_paged import patch_model

CALLS = [
    {"do_sample": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": False},
    {"do_sample": False},  # warm
]


def main(folder, results):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    cut = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    hooked = any(module._forward_hooks for module in cut.modules())
    model = patch_model(cut, block_size=8, max_memory={"cpu": "64MB"})
    equal, counts = [], []
    for arguments in CALLS:
        answers = []
        for each in (stock, model):
            torch.manual_seed(3)
            answers.append(each.generate(**prompts.shared_prefix(), max_new_tokens=6, **arguments))
        equal.append(torch.equal(*answers))
        stats = model.paged.stats()
        counts.append([stats.computed_tokens, stats.shared_tokens, stats.reused_tokens, stats.blocks_cached])
    pool = model.paged._pool
    found = {
        "equal": equal,
        "hooked": hooked,
        "counts": counts,
        "fallbacks": stats.fallbacks,
        "kv_heads": [store.keys.shape[0] for store in pool.stores],
        "blocks": [sorted(each) for each in pool.manager.index.by_block],
    }
    Path(results, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
