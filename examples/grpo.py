"""GRPO with TRL: the generations of a prompt share its computation, and the backward pass gets the memory back.

python examples/grpo.py [MODEL]
"""

import sys
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hf_paged import patch_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = patch_model(AutoModelForCausalLM.from_pretrained(name, dtype="float32"))
prompt = "The keeper of the lighthouse writes down every ship that passes by. " * 8 + "Today"


def brevity(completions, **kwargs):
    """Rewards short words."""
    return [-sum(map(len, completion.split())) / max(1, len(completion.split())) for completion in completions]


with tempfile.TemporaryDirectory() as folder:
    settings = GRPOConfig(
        folder, max_steps=2, num_generations=4, per_device_train_batch_size=4, max_completion_length=16,
        bf16=False, logging_steps=1, save_strategy="no", report_to=[],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, brevity, settings, Dataset.from_dict({"prompt": [prompt] * 4}),
        processing_class=AutoTokenizer.from_pretrained(name, padding_side="left"),
    )  # fmt: skip
    trainer.train()

stats = model.paged.stats()
print(f"{stats.shared_tokens} of {stats.prompt_tokens} prompt tokens were shared, {stats.computed_tokens} computed")
