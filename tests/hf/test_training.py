"""Training a patched model is training the model: losses and gradients bit for bit, and the memory is there for it."""

import copy
import threading

import prompts
import pytest
import torch
from compare import copy_of, every_family
from families import FAMILIES
from pair import Pair
from patched_copies import GREEDY, LLAMA, patched
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from hf_paged import patch_model, unpatch_model
from hf_paged.probe import difference, tolerance_of

ROWS = prompts.ragged()
LABELS = ROWS["input_ids"].masked_fill(ROWS["attention_mask"] == 0, -100)


def with_lora(model):
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def checkpointing(model):
    model.gradient_checkpointing_enable()
    return model


def prepared(model):
    """As accelerate prepares it for mixed precision, which replaces `forward` on the instance."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        AcceleratorState._reset_state(True)


def train(model, steps: int = 2) -> list[torch.Tensor]:
    """Loss and gradients of each step of a plain loop."""
    torch.manual_seed(3)  # of dropout
    model.train()
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    seen = []
    for _ in range(steps):
        loss = model(**ROWS, labels=LABELS).loss
        loss.backward()
        seen += [loss.detach(), *(each.grad.clone() for each in weights)]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return seen


def assert_same(expected, actual) -> None:
    assert len(expected) == len(actual) > 2
    assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bart"])
def test_losses_and_gradients_are_stocks(name):
    pair = Pair(name)
    assert_same(train(pair.stock), train(pair.model))


@pytest.mark.parametrize("wrap", [with_lora, checkpointing, prepared])
def test_losses_and_gradients_are_stocks_when_wrapped(wrap):
    """Answers between the steps, from the weights of then, change nothing about the next ones."""
    pair = Pair()
    stock, model = wrap(pair.stock), wrap(pair.model)
    for _ in range(2):
        assert_same(train(stock, 1), train(model, 1))
        pair.ask(ROWS)
        pair.ask(ROWS)
        assert pair.reused > 0
        assert pair.paged.stats().fallbacks == {}


@pytest.mark.parametrize("warmed", [False, True])
def test_mixed_precision_takes_the_fast_path_before_and_after_it_is_set_up(warmed):
    """accelerate switches autocast on inside of `forward`, where nobody sees it from outside."""
    pair = Pair()
    if warmed:
        pair.ask(ROWS)
    prepared(pair.model)
    prepared(pair.stock)
    pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.reused > 0
    with torch.autocast("cpu", torch.bfloat16):
        pair.ask(ROWS)
    for model in (pair.stock, pair.model):
        del model.forward
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


def test_decode_steps_of_an_encoder_decoder_are_fast_with_mixed_precision():
    """Their logits come out in float32."""
    pair = Pair("bart")
    for model in (pair.stock, pair.model):
        prepared(model)
    rows = [prompts.tokens(20, 1), prompts.tokens(11, 2)]
    for _ in range(2):  # tokens are not promised to be equal here
        pair.paged.reset_stats()
        pair.model.generate(**prompts.batch(rows), do_sample=False, max_new_tokens=12)
    assert pair.check().fallbacks == {"prefixes not reused: encoder-decoder model": 1}


@pytest.mark.parametrize("rows", [prompts.single(), prompts.shared_prefix()], ids=["single", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_autocast_takes_the_fast_path_with_the_logits_of_stock(family, rows):
    """Tokens may differ at near-ties, so that steps count up to the first where they do."""
    pair, arguments = Pair(family), {"do_sample": False, "max_new_tokens": 4}
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (
            model.generate(**rows, **arguments, output_logits=True, return_dict_in_generate=True)
            for model in (pair.stock, pair.model)
        )
    assert pair.paged.stats().fallbacks == {}
    same = (expected.sequences == actual.sequences)[:, -4:].cumprod(dim=1).sum(dim=1).tolist()
    compared = 0
    for row, steps in enumerate(same):
        for ours, stocks in zip(actual.logits[: steps + 1], expected.logits, strict=False):
            assert difference(ours[row], stocks[row]) <= tolerance_of(torch.bfloat16)
            compared += 1
    assert compared > 2 * len(same), "decode steps among them"


def test_a_forward_that_accelerate_took_along_outlives_the_patch():
    pair = Pair()
    stock, model = prepared(pair.stock), unpatch_model(prepared(pair.model))
    assert_same(train(stock), train(model))


# -- memory -------------------------------------------------------------------------------------------------------


def kept(pair) -> tuple[int, int]:
    stats = pair.paged.stats()
    return stats.blocks_cached, stats.bytes_reserved


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora, prepared, checkpointing])
def test_a_training_pass_gets_the_memory_of_cached_blocks(wrap):
    pair = Pair()
    model = wrap(pair.model).eval()
    pair.model.generate(**ROWS, max_new_tokens=6)
    assert min(kept(pair)) > 0
    model.train()(**ROWS, labels=LABELS).loss.backward()
    assert kept(pair) == (0, 0)


def test_counters_outlive_the_pool():
    pair = Pair(max_memory={"cpu": 60_000})
    torch.manual_seed(0)
    for name in range(4):
        pair.model.generate(torch.tensor([prompts.tokens(24, name)]), num_beams=3, max_new_tokens=6)
    before = pair.paged.stats()
    assert min(before.evicted_blocks, before.copied_blocks) > 0
    train(pair.model, 1)
    after = pair.paged.stats()
    assert (after.evicted_blocks, after.copied_blocks) == (before.evicted_blocks, before.copied_blocks)
    pair.model.generate(torch.tensor([prompts.tokens(24)]), num_beams=3, max_new_tokens=6)
    assert pair.paged.stats().copied_blocks > before.copied_blocks
    pair.paged.reset_stats()
    assert pair.paged.stats().copied_blocks == 0


def test_passes_that_train_nothing_leave_cached_blocks_alone():
    pair = Pair()
    pair.ask(ROWS)
    before = kept(pair)
    pair.model(**ROWS, labels=LABELS)  # scoring by someone who forgot no_grad
    pair.model.train()
    with torch.no_grad():
        pair.model(**ROWS, labels=LABELS)
    pair.model.eval()
    assert kept(pair) == before
    pair.ask(ROWS)
    assert pair.reused > 0


class Halfway:
    """A streamer that stops one `generate` until another thread says go."""

    def __init__(self):
        self.reached, self.go, self.seen = threading.Event(), threading.Event(), 0

    def put(self, tokens) -> None:
        self.seen += 1
        if self.seen == 3:
            self.reached.set()
            assert self.go.wait(60)

    def end(self) -> None:
        pass


def test_a_generate_of_another_thread_goes_on():
    pair = Pair(max_memory={"cpu": 200_000})
    row = prompts.single()
    expected = pair.ask(row, max_new_tokens=12)
    pair.ask(prompts.diverse())
    streamer, answers = Halfway(), []

    def answer():
        answers.append(pair.model.generate(**row, max_new_tokens=12, do_sample=False, streamer=streamer))

    thread = threading.Thread(target=answer)
    thread.start()
    assert streamer.reached.wait(60)
    in_use = pair.paged.stats().blocks_in_use
    pair.model.train()
    pair.model(**ROWS, labels=LABELS).loss.backward()
    pair.model.eval()
    stats = pair.paged.stats()
    assert stats.blocks_in_use == in_use > 0
    assert (stats.blocks_cached, stats.bytes_reserved <= 200_000) == (0, True)
    streamer.go.set()
    thread.join()
    assert torch.equal(answers[0], expected)
    pair.check()


# -- Trainer ------------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """Rows of one length, each its own label."""

    def __init__(self, count: int):
        self.rows = [prompts.tokens(10) + prompts.tokens(6, seed=20 + index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = torch.tensor(self.rows[index])
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class Sampler(TrainerCallback):
    """Asks the model after every step, and keeps the weights it had then."""

    def __init__(self):
        self.answers, self.weights = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        training = model.training
        model.eval()
        self.weights.append(copy.deepcopy(model.state_dict()))
        self.answers.append(model.generate(**ROWS, do_sample=False, max_new_tokens=6))
        model.train(training)


SETTINGS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def trained(model, folder):
    """Losses, gradient norms and a sampler's answers of a run of `Trainer`."""
    sampler = Sampler()
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        gradient_checkpointing=True,
        logging_steps=1,
        **SETTINGS,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(6), callbacks=[sampler])
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return logs, sampler


def test_trainer_learns_the_same_and_a_callback_sees_the_weights_of_each_step(tmp_path):
    pair = Pair()
    logs, expected = trained(pair.stock, tmp_path)
    pair.paged.reset_stats()
    patched_logs, sampler = trained(pair.model, tmp_path)
    assert len(logs) == 3
    assert patched_logs == logs
    assert all(map(torch.equal, expected.answers, sampler.answers))
    assert not torch.equal(sampler.answers[0], sampler.answers[-1]), "the weights have changed what is answered"
    fresh = FAMILIES["llama"].build()
    for weights, answer in zip(sampler.weights, sampler.answers, strict=True):
        fresh.load_state_dict(weights)
        assert torch.equal(fresh.generate(**ROWS, do_sample=False, max_new_tokens=6), answer)
    stats = pair.check()
    assert stats.fallbacks == {}
    assert stats.computed_tokens == stats.prompt_tokens == 3 * int(ROWS["attention_mask"].sum())


def test_evaluation_that_generates_takes_the_paged_path(tmp_path):
    pair = Pair()
    seen = []
    for model in (pair.stock, pair.model):
        predictions = []
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            predict_with_generate=True,
            generation_max_length=22,
            **SETTINGS,
        )

        def keep(prediction, into=predictions):
            into.append(torch.tensor(prediction.predictions))
            return {}

        trainer = Seq2SeqTrainer(model, arguments, train_dataset=Rows(4), eval_dataset=Rows(4), compute_metrics=keep)
        trainer.train()
        seen.append(predictions)
    assert len(seen[0]) == 2
    assert not torch.equal(*seen[0])
    assert all(map(torch.equal, *seen))
    stats = pair.check()
    assert stats.fallbacks == {}
    assert (stats.prompt_tokens, stats.shared_tokens, stats.reused_tokens) == (2 * 64, 2 * 30, 0)


def test_a_patched_copy_trains_too():
    pair = Pair()
    assert_same(train(copy.deepcopy(pair.stock)), train(copy.deepcopy(pair.model)))


def test_patching_between_two_steps_changes_nothing():
    pair = Pair()
    stock = train(pair.stock, 3)
    model = unpatch_model(pair.model)
    steps = train(model, 1) + train(patch_model(model), 1) + train(unpatch_model(model), 1)
    assert_same(stock, steps)


def train_step(model) -> tuple[torch.Tensor, dict]:
    model.train()
    torch.manual_seed(1)
    loss = model(**ROWS, labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True or family.name in ("opt", "bart")))
def test_training_is_bit_for_bit_stock(family, checkpointing):
    results = []
    for model in (copy_of(family), patched(family)):
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append(train_step(model))
    assert torch.equal(results[0][0], results[1][0]), f"{family.name}: loss"
    for name, gradient in results[0][1].items():
        same = gradient is results[1][1][name] is None or torch.equal(gradient, results[1][1][name])
        assert same, f"{family.name}: gradient of {name}"


def test_generate_between_training_steps():
    """The loop of GRPO and friends: generate, step, generate, on one model."""
    sequences = []
    for model in (copy_of(LLAMA), patched()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        produced = []
        for _ in range(3):
            model.eval()
            produced.append(model.generate(**prompts.shared_prefix(), **GREEDY))
            optimizer.zero_grad()
            train_step(model)
            optimizer.step()
        sequences.append(produced)
    assert not torch.equal(sequences[0][0], sequences[0][2]), "the steps must change the output to test anything"
    for step, (expected, actual) in enumerate(zip(*sequences, strict=True)):
        assert torch.equal(actual, expected), f"after {step} steps"


def test_generate_in_train_mode():
    """Trainers generate in train mode too; without dropout the tokens are stock's, and the mode stays."""
    stock, model = copy_of(LLAMA).train(), patched().train()
    assert torch.equal(model.generate(**prompts.ragged(), **GREEDY), stock.generate(**prompts.ragged(), **GREEDY))
    assert model.training


# Gradient checkpointing: in training mode, older versions and some models leave the cache alone then


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


@pytest.mark.parametrize("first", [True, False], ids=["checkpointing_first", "checkpointing_later"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bart", "t5", "qwen3_next", "lfm2"])
def test_generation_in_training_mode_as_checkpointing_comes_and_goes(name, first):
    pair = Pair(name, wrap=without_dropout)
    for enabled in (first, not first, first):
        change = "gradient_checkpointing_enable" if enabled else "gradient_checkpointing_disable"
        pair.both(lambda model, change=change: getattr(model, change)())
        for arguments in ({}, {"num_beams": 2}):
            rows = [prompts.tokens(20, 1), prompts.tokens(11, 2)]
            pair.skip_where_older_stock_refuses(rows, **arguments)  # bloom
            pair.ask(rows, **arguments)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bart"])
def test_what_is_tried_draws_no_random_numbers_from_dropout(name):
    """In training mode, the first answer has stock's dropout, too."""
    pair = Pair(name, wrap=lambda model: model.train())
    rows = [prompts.tokens(20, 1), prompts.tokens(11, 2)]
    answer = pair.ask(rows, max_new_tokens=12)
    pair.both(without_dropout)
    assert not torch.equal(pair.ask(rows, max_new_tokens=12), answer), "there was no dropout: this test could not fail"


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_that_share_an_encoder_input_have_dropout_of_their_own(name, arguments):
    """In training mode; what they attend to is the same, what they leave out is not."""
    changes = {"attention_dropout": 0.3} if name == "bart" else {}
    pair = Pair.of(FAMILIES[name].build(**changes).train())
    rows = [prompts.tokens(20, 1), prompts.tokens(11, 2)]
    answer = pair.ask(rows, max_new_tokens=12, **arguments)
    pair.both(without_dropout)
    assert not torch.equal(pair.ask(rows, max_new_tokens=12, **arguments), answer), "there was no dropout"
