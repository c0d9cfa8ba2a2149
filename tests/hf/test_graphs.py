"""Decode steps from CUDA graphs, on a driver that replays tapes of tensor operations instead (tape.py)."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import tape
import torch
from families import FAMILIES
from graphed import PROMPT, Both
from on_demand import HostDriver
from peft import LoraConfig, get_peft_model
from prompts import batch, tokens
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from hf_paged import arena, patch_model, replay, unpatch_model

# -- the same tokens ---------------------------------------------------------------------------------------------------

RAGGED = [tokens(21), tokens(8, 1), tokens(3, 2)]
CALLS = {
    "one row, over many blocks": ([PROMPT], {"new": 50}),
    "ragged rows": (RAGGED, {"new": 20}),
    "rows that share a prefix": ([[*PROMPT, 5, 6], [*PROMPT, 7]], {"new": 20}),
    "samples": ([PROMPT], {"new": 20, "do_sample": True, "num_return_sequences": 3}),
    "beams": ([PROMPT], {"new": 20, "num_beams": 3}),
    "beams of two rows": (RAGGED[:2], {"new": 12, "num_beams": 2, "num_return_sequences": 2}),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_tokens_equal_stock(family, quick):
    """One model, call after call; only its first decode step is no graph."""
    both, steps, learned = Both(family=family), 0, 1
    for rows, arguments in CALLS.values():
        steps += both.ask(rows, **arguments)
    assert steps == sum(arguments["new"] - 1 for _, arguments in CALLS.values()) - learned
    assert both.reasons == {}
    assert quick.captures < steps / 2, "each step was captured anew"
    assert len(both.graphs) <= replay.MAX_GRAPHS


@pytest.mark.parametrize("asks_for_memory", [False, True])
@pytest.mark.parametrize(("call", "least"), [("ragged rows", 0.9), ("samples", 0.9), ("beams", 0.0)])
def test_steps_are_planned_ahead(call, least, asks_for_memory, quick, monkeypatch):
    """While the device computes the one before; what parts in every step is left alone for most of them."""
    from hf_paged.core import foresight

    if asks_for_memory:
        host_driver = HostDriver(4096)
        monkeypatch.setattr(arena, "driver_for", lambda device: host_driver)
    came_so, holds = [], foresight.Foreseen.holds
    monkeypatch.setattr(foresight.Foreseen, "holds", lambda *a: came_so.append(holds(*a)) or came_so[-1])
    both, (rows, arguments) = Both(), CALLS[call]
    both.ask(rows, **arguments)
    came_so.clear()
    replayed = both.ask(rows, **arguments)
    assert sum(came_so) >= least * (replayed - 1)
    assert came_so.count(False) <= 1 + replayed // replay.PAUSE_STEPS


def test_kernels_read_buffers_only(driver, monkeypatch):
    """Triton's kernels under the interpreter: results of one item a row, merged parts, rows that stand for none."""
    from hf_paged_kernels import attend, store  # these import triton

    for module, name in ((attend, "_attend_kernel"), (attend, "_merge_kernel"), (store, "_store_kernel")):
        monkeypatch.setattr(module, name, tape.Launches(getattr(module, name)))
    both = Both({"num_hidden_layers": 1})
    assert both.ask([tokens(14), tokens(12, 1), tokens(9, 2)], new=5) == 3
    assert {room.is_final for *_, rooms in both.graphs._steps for _, room in rooms[1:]} == {True, False}


def test_quantized_kv_is_encoded_and_read_in_graphs(driver, monkeypatch):
    """The same tokens as those of plain torch without graphs."""
    from hf_paged_kernels import attend, store

    for module, name in ((attend, "_attend_kernel"), (attend, "_merge_kernel"), (store, "_store_kernel")):
        monkeypatch.setattr(module, name, tape.Launches(getattr(module, name)))
    fewest = {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_attention_heads": 2}
    both = Both(fewest, kv_cache_dtype="int4", verify=False)
    patch_model(both.stock, kv_cache_dtype="int4", verify=False, attention_backend="reference", cuda_graphs=False)
    assert both.ask([tokens(14), tokens(12, 1), tokens(9, 2)], new=4) == 2
    assert both.reasons == {}


def test_rows_that_end_go_to_smaller_passes(quick):
    """By an end-of-sequence token that comes at another step in each row; the seed is one where it does."""
    both = Both()
    rows = [tokens(5 + i, seed=i) for i in range(6)]
    free = both.stock.generate(**batch(rows), max_new_tokens=16, do_sample=False)[:, -16:]
    ends = [int(free[row, 2 * row + 2]) for row in range(5)]
    lengths = {min(free[row].tolist().index(end) for end in ends if end in free[row]) for row in range(5)}
    assert len(lengths) > 2
    assert both.ask(rows, new=16, eos_token_id=ends) > 5
    assert len({rooms[0] for *_, rooms in both.graphs._steps}) >= 3


class Remembers(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append(None)


class Counts(LogitsProcessor):
    """Looks at the logits it is given later on, too: they belong to the caller."""

    def __init__(self):
        self.kept = []

    def __call__(self, input_ids, scores):
        self.kept.append((scores, scores.clone()))
        return scores - 0.1 * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[-1])


def test_whatever_hangs_on_the_loop_works(quick):
    both = Both()
    streamers, processors = [], []
    for each in (both.stock, both.model):
        streamers.append(Remembers())
        processors.append(Counts())
        out = each.generate(
            **batch([PROMPT]), max_new_tokens=9, do_sample=False, streamer=streamers[-1],
            logits_processor=LogitsProcessorList([processors[-1]]), return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    assert both.replayed == 7
    assert streamers[0].seen == streamers[1].seen
    for (mine, then), (theirs, _) in zip(processors[1].kept, processors[0].kept, strict=True):
        assert torch.equal(mine, then), "logits were written over"
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len({logits.data_ptr() for logits in out.logits}) == 9
    assert out.past_key_values.get_seq_length() == len(PROMPT) + 8


def test_assisted_decoding(quick):
    """The draft model is patched, too, and decodes one token at a time."""
    stock, assistant = FAMILIES["llama"].build(), FAMILIES["llama"].build(seed=5)
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    answers = []
    for patch in (lambda model: model, lambda model: patch_model(model, attention_backend="triton")):
        call = {"max_new_tokens": 12, "do_sample": False, "assistant_model": patch(assistant)}
        answers.append(patch(stock).generate(**batch([PROMPT]), **call))
    assert torch.equal(*answers)
    drafted = assistant.paged.stats().generated_tokens  # none in transformers 5.8, which gives drafts a stock cache
    assert quick.replays > 5 or not drafted


def test_threads_take_turns(quick):
    both = Both()
    prompts = [batch([tokens(9 + i, seed=i)]) for i in range(6)]
    expected = [both.stock.generate(**each, max_new_tokens=12, do_sample=False) for each in prompts]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda each: both.model.generate(**each, max_new_tokens=12, do_sample=False), prompts))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert both.replayed > 50


# -- what a graph was captured with ------------------------------------------------------------------------------------


def replace_weight(model):
    """Another tensor in the place of one that a graph reads; the old one is still there, as in a graph."""
    old = model.lm_head.weight
    model.graveyard = [old]
    model.lm_head.weight = torch.nn.Parameter(old.flip(0).clone())


def replace_memory(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    model.graveyard = [weight.data]
    weight.data = weight.data.flip(0).clone()


def change_number(model):
    model.model.layers[0].self_attn.scaling *= 3.0


def change_forward(model):
    model.model.norm.__class__ = type("Flips", (type(model.model.norm),), {"forward": lambda self, x: x.flip(-1)})


def to_double(model):
    model.double()


CHANGES = [replace_weight, replace_memory, change_number, change_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_changed_model_is_captured_anew(change, prefix_caching, quick):
    both = Both(prefix_caching=prefix_caching)
    assert both.ask() == 3
    graphs = len(both.graphs)
    answer = both.model.generate(**batch([PROMPT]), max_new_tokens=5, do_sample=False)
    for each in (both.stock, both.model):
        change(each)
    assert both.ask() == 3
    assert len(both.graphs) == graphs, "graphs of a state that is gone are kept"
    assert not torch.equal(answer, both.model.generate(**batch([PROMPT]), max_new_tokens=5, do_sample=False))


def test_a_cache_that_goes_on_after_a_change(quick):
    """Between two calls of `generate`, and between two steps of a caller's own loop."""
    both, answers = Both(), []
    for model in (both.stock, both.model):
        rows = batch([PROMPT, PROMPT[::-1]])
        out = model.generate(**rows, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        replace_memory(model)
        out = model.generate(
            out.sequences, past_key_values=out.past_key_values, max_new_tokens=4, return_dict_in_generate=True
        )
        found = out.sequences
        for step in range(6):
            if step == 3:
                replace_weight(model)
            inputs = {
                "input_ids": found[:, -1:].to((torch.int32, torch.int64)[step % 2]),
                "position_ids": torch.full((2, 1), found.shape[1] - 1),
            }
            with torch.no_grad():
                logits = model(**inputs, past_key_values=out.past_key_values, use_cache=True).logits
            found = torch.cat([found, logits[:, -1:].argmax(-1)], 1)
        answers.append(found)
    assert torch.equal(*answers)
    assert both.replayed > 6


def test_another_dtype_is_another_pool(quick):
    both = Both()
    both.ask()
    for dtype in (torch.bfloat16, torch.float32):
        both.stock.to(dtype)
        both.model.to(dtype)
        if dtype == torch.float32:
            both.ask()
        else:
            both.model.generate(**batch([PROMPT]), max_new_tokens=5)
        assert len(both.graphs) == 1, "graphs of another dtype are kept"


def test_each_adapter_has_graphs_of_its_own(quick):
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=32)
    both = Both()
    models = [get_peft_model(each, settings, adapter_name="a") for each in (both.stock, both.model)]
    for model in models:
        model.add_adapter("b", settings)
        for path, weight in model.named_parameters():
            if "lora" in path:
                generator = torch.Generator().manual_seed(1 + (".b." in path))
                weight.data = 0.5 * torch.randn(weight.shape, generator=generator)
        model.eval()
    answers = set()
    for name, captures in (("a", 1), ("b", 2), ("a", 2), ("b", 2)):
        answer = []
        for model in models:
            model.set_adapter(name)
            answer.append(model.generate(**batch([tokens(5)]), max_new_tokens=6, do_sample=False))
        assert torch.equal(*answer)
        assert quick.captures == captures, f"at {name}"
        answers.add(tuple(answer[0][0].tolist()))
    assert len(answers) == 2
    both.stock, both.model = (model.merge_and_unload() for model in models)
    assert both.ask() == 3


def test_nothing_outlives_its_reason(quick):
    """Training, `release`, other settings, `unpatch_model`."""
    both = Both()
    ids = torch.tensor([PROMPT])

    def train():
        both.model.train()
        both.model(input_ids=ids, labels=ids).loss.backward()
        both.model.eval()

    for reason in (
        train,
        both.model.paged.release,
        lambda: patch_model(both.model, attention_backend="triton", block_size=32),
        lambda: unpatch_model(both.model),
    ):
        both.ask()
        graphs = both.graphs
        alive = [weakref.ref(each) for each in graphs._steps.values()]
        assert len(graphs) == len(alive) == 1
        reason()
        gc.collect()
        assert len(graphs) == 0
        assert not any(each() for each in alive)
    patch_model(both.model, cuda_graphs=False, attention_backend="triton")
    assert both.ask() == 0
    assert both.reasons == {}


def test_a_cache_of_an_older_pool_reads_its_own_blocks(quick):
    both = Both()
    old = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first, expected = (each.generate(**batch([PROMPT]), **old) for each in (both.model, both.stock))
    pool = both.model.paged._pool
    both.model.double().generate(**batch([PROMPT]), max_new_tokens=2)  # which ends the pool
    both.model.float()
    both.ask([tokens(17, 9)])
    assert both.model.paged._pool is not pool
    answers = [
        each.generate(out.sequences, past_key_values=out.past_key_values, **{**old, "max_new_tokens": 8}).sequences
        for each, out in ((both.model, first), (both.stock, expected))
    ]
    assert torch.equal(*answers)
    both.ask([tokens(17, 9)])


def test_the_least_recently_used_goes_first(quick, monkeypatch):
    monkeypatch.setattr(replay, "MAX_GRAPHS", 2)
    both = Both()
    rows = [tokens(7, seed=i) for i in range(4)]
    for count, captures in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
        both.ask(rows[:count])
        assert quick.captures == captures
        assert len(both.graphs) <= 2
