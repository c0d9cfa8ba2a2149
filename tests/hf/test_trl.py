"""TRL's online trainers on a patched model: equal completions and losses step for step, each prompt computed once."""

import prompts
import pytest
import torch
from datasets import Dataset
from families import PAD
from pair import Pair
from peft import LoraConfig
from transformers import GenerationConfig, TrainerCallback
from words import text, tokenizer

GENERATIONS, PAIR, STEPS, NEW = 4, 2, 3, 6
TEXTS = [text(prompts.tokens(20, seed)) for seed in (0, 1)]
SETTINGS = {
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


class Reward:
    """Pays for different words, and keeps what was sampled."""

    __name__ = "reward"

    def __init__(self):
        self.completions = []

    def __call__(self, prompts, completions, **kwargs) -> list[float]:
        self.completions.append(list(completions))
        return [len(set(completion.split())) + 0.01 * len(completion) for completion in completions]


class AskBefore(TrainerCallback):
    """Other calls of `generate` come before every step; in eval mode, so that a patched model keeps the prefix."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        training = [module for module in model.modules() if module.training]
        model.eval().generate(torch.tensor([prompts.tokens(20, 2)]), do_sample=False, max_new_tokens=2)
        for module in training:
            module.training = True
        assert not hasattr(model, "paged") or model.paged.stats().bytes_reserved > 0


def learn(kind, configuration, model, folder, **kwargs) -> tuple[list, list]:
    """Completions of every step, and what was logged of the losses."""
    reward = Reward()
    trainer = kind(
        model=model,
        args=configuration(output_dir=str(folder), **SETTINGS | kwargs.pop("settings")),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer(),
        reward_funcs=reward,
        callbacks=[AskBefore()],
        **kwargs,
    )
    trainer.train()
    logs = [{name: log[name] for name in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log]
    return reward.completions, logs


def grouped(**settings) -> dict:
    """Settings of trainers that compare the generations of one prompt."""
    group = {"per_device_train_batch_size": GENERATIONS, "num_generations": GENERATIONS, "beta": 0.0}
    return {**group, "max_completion_length": NEW, **settings}


def lora() -> LoraConfig:
    torch.manual_seed(5)
    return LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=256)


def grpo(model, folder, *, bf16=False, **kwargs):
    from trl import GRPOConfig, GRPOTrainer

    return learn(GRPOTrainer, GRPOConfig, model, folder, settings=grouped(bf16=bf16), **kwargs)


def grpo_with_lora(model, folder):
    return grpo(model, folder, peft_config=lora())


def grpo_with_lora_in_bf16(model, folder):
    return grpo(model, folder, bf16=True, peft_config=lora())


def rloo(model, folder, *, bf16=False, **kwargs):
    from trl import RLOOConfig, RLOOTrainer

    return learn(RLOOTrainer, RLOOConfig, model, folder, settings=grouped(bf16=bf16), **kwargs)


def rloo_with_lora_in_bf16(model, folder):
    return rloo(model, folder, bf16=True, peft_config=lora())


def online_dpo(model, folder):
    """Two generations of each prompt, the better one against the other, beside a frozen copy of the model.

    With gradient checkpointing this trainer asks for `use_cache=False`, which a patched model obeys.
    """
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = {
        "per_device_train_batch_size": GENERATIONS // PAIR,
        "max_new_tokens": NEW,
        "gradient_checkpointing": False,
    }
    return learn(OnlineDPOTrainer, OnlineDPOConfig, model, folder, settings=settings)


@pytest.mark.parametrize(
    ("trainer", "num_prompts"),  # of a step
    [
        (grpo, 1),
        (grpo_with_lora, 1),
        (grpo_with_lora_in_bf16, 1),
        (rloo, 1),
        (rloo_with_lora_in_bf16, 1),
        (online_dpo, GENERATIONS // PAIR),
    ],
)
def test_an_online_trainer_samples_and_learns_the_same(trainer, num_prompts, tmp_path, monkeypatch):
    pair = Pair(max_memory={"cpu": "1MiB"})
    held, backward = [], torch.Tensor.backward

    def watched(*args, **kwargs):
        held.append(pair.paged.stats().bytes_reserved)
        return backward(*args, **kwargs)

    expected, stock_logs = trainer(pair.stock, tmp_path)
    monkeypatch.setattr(torch.Tensor, "backward", watched)
    actual, logs = trainer(pair.model, tmp_path)
    assert len(expected) == STEPS
    assert expected[0] != expected[1]
    assert actual == expected
    assert logs == stock_logs
    assert held == [0] * STEPS
    stats = pair.check()
    assert set(stats.fallbacks) == {"prefixes not reused: LlamaForCausalLM in training mode; call model.eval()"}
    assert stats.prompt_tokens == STEPS * (GENERATIONS + 1) * 20
    assert stats.shared_tokens == STEPS * (GENERATIONS - num_prompts) * 20


def test_generate_batch_stays_transformers_own():
    """What `use_transformers_continuous_batching` samples with: an engine beside `generate` with its own attention."""
    from transformers import ContinuousBatchingConfig

    pair = Pair()
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    engine = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    rows, answers = [prompts.tokens(20), prompts.tokens(9, 1)], []
    for model in (pair.stock, pair.model):
        outputs = model.generate_batch(
            rows, generation_config=settings, continuous_batching_config=engine, progress_bar=False
        )
        answers.append([outputs[name].generated_tokens for name in sorted(outputs)])
    assert answers[0] == answers[1]
    assert list(map(len, answers[0])) == [NEW, NEW]
    assert pair.check().prompt_tokens == 0
    pair.ask(prompts.ragged())
    assert pair.paged.stats().fallbacks == {}
