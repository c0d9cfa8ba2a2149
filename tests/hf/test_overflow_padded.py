"""Calls that need more than the device holds, in stock-shaped passes: K and V are dense a layer at a time."""

import copy
import gc
from contextlib import suppress
from functools import partial

import pytest
import torch
import zoo
from host import LateMark, LateSide, as_gpu, hosted
from pair import Pair, piece
from prompts import batch
from spilled import CALLS, check, continued, device_bytes, failing_once, generated, narrow, num_rows, on_host, refused
from test_quantized import RoundingCache
from transformers import DynamicCache
from versions import skip_if_older

from hf_paged import PagedMemoryError, dense_host, overflow
from hf_paged.layout import RecordLayout

# K and V of equal and of unequal dims; without position ids; layers that keep a state, where decode steps are fast.
PADDED = ["falcon_rotary", "deepseek_v3", "bloom", "falcon_alibi", "qwen3_next", "lfm2"]
ZOO = [
    "llama4_text",
    "doge",
    "phimoe",
    "gpt_neo",
]  # chunks beside full layers; windows only; windows it keeps to itself
REASONS = ["K and V are read", "position ids", "keep a state", "not told of", "too many values", "padding on the right"]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    as_gpu(monkeypatch)
    monkeypatch.setattr("hf_paged.latent.may_keep", lambda kind: False)  # nobody reads latents on GPUs


def tiny(model_type: str, **overrides) -> Pair:
    return Pair.of(zoo.build(model_type), block_size=8, **overrides)


def ask(pair: Pair, call: str) -> None:
    rows, how, _ = CALLS[call]
    pair.ask(rows, **how)
    check(pair, REASONS)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", PADDED)
def test_a_call_of_three_times_the_device_answers_as_stock(name, call):
    pair = narrow(partial(Pair, name), num_rows(call), CALLS[call][2])
    if call == "chunks":
        pair.skip_where_older_stock_refuses(CALLS[call][0], **CALLS[call][1])  # lfm2 in transformers 5.8
    ask(pair, call)
    stats = pair.paged.stats()
    assert min(stats.offloaded_bytes, stats.fetched_bytes) > 0
    assert on_host(pair) == 0
    ask(pair, call)
    assert pair.paged.stats().fetched_bytes > 0


@pytest.mark.parametrize("call", ["batch", "samples", "beams", "chunks"])
@pytest.mark.parametrize("model_type", ZOO)
def test_windows_beside_full_layers_and_alone(model_type, call):
    pair = narrow(partial(tiny, model_type), num_rows(call) + 1, CALLS[call][2])
    ask(pair, call)
    assert (pair.paged.stats().fetched_bytes > 0) == (None in pair.pool.windows)


@pytest.mark.parametrize("model_type", ["doge", "phimoe"])
def test_windows_alone_need_no_room_for_a_first_prompt_on_a_cpu_either(model_type, monkeypatch):
    monkeypatch.undo()
    size = device_bytes(tiny(model_type), 2, 0)
    pair = tiny(model_type, max_memory={"cpu": size})
    pair.ask([piece(100, 1), piece(83, 2)], max_new_tokens=20)
    small = tiny(model_type, max_memory={"cpu": size // 3})
    with pytest.raises(PagedMemoryError, match=r"max_memory\['cpu'\]"):
        small.model.generate(**batch([piece(100, 1), piece(83, 2)]), max_new_tokens=20)
    gc.collect()
    small.check()


@pytest.mark.parametrize("share", [1 / 8, 1])
def test_parts_of_several_blocks(share, monkeypatch):
    monkeypatch.setattr(overflow, "STAGE_SHARE", share)
    pair = narrow(partial(Pair, "falcon_rotary"), 3, 9)
    ask(pair, "batch")
    assert pair.paged.stats().fetched_bytes > 0


def test_copies_that_are_made_at_once(monkeypatch):
    as_gpu(monkeypatch, lambda: None)
    pair = narrow(partial(Pair, "deepseek_v3"), 3, 9)
    ask(pair, "batch")
    assert pair.paged.stats().fetched_bytes > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_blocks(kind):
    class Rounded(Pair):
        """A pair whose stock side keeps rounded KV."""

        def ask(self, rows, **kwargs):
            def cache(model):
                return RoundingCache(model.config, kind) if model is self.stock else None

            return super().ask(rows, past_key_values=cache, **kwargs)

    pair = narrow(partial(Rounded, "falcon_rotary"), 1, 5, kv_cache_dtype=kind, verify=False)
    pair.ask([piece(101, 1)], max_new_tokens=20)
    check(pair, REASONS)
    assert pair.paged.stats().fetched_bytes > 0


def test_returned_attentions_are_those_of_stock():
    pair = hosted(blocks=7)
    pair.both(lambda model: model.set_attn_implementation("eager"))
    outputs = [generated(each, piece(101, 1), output_attentions=True) for each in (pair.stock, pair.model)]
    assert on_host(pair) > 5
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for expected, actual in zip(*(output.attentions for output in outputs), strict=True):
        for theirs, ours in zip(expected, actual, strict=True):
            torch.testing.assert_close(ours, theirs)
    del outputs, expected, actual, theirs, ours
    check(pair, [*REASONS, "argument output_attentions"])


def test_a_first_prompt_that_does_not_fit_is_looked_at_before_it_is_stored():
    """Once: from then on it is known what the layers keep."""
    pair = narrow(partial(Pair, "falcon_rotary"), 1, 5)
    passes = []
    pair.ask([piece(9, 3)], max_new_tokens=1)  # what the model can do is found out
    pair.paged.release()
    pair.paged._pool = pair.paged._pool_key = None
    with pair.model.get_input_embeddings().register_forward_hook(lambda module, args, out: passes.append(out.shape[1])):
        for _ in range(2):
            passes.clear()
            pair.ask([piece(101, 1)], max_new_tokens=2)
            lengths = passes.copy()
    assert lengths == [101, 1]


@pytest.mark.parametrize("keep", [None, 43, 64, 75, 83])
@pytest.mark.parametrize("name", ["deepseek_v3", "bloom"])
def test_a_cache_that_comes_back_goes_on(name, keep):
    pair = narrow(partial(Pair, name), 1, 5)
    first = [generated(model, piece(101, 1)) for model in (pair.stock, pair.model)]
    assert on_host(pair) > 5
    then = [continued(*each, keep) for each in zip(first, (pair.stock, pair.model), strict=True)]
    assert torch.equal(then[0].sequences, then[1].sequences)
    del first, then
    check(pair, REASONS)


def test_a_second_long_prompt_goes_to_the_host_beside_the_first():
    pair = narrow(partial(Pair, "falcon_rotary"), 1, 7)
    answers = []
    for model in (pair.stock, pair.model):
        outputs = generated(model, piece(61, 1))
        ids = torch.cat([outputs.sequences, torch.tensor([piece(90, 2)])], dim=1)
        answers.append(generated(model, {"input_ids": ids}, past_key_values=outputs.past_key_values))
        del outputs
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert on_host(pair) > 10
    answers.clear()
    check(pair, REASONS)


@pytest.mark.parametrize("kwargs", [{}, {"max_new_tokens": 90}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["falcon_rotary", "qwen3_next"])
def test_a_call_too_large_for_both_is_refused_and_nothing_else_is_lost(name, kwargs):
    make = partial(Pair, name)
    block_bytes = device_bytes(make(), 1, 1) - device_bytes(make(), 1, 0)
    pair = narrow(make, 1, 6, host=6 * block_bytes)
    refused(pair, kwargs, REASONS)


PLACES = {
    "gathering": (RecordLayout, "set_tokens"),
    "copying": (LateSide, "run"),
    "reading": (RecordLayout, "tokens"),
    "pinning": (LateSide, "pinned"),
    "waiting": (LateMark, "hold_current"),
}


@pytest.mark.parametrize(("error", "number"), [(RuntimeError, 0), (KeyboardInterrupt, 0), (RuntimeError, 7)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["falcon_rotary", "lfm2"])
def test_a_transfer_that_fails_or_is_interrupted(name, place, error, number, monkeypatch):
    """The call ends with an error, or answers as stock; no block is leaked or written to behind its next owner."""
    owner, method = PLACES[place]
    if owner is RecordLayout:
        as_gpu(monkeypatch, lambda: None)  # on a stream, too, it is the calling thread that meets these errors
    pair, row = narrow(partial(Pair, name), 1, 6), piece(101, 1)
    pair.ask([row])
    expected = pair.stock.generate(**batch([row]), do_sample=False, max_new_tokens=30)
    answer = expected
    with failing_once(monkeypatch, owner, method, error, number) as counts:
        answer = pair.model.generate(**batch([row]), do_sample=False, max_new_tokens=30)
    assert torch.equal(answer, expected)
    assert number or next(counts) or place == "pinning"
    gc.collect()
    assert on_host(pair) == 0
    check(pair, ["a transfer", *REASONS])
    pair.ask([row], max_new_tokens=30)
    check(pair, ["a transfer", *REASONS])


def test_a_pass_that_fails_before_it_begins_leaves_no_tail_that_was_yet_to_be_copied(monkeypatch):
    pair = narrow(partial(Pair, "deepseek_v3"), 1, 14)
    others = generated(pair.model, piece(40, 2))
    if not pair.paged.stats().fallbacks:
        skip_if_older("deepseek_v3 hands K and V to attention, so that it has no stock-shaped passes")
    outputs = [generated(model, piece(101, 1)) for model in (pair.stock, pair.model)]
    del others
    gc.collect()
    mine = outputs[1].past_key_values
    twin = copy.deepcopy(mine)

    def refuse(*args):
        raise RuntimeError("no areas")

    with monkeypatch.context() as patched:
        patched.setattr(dense_host, "Staging", refuse)
        with pytest.raises(RuntimeError, match="no areas"):
            continued(outputs[1], pair.model)
    assert mine.get_seq_length() == 0, "its last block was left for one of its own, which nothing was written to"
    expected = continued(outputs[0], pair.stock).sequences
    outputs[1].past_key_values = twin
    assert torch.equal(continued(outputs[1], pair.model).sequences, expected)
    del outputs, mine, twin
    check(pair, REASONS)


def test_a_row_of_padding_before_a_long_prompt():
    """One row has a past, the other has none: windows keep what the first one reads."""
    pair = narrow(partial(tiny, "doge"), 2, 0)
    first, then = torch.tensor([piece(10, 1), piece(10, 2)]), torch.tensor([piece(60, 3), piece(60, 4)])
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :10] = 0
    answers = []
    for model in (pair.stock, pair.model):
        cache = DynamicCache(config=model.config) if model is pair.stock else pair.paged.new_cache(64, None, None)
        with torch.no_grad():
            model(first, attention_mask=mask[:, :10], past_key_values=cache)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 10:]
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            with suppress(PagedMemoryError):
                answers.append(model(then, **given).logits[:, -1])
    assert len(answers) == 1 or torch.allclose(*answers, atol=1e-5)


def test_what_may_be_asked_for_again_is_kept():
    """Where guesses are to be taken back, and that may be any number of tokens, windows have what came before."""
    pair = narrow(partial(tiny, "doge"), 2, 0)
    cache = pair.paged.new_cache(64, None, None)
    cache.activate_past_recording()
    with torch.no_grad(), pytest.raises(PagedMemoryError):
        pair.model(torch.tensor([piece(120, 1)]), past_key_values=cache)
    pair.ask([piece(120, 1)], max_new_tokens=4)


def test_what_windows_leave_out_makes_room_before_anything_goes_to_the_host():
    pair = narrow(partial(tiny, "llama4_text"), 1, 16)
    pair.ask([piece(100, 1)], max_new_tokens=4)
    assert pair.paged.stats().offloaded_bytes == 0
    check(pair, REASONS)


def test_what_is_not_seen_in_a_pass_is_not_waited_for_again(monkeypatch):
    """A model that leaves a layer out, were there one: the call is refused, as any that does not fit."""
    pair = narrow(partial(Pair, "falcon_rotary"), 1, 5)
    monkeypatch.setattr("hf_paged.forward._look_at_layers", lambda request, cache: None)
    with pytest.raises(PagedMemoryError, match="101 more tokens need"):
        pair.model.generate(**batch([piece(101, 1)]), do_sample=False)
    pair.ask([piece(20, 1)])
    check(pair, REASONS)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_long_answers_of_encoder_decoders(name):
    """What was read stays on the device; what is said goes to the host."""
    make = partial(Pair, name)
    pair = narrow(make, 1, 9)
    pair.ask([piece(20, 1)], max_new_tokens=70, eos_token_id=None, min_new_tokens=70)
    stats = pair.paged.stats()
    assert min(stats.offloaded_bytes, stats.fetched_bytes) > 0
    check(pair, ["encoder-decoder", "trial", *REASONS])
    begun = batch([piece(20, 2)]) | {"decoder_input_ids": torch.tensor([piece(100, 3)])}
    pair.paged._pool = pair.paged._pool_key = None
    pair.ask(begun, max_new_tokens=5, eos_token_id=None)
    assert min(pair.paged.stats().offloaded_bytes, pair.paged.stats().fetched_bytes) > 0
