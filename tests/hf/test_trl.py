"""TRL's online trainers on a patched model: equal completions and losses step for step, each prompt computed once."""

import prompts
import pytest
import torch
from datasets import Dataset
from families import PAD
from pair import Pair
from peft import LoraConfig
from transformers import GenerationConfig
from words import text, tokenizer

GENERATIONS, STEPS, NEW = 4, 3, 6
TEXTS = [text(prompts.tokens(20, seed)) for seed in (0, 1)]
SETTINGS = {
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "max_completion_length": NEW,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


class Reward:
    """Pays for different words, and keeps what was sampled; other calls of `generate` come meanwhile."""

    __name__ = "reward"

    def __init__(self, model):
        self.model, self.completions = model, []

    def __call__(self, prompts, completions, **kwargs) -> list[float]:
        self.completions.append(list(completions))
        self.ask_meanwhile()
        return [len(set(completion.split())) + 0.01 * len(completion) for completion in completions]

    def ask_meanwhile(self) -> None:
        """As a judge would that is the model itself; in eval mode, so that a patched model keeps the prefix."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval().generate(torch.tensor([prompts.tokens(20, 2)]), do_sample=False, max_new_tokens=2)
        for module in training:
            module.training = True
        assert not hasattr(self.model, "paged") or self.model.paged.stats().bytes_reserved > 0


def learn(kind, configuration, model, folder, **kwargs) -> tuple[list, list]:
    """Completions of every step, and what was logged of the losses."""
    reward = Reward(model)
    trainer = kind(
        model=model,
        args=configuration(output_dir=str(folder), **SETTINGS, **kwargs.pop("settings", {})),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer(),
        reward_funcs=reward,
        **kwargs,
    )
    trainer.train()
    logs = [{name: log[name] for name in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log]
    return reward.completions, logs


def grpo(model, folder, **kwargs):
    from trl import GRPOConfig, GRPOTrainer

    settings = {"per_device_train_batch_size": GENERATIONS, "num_generations": GENERATIONS, "beta": 0.0}
    return learn(GRPOTrainer, GRPOConfig, model, folder, settings=settings, **kwargs)


def grpo_with_lora(model, folder):
    torch.manual_seed(5)
    return grpo(model, folder, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=256))


def rloo(model, folder):
    from trl import RLOOConfig, RLOOTrainer

    settings = {"per_device_train_batch_size": GENERATIONS, "num_generations": GENERATIONS, "beta": 0.0}
    return learn(RLOOTrainer, RLOOConfig, model, folder, settings=settings)


@pytest.mark.parametrize("trainer", [grpo, grpo_with_lora, rloo])
def test_an_online_trainer_samples_and_learns_the_same(trainer, tmp_path, monkeypatch):
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
    assert stats.shared_tokens == STEPS * (GENERATIONS - 1) * 20


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
