"""Prompts are computed once whatever the mode of a call: each starts where the others have ended."""

import pytest
import torch
from families import FAMILIES, VOCAB
from mode_parts import RecordingStreamer, RowsEnd, Run, draft
from pair import NEW, Pair, evict, patched_draft, piece, text
from prompts import batch, tokens
from transformers import StoppingCriteriaList
from versions import skip_if_older

STEPS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "stopped": {"stopping_criteria": lambda model: StoppingCriteriaList([RowsEnd(21, eos_token_id=2)])},
}
ORDER = "greedy beams greedy sampling beams chunks sampling scores beams stopped greedy chunks beam_sampling stopped"


def test_every_mode_starts_where_the_others_ended():
    pair, rows = Pair(), [piece(21, 1), piece(13, 2), piece(21, 1)[:10] + piece(8, 3)]
    for at, step in enumerate(ORDER.split()):
        copies = max(STEPS[step].get("num_beams", 1), STEPS[step].get("num_return_sequences", 1))
        pair.ask(rows, **STEPS[step])
        stats = pair.check()
        assert stats.fallbacks == {}, step
        if at:
            assert stats.computed_tokens == 3, step
            assert stats.reused_tokens == copies * (20 + 12 + 17), step


ASSISTED = {
    # 5.8 asks for an end token here; this one never comes
    "prompt_lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB - 1},
    "near_draft": {"assistant_model": lambda model: draft(Run(model, FAMILIES["llama"], {}), near=True)},
    "stranger": {"assistant_model": lambda model: draft(Run(model, FAMILIES["llama"], {}), near=False)},
    "assisted_sampling": {
        "assistant_model": lambda model: draft(Run(model, FAMILIES["llama"], {}), near=True),
        "do_sample": True,
    },
    "early_exit": {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("assisted", ASSISTED)
def test_assisted_generation_before_and_after_the_others(assisted):
    """What a rejected draft left must not be found again."""
    pair, rows = Pair(), [piece(6, 1) * 4]
    answer = pair.ask(rows, max_new_tokens=14)
    for how in ({}, ASSISTED[assisted], {}, {"num_beams": 2}, ASSISTED[assisted]):
        pair.ask(rows, **{"max_new_tokens": 14, **how})
        pair.ask([[*text(answer[0]), 5, 6]], **{"max_new_tokens": 14, **how})
    if assisted != "early_exit":  # which changes the model's config for a while
        assert pair.reused == 24 + 14 + 2 - 1


def test_a_patched_draft_model_reuses_too():
    pair = Pair()
    helper, near = patched_draft()
    for rows, known in (([piece(21, 1)], 0), ([piece(21, 1)], 20), ([[*piece(21, 1)[:13], 4, 5, 6]], 13)):
        helper.paged.reset_stats()
        pair.ask(rows, assistant_model=lambda model: helper if model is pair.model else near, max_new_tokens=12)
        if helper.paged._pool is None:
            skip_if_older("gives draft models a cache implementation of their own, which is left alone")
        helper.paged._pool.manager.check_integrity()
        assert (helper.paged.stats().reused_tokens, pair.reused) == (known, known)


def test_tokens_of_rows_that_ended_early_are_reused():
    pair, rows = Pair(), [piece(21, 1), piece(21, 2), piece(21, 3)]
    stop = STEPS["stopped"]["stopping_criteria"]
    answer = pair.ask(rows, stopping_criteria=stop, max_new_tokens=12)
    told = [text(row) for row in answer]
    assert len({len(row) for row in told}) == 3, "the rows end at different steps"
    for row in told:
        pair.ask([[*row, 5, 6]])
        assert pair.reused >= len(row) - 1


def test_real_end_tokens():
    pair, rows = Pair(), [piece(21, 1), piece(21, 2)]
    free = pair.ask(rows, max_new_tokens=10)
    evict(pair)
    end = int(free[0, 21 + 3])
    answer = pair.ask(rows, max_new_tokens=10, eos_token_id=end)
    ended = text(answer[0])
    assert ended[-1] == end
    pair.ask([[*ended, 9, 8]], max_new_tokens=10)
    assert pair.reused == len(ended) - 1


def test_scores_and_logits_are_those_of_stock():
    """Also on a warm cache, where a single token of the prompt goes through the model."""
    pair, rows = Pair(), [piece(21, 1), piece(16, 2)]
    pair.ask(rows)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    expected, actual = (
        model.generate(**batch(rows), do_sample=False, max_new_tokens=NEW, **wanted)
        for model in (pair.stock, pair.model)
    )
    assert pair.paged.stats().reused_tokens == 35
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(actual[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("feed", ["whole", "new"])
def test_going_on_from_a_returned_cache_beside_reuse(feed):
    """Three turns with one's own cache; a plain call between two of them, of the same tokens."""
    pair, history, caches = Pair(), torch.tensor([piece(21, 1)]), [None, None]
    pair.ask([piece(21, 1)])
    for turn in range(3):
        answers = []
        for at, model in enumerate((pair.stock, pair.model)):
            fed = history if feed == "whole" or caches[at] is None else history[:, caches[at].get_seq_length() :]
            output = model.generate(
                fed, attention_mask=torch.ones_like(history), past_key_values=caches[at], do_sample=False,
                max_new_tokens=NEW, return_dict_in_generate=True,
            )  # fmt: skip
            caches[at] = output.past_key_values
            answers.append(torch.cat([history, output.sequences[:, fed.shape[1] :]], dim=1))
            del output
        assert torch.equal(*answers), f"turn {turn}"
        plain = [model.generate(answers[0], do_sample=False, max_new_tokens=4) for model in (pair.stock, pair.model)]
        assert torch.equal(*plain), f"beside turn {turn}"
        pair.paged._pool.manager.check_integrity()
        history = torch.cat([answers[0], torch.tensor([tokens(5, seed=turn)])], dim=1)
    caches.clear()
    pair.check()
    pair.ask([history[0].tolist()])
    assert pair.reused >= 40


def test_streamers_see_what_stock_streams():
    pair, rows = Pair(), [piece(21, 1), piece(9, 2)]
    pair.ask(rows)
    streams = []

    def recorder(model):
        streams.append(RecordingStreamer())
        return streams[-1]

    pair.ask(rows, streamer=recorder)
    assert pair.reused == 28
    stock, patched = streams
    assert patched.ended == stock.ended
    assert len(patched.puts) == len(stock.puts)
    assert all(torch.equal(*puts) for puts in zip(patched.puts, stock.puts, strict=True))


def test_without_prefix_caching_nothing_stays():
    pair = Pair(prefix_caching=False)
    for how in STEPS.values():
        pair.ask([piece(21, 1), piece(21, 1)[:12]], **how)
        stats = pair.check()
        assert (stats.reused_tokens, stats.blocks_cached) == (0, 0)
        assert stats.fallbacks == {}
