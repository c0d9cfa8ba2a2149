"""Prompts are computed once, ever: later calls start where earlier ones have ended, and answer as stock does."""

import modes
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, PAD, VOCAB, stock_model
from modes import RecordingStreamer, RowsEnd, draft
from pair import NEW, Pair, evict, piece
from prompts import batch, tokens
from transformers import StoppingCriteriaList

from hf_paged import patch_model

WIDE = ["llama", "mistral_sliding", "gemma2", "gemma3", "gpt2", "qwen2", "phi3"]
PADDED = ["opt", "bloom", "falcon_alibi", "mpt"]


def text(row: torch.Tensor) -> list[int]:
    """What a row says, padding on either side left out."""
    return [token for token in row.tolist() if token != PAD]


# How much is computed


@pytest.mark.parametrize("name", WIDE)
def test_a_prompt_that_was_asked_before_costs_one_token_for_each_distinct_row(name):
    pair, rows = Pair(name), [piece(21, 1), piece(8, 2), piece(21, 1), piece(16, 3)]
    real = sum(map(len, rows))
    pair.ask(rows)
    stats = pair.check()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.shared_tokens) == (real, real - 21, 21)
    pair.ask(rows)
    stats = pair.check()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.shared_tokens) == (real, 3, 1)
    assert stats.reused_tokens == real - 4
    assert stats.fallbacks == {}


@pytest.mark.parametrize("name", WIDE)
def test_a_chat_computes_only_what_is_new(name):
    """The last token of an answer is not stored: it never went through the model."""
    pair, history = Pair(name), piece(19, 1)
    for turn in range(4):
        before = len(history) if turn else 0
        history = history + (tokens(5, seed=turn) if turn else [])
        answer = pair.ask([history])
        assert pair.computed == (1 + 5 if turn else 19), f"turn {turn}"
        assert pair.reused == (before - 1 if turn else 0), f"turn {turn}"
        history = text(answer[0])


def test_an_edited_answer_is_computed_from_the_edit_on():
    pair = Pair()
    answer = text(pair.ask([piece(19, 1)], max_new_tokens=12)[0])
    edited = [*answer[:26], answer[26] % (VOCAB - 4) + 3 + 1, *answer[27:]]
    pair.ask([edited])
    assert pair.reused == 26


def test_the_table_shows_what_was_reused():
    pair = Pair()
    assert "reused" in repr(pair.paged)
    pair.ask([piece(21, 1)])
    pair.ask([piece(21, 1)])
    (line,) = [line for line in repr(pair.paged).splitlines() if "reused from earlier calls" in line]
    assert line.split()[-1] == "20"
    assert f"/ {pair.pool.cached}" in repr(pair.paged)


def test_many_samples_of_a_known_prompt():
    pair = Pair()
    pair.ask([piece(21, 1)])
    pair.ask([piece(21, 1)], do_sample=True, temperature=1.3, num_return_sequences=4)
    stats = pair.check()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.reused_tokens, stats.shared_tokens) == (84, 1, 80, 3)


# Where a hit ends


@pytest.mark.parametrize("common", [1, 2, 7, 8, 9, 15, 16, 17, 23, 24])
def test_a_common_beginning_of_any_length_is_reused(common):
    """Also inside a block: its head is copied."""
    pair, known = Pair(), piece(24, 1)
    pair.ask([known])
    parted = [*known[:common], known[common] % (VOCAB - 4) + 4 if common < 24 else 5, *tokens(6, seed=2)]
    pair.ask([parted])
    assert pair.reused == common
    assert pair.computed == 7
    pair.ask([known])
    assert pair.reused == 23, "the copied block is what it was"


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17])
def test_a_prompt_shorter_than_what_is_known(length):
    pair, known = Pair(), piece(40, 1)
    pair.ask([known])
    pair.ask([known[:length]])
    assert (pair.reused, pair.computed) == (length - 1, 1)
    pair.ask([known])
    assert (pair.reused, pair.computed) == (39, 1)


def test_a_whole_prompt_that_ends_with_a_block():
    """The last token is computed again, for its logits, into a copy of the block."""
    pair = Pair()
    for _ in range(3):
        pair.ask([piece(16, 1), piece(8, 2)])
    assert (pair.reused, pair.computed) == (15 + 7, 2)


def test_rows_that_hit_different_lengths():
    pair, known = Pair(), [piece(30, 1), piece(17, 2), piece(8, 3)]
    pair.ask(known)
    rows = [[*known[0][:29], 4, 5], known[1] + piece(11, 4), piece(5, 5), known[2][:3] + piece(2, 6), known[0][:1]]
    pair.ask(rows)
    first_new = text(pair.stock.generate(**batch([known[1]]), do_sample=False, max_new_tokens=1)[0])[-1]
    assert rows[1][17] != first_new, "the prompt parts from the generated text"
    assert pair.reused == 29 + 17 + 0 + 3 + 0
    assert pair.computed == 2 + 11 + 5 + 2 + 1


def test_rows_that_share_what_is_known_and_what_is_new():
    pair, known = Pair(), piece(20, 1)
    pair.ask([[*known[:19], 4]])
    rows = [[*known[:19], 6, *piece(4, name)] for name in (2, 3, 2)]
    pair.ask(rows)
    stats = pair.check()
    assert (stats.reused_tokens, stats.computed_tokens, stats.shared_tokens) == (3 * 19, 1 + 4 + 4, 1 + 1 + 4)


def test_one_token_prompts():
    pair = Pair()
    for rows in ([[7]], [[7]], [[7], [9], [7]], [[7, 8], [7]]):
        pair.ask(rows)
    assert pair.reused == 1
    assert pair.computed == 2


@pytest.mark.parametrize("block_size", [8, 16, 256])
def test_every_block_size(block_size):
    pair = Pair(block_size=block_size)
    for rows in ([piece(21, 1)], [[*piece(21, 1)[:18], 4, 5]], [piece(21, 1), piece(21, 1)[:9]]):
        pair.ask(rows)
    assert pair.reused == 20 + 8


def test_the_reference_backend():
    pair = Pair(attention_backend="reference")
    for rows in ([piece(21, 1)], [[*piece(21, 1)[:18], 4, 5]], [piece(21, 1), piece(21, 1)[:9]]):
        pair.ask(rows)
    assert pair.reused == 20 + 8


# Every mode after every other


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
    "near_draft": {"assistant_model": lambda model: draft(modes.Run(model, FAMILIES["llama"], {}), near=True)},
    "stranger": {"assistant_model": lambda model: draft(modes.Run(model, FAMILIES["llama"], {}), near=False)},
    "assisted_sampling": {
        "assistant_model": lambda model: draft(modes.Run(model, FAMILIES["llama"], {}), near=True),
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


def patched_draft():
    """A draft model for the patched model, patched itself, and an unpatched one for stock."""
    helper, near = (ASSISTED["near_draft"]["assistant_model"](None) for _ in range(2))
    return patch_model(helper, block_size=BLOCK_SIZE), near


def test_a_patched_draft_model_reuses_too():
    pair = Pair()
    helper, near = patched_draft()
    for rows, known in (([piece(21, 1)], 0), ([piece(21, 1)], 20), ([[*piece(21, 1)[:13], 4, 5, 6]], 13)):
        helper.paged.reset_stats()
        pair.ask(rows, assistant_model=lambda model: helper if model is pair.model else near, max_new_tokens=12)
        if helper.paged._pool is None:
            pytest.skip("this transformers gives draft models a cache implementation of their own")
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


def test_a_pipeline_reuses_the_beginning_of_its_texts():
    pytest.importorskip("tokenizers")
    from test_patch import tiny_tokenizer
    from transformers import pipeline

    stock, pipe = (
        pipeline("text-generation", model=copy_of(FAMILIES["llama"]), tokenizer=tiny_tokenizer()) for _ in range(2)
    )
    patch_model(pipe, block_size=BLOCK_SIZE)
    system = " ".join(f"w{token}" for token in tokens(30) if token < VOCAB - 2)
    for at, ending in enumerate(("w7", "w7 w8 w9", "w7", "w20 w21")):
        pipe.model.paged.reset_stats()
        asked = {"do_sample": False, "max_new_tokens": 6}
        assert pipe(f"{system} {ending}", **asked) == stock(f"{system} {ending}", **asked)
        assert pipe.model.paged.stats().reused_tokens >= (len(system.split()) if at else 0)
    assert pipe.model.paged.stats().blocks_in_use == 0


# Who sees what


def test_a_salt_sees_its_own_prefixes_only():
    pair, rows = Pair(), [piece(21, 1)]
    for salt in ("a", "b", None, "", "A", "a ", "ä", "\ud800", "none", "a" * 1000):
        pair.ask(rows, salt=salt)
        assert (pair.reused, pair.computed) == (0, 21), repr(salt)
        pair.ask(rows, salt=salt)
        assert (pair.reused, pair.computed) == (20, 1), repr(salt)


def test_a_salt_covers_what_was_generated():
    pair = Pair()
    answer = text(pair.ask([piece(21, 1)], salt="a")[0])
    for salt in (None, "b"):
        pair.ask([[*answer, 5]], salt=salt)
        assert pair.reused == 0, salt
    pair.ask([[*answer, 5]], salt="a")
    assert pair.reused == len(answer) - 1


def test_a_salt_covers_a_cache_that_comes_back():
    """The tokens of a continued cache are found under the salt of the call that made them, or not at all."""
    pair = Pair()
    ids = torch.tensor([piece(21, 1)])
    first = pair.model.generate(ids, do_sample=False, max_new_tokens=6, cache_salt="a", return_dict_in_generate=True)
    again = pair.model.generate(
        first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=20, cache_salt="b"
    )
    told, seen = again[0].tolist(), first.sequences.shape[1]
    del first
    for salt in ("b", None):
        pair.ask([[*told, 5]], salt=salt)
        assert pair.reused == 0, salt
    pair.ask([[*told, 5]], salt="a")
    assert pair.reused < seen, "the first caller does not see how the second went on"


def test_a_salt_covers_the_draft_model():
    """A patched draft model must not tell one tenant's prompts from another's either."""
    pair = Pair()
    helper, near = patched_draft()
    for salt in ("a", "b", None):
        helper.paged.reset_stats()
        pair.ask([piece(21, 1)], salt=salt, assistant_model=lambda model: helper if model is pair.model else near)
        assert helper.paged.stats().reused_tokens == 0, f"salt {salt!r}"


@pytest.mark.parametrize("salt", [7, b"a", ["a"], True, torch.ones(1)], ids=repr)
def test_a_salt_must_be_a_string(salt):
    pair = Pair()
    with pytest.raises(ValueError, match="cache_salt must be a string"):
        pair.model.generate(**batch([piece(5, 1)]), max_new_tokens=2, cache_salt=salt)
    pair.ask([piece(5, 1)])


def test_without_prefix_caching_nothing_stays():
    pair = Pair(prefix_caching=False)
    for how in STEPS.values():
        pair.ask([piece(21, 1), piece(21, 1)[:12]], **how)
        stats = pair.check()
        assert (stats.reused_tokens, stats.blocks_cached) == (0, 0)
        assert stats.fallbacks == {}


def test_settings_that_are_switched_start_anew():
    pair = Pair()
    pair.ask([piece(21, 1)])
    for overrides in ({"prefix_caching": False}, {"block_size": 16}, {"block_size": 8}):
        patch_model(pair.model, **overrides)
        pair.ask([piece(21, 1)])
        assert pair.reused == 0, overrides


@pytest.mark.parametrize("forget", ["clear", "release"])
def test_what_is_forgotten_is_computed_again(forget):
    pair = Pair()
    pair.ask([piece(21, 1)])
    assert pair.paged.stats().blocks_cached > 0
    getattr(pair.paged, forget)()
    assert pair.paged.stats().blocks_cached == 0
    for reused in (0, 20):
        pair.ask([piece(21, 1)])
        assert pair.reused == reused
    if forget == "release":
        pair.paged.release()
        assert pair.paged.stats().bytes_reserved == 0


@pytest.mark.parametrize("forget", ["clear", "release"])
def test_forgetting_while_a_cache_is_held(forget):
    pair, ids = Pair(), torch.tensor([piece(21, 1)])
    outputs = [
        model.generate(ids, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
        for model in (pair.stock, pair.model)
    ]
    getattr(pair.paged, forget)()
    pair.model.generate(ids, do_sample=False, max_new_tokens=6)
    following = [
        model.generate(output.sequences, past_key_values=output.past_key_values, do_sample=False, max_new_tokens=12)
        for model, output in zip((pair.stock, pair.model), outputs, strict=True)
    ]
    assert torch.equal(*following)
    outputs.clear()
    pair.ask([[*following[0][0].tolist(), 5]])


# Other families


@pytest.mark.parametrize("name", [*WIDE, "llama_mqa", "llama_tied", "gpt_neox", "mixtral", "smollm3"])
def test_families_answer_as_stock_warm_cold_and_half_warm(name):
    pair, known = Pair(name), [piece(27, 1), piece(13, 2)]
    pair.ask(known, max_new_tokens=12)
    pair.ask(known, max_new_tokens=12)
    assert pair.reused == 26 + 12
    pair.ask([known[0][:21] + piece(5, 3), known[1]], num_beams=2)
    assert pair.reused == 2 * (21 + 12)
    evict(pair, pair.pool.cached // 2)
    pair.ask([*known, known[0][:21] + piece(5, 3)], do_sample=True)
    pair.ask([known[0][:9], known[0] + piece(30, 4)], prefill_chunk_size=7)
    assert pair.reused > 0


@pytest.mark.parametrize("name", PADDED)
def test_families_on_the_padded_path_are_never_wrong(name):
    pair, known = Pair(name), [piece(21, 1), piece(13, 2)]
    for rows in (known, known, [known[0][:12] + piece(4, 3)], [known[0]]):
        pair.ask(rows)
        if not FAMILIES[name].packed and pair.paged.stats().fallbacks:
            assert pair.reused == 0
            assert pair.paged.stats().blocks_cached == 0


@pytest.mark.parametrize(
    "name", ["mamba", "lfm2", "qwen3_next", "deepseek_v3", "gpt_oss", "t5", "bart", "falcon_rotary"]
)
def test_other_families_are_never_wrong(name):
    family = FAMILIES[name]
    if family.missing():
        pytest.skip(family.missing())
    stock, model = stock_model(name), patch_model(copy_of(family), block_size=BLOCK_SIZE)
    for rows in ([piece(21, 1)], [piece(21, 1)], [piece(21, 1)[:11] + piece(5, 2), piece(4, 3)]):
        asked = {**batch(rows), "do_sample": False, "max_new_tokens": NEW}
        assert torch.equal(model.generate(**asked), stock.generate(**asked))
    assert model.paged.stats().blocks_in_use == 0
