"""Cached prefixes on disk: found again, never another answer than stock's, gone when they should be."""

import gc
import os
import pickle
import subprocess
import sys

import pytest
import torch
from compare import copy_of
from disk import NAMES, Always, Never, check, disk, files_of, rotate, tiered
from families import FAMILIES
from pair import Pair, distinct_pieces, evict, piece
from prompts import batch, tokens
from test_sharing import BLOCK_BYTES
from windows import window_pair

from hf_paged import PagedCache, PagedConfig, patch_model, unpatch_model

# Answers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", [Always, Never, None], ids=["always", "never", "by estimate"])
def test_prompts_in_rotation_answer_as_stock(name, policy):
    pair = tiered(name, 16, policy=policy)
    reused = rotate(pair, distinct_pieces(5, 61), rounds=3)
    if policy is Always:
        assert min(reused) >= 56, "all full blocks of the prompt come back"
    if policy is Never:
        assert sum(reused) == 0
        assert pair.paged.stats().recompute_choices == 1
    assert pair.paged.stats().blocks_disk > 16


@pytest.mark.parametrize("window", [5, 8, 20])
@pytest.mark.parametrize("name", ["gemma3", "mistral_sliding"])
def test_windows_bring_back_what_they_see(name, window):
    """A window layer's blocks before the last window stay on disk, full layers bring back all."""
    pair = tiered(name, 40, make=lambda *args, **kw: window_pair(*args, window=window, **kw))
    row = piece(61, 1)
    told = pair.ask([row])[0].tolist()
    for other, reused in ((row, 56), ([*told, 5], 66), (row[:33], 32), (row[:40] + tokens(9, seed=2), 40), (told, 66)):
        evict(pair)
        pair.ask([other])
        check(pair)
        assert pair.reused == reused


def test_only_the_blocks_of_the_last_window_are_read():
    pair = tiered("mistral_sliding", 40, make=lambda *args, **kw: window_pair(*args, window=8, **kw))
    pair.ask([piece(61, 1)])
    evict(pair)
    pair.ask([piece(61, 1)])
    assert pair.reused == 56
    assert pair.paged.stats().fetched_bytes == BLOCK_BYTES, "tokens 49 to 55 lie in one block"


def test_a_conversation_goes_on_from_disk():
    """Each turn follows an answer that ends inside a block; others take the memory between two turns."""
    pair, said = tiered(blocks=20), distinct_pieces(3, 20)
    for turn in range(4):
        for at, row in enumerate(said):
            said[at] = pair.ask([row + tokens(3 + at, seed=turn)], max_new_tokens=11)[0].tolist()
            check(pair)
            assert turn == 0 or pair.reused == len(row) - 1, "all but the last token, which is not stored"


def test_samples_that_part_inside_a_block_are_followed_from_disk():
    """Behind the partly filled block where they parted."""
    pair, row = tiered(blocks=30), piece(21, 1)
    told = pair.ask([row], do_sample=True, num_return_sequences=3, max_new_tokens=20)
    for each in told.tolist():
        evict(pair)
        pair.ask([each])
        check(pair)
        assert pair.reused >= 37


def test_rows_of_a_batch_are_fetched_together():
    pair, system = tiered(blocks=40), piece(40, 1)
    rows = [system + tokens(9, seed=seed) for seed in range(3)] + [piece(17, 2)]
    pair.ask(rows)
    evict(pair)
    pair.ask(rows)
    check(pair)
    assert pair.reused == 3 * 48 + 16
    assert pair.paged.stats().fetched_bytes == (5 + 3 + 2) * BLOCK_BYTES, "what they share is read once"


def test_a_hit_is_part_memory_and_part_disk():
    pair = tiered(blocks=20)
    pair.ask([piece(61, 1)])
    evict(pair, 4)  # ends go first
    pair.ask([piece(61, 1)])
    check(pair)
    assert pair.reused == 56
    assert 0 < pair.paged.stats().fetched_bytes < 56 * BLOCK_BYTES // 8


def test_beams_and_assisted_calls_answer_as_stock():
    pair = tiered(blocks=24)
    for how in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 1}, {"prefill_chunk_size": 7}):
        rotate(pair, distinct_pieces(4, 40), rounds=2, **how)


def test_what_is_on_disk_is_not_written_again():
    pair, rows = tiered(blocks=12), distinct_pieces(4, 61)
    rotate(pair, rows, rounds=3)
    written = 0
    for row in rows:
        pair.ask([row])
        check(pair)
        written += pair.paged.stats().offloaded_bytes
        assert pair.paged.stats().evicted_blocks > 0
    assert written == 0


@pytest.mark.parametrize("slots", [1, 5, 9])
def test_the_disk_budget_holds_and_the_oldest_goes_first(slots):
    pair, rows = tiered(blocks=10, disk=slots * BLOCK_BYTES + 5), distinct_pieces(4, 61)
    rotate(pair, rows)
    assert pair.paged.stats().blocks_disk == slots
    assert sum(file.stat().st_size for file in files_of(pair)) <= slots * BLOCK_BYTES


def test_a_budget_smaller_than_a_block_is_said():
    pair = tiered(blocks=10, disk=100)
    rotate(pair, distinct_pieces(3, 61), fallbacks=["less than one block"])
    assert "disk tier: max_memory['disk'] is less than one block" in pair.paged.stats().fallbacks


@torch.inference_mode()
def test_under_inference_mode():
    pair = tiered(blocks=12)
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56


def test_half_precision_and_autocast_have_records_of_their_own():
    pair = tiered(wrap=lambda model: model.bfloat16())
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56
    with torch.autocast("cpu", torch.bfloat16):
        rotate(pair, distinct_pieces(3, 61))


# What must not come back


def test_salts_do_not_see_each_other():
    pair, rows = tiered(), distinct_pieces(3, 61)
    rotate(pair, rows, salt="a")
    for salt, reused in (("b", 0), (None, 0), ("a", 56)):
        pair.ask([rows[0]], salt=salt)
        check(pair)
        assert pair.reused == reused
        evict(pair)


EDITS = {
    "optimizer": lambda model: model.lm_head.weight.data.add_(0.1 * torch.randn_like(model.lm_head.weight)),
    "no_grad": lambda model: [p.mul_(1.1) for p in model.parameters()],
    "load_state_dict": lambda model: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_weights_compute_anew(edit):
    pair, rows = tiered(), distinct_pieces(3, 61)
    rotate(pair, rows)
    with torch.no_grad():
        pair.both(EDITS[edit])
    for row in rows:
        pair.ask([row])
        assert pair.reused == 0
    check(pair)
    assert sum(file.stat().st_size for file in files_of(pair)) < 40 * BLOCK_BYTES, (
        "the old records' room was given back"
    )


def test_clear_forgets_the_disk():
    pair, rows = tiered(), distinct_pieces(3, 61)
    rotate(pair, rows)
    pair.paged.clear()
    disk(pair).flush()
    disk(pair)._writer.submit(int).result()
    assert pair.paged.stats().blocks_disk == 0
    assert [file.stat().st_size for file in files_of(pair)] == [0]
    pair.ask([rows[0]])
    assert pair.reused == 0
    assert min(rotate(pair, rows)) == 56, "and goes on"


# Folders


def test_files_go_with_release_and_unpatching(tmp_path):
    pair = tiered(offload_folder=tmp_path)
    rotate(pair, distinct_pieces(3, 61))
    assert [path.name[:9] for path in tmp_path.iterdir()] == ["hf_paged-"]
    assert files_of(pair)[0].stat().st_size > 0
    pair.paged.release()
    assert not list(tmp_path.iterdir())
    rotate(pair, distinct_pieces(3, 61))
    assert len(list(tmp_path.iterdir())) == 1
    patch_model(pair.model, block_size=16)
    assert not list(tmp_path.iterdir())
    other = tiered(offload_folder=tmp_path)
    rotate(other, distinct_pieces(3, 61))
    unpatch_model(other.model)
    assert not list(tmp_path.iterdir())


def test_files_go_with_the_model(tmp_path):
    pair = tiered(offload_folder=tmp_path)
    rotate(pair, distinct_pieces(3, 61))
    assert list(tmp_path.iterdir())
    del pair
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_held_cache_outlives_the_files(tmp_path):
    pair = tiered(blocks=30, offload_folder=tmp_path)
    rows = distinct_pieces(4, 61)
    rotate(pair, rows)
    held = pair.model.generate(**batch([rows[0]]), do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    pair.paged.release()
    assert not list(tmp_path.iterdir())
    expected = pair.stock.generate(held.sequences, do_sample=False, max_new_tokens=60)
    actual = pair.model.generate(
        held.sequences, past_key_values=held.past_key_values, do_sample=False, max_new_tokens=60
    )
    assert torch.equal(actual, expected)


def test_nothing_is_pickled(tmp_path, monkeypatch):
    """A file of the tier is records of the blocks' size, and what is saved is safetensors."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    pair = tiered(offload_folder=tmp_path)
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56
    (file,) = files_of(pair)
    assert file.stat().st_size == pair.paged.stats().blocks_disk * BLOCK_BYTES
    pair.paged.save(tmp_path / "saved")
    assert Pair("llama").paged.load(tmp_path / "saved") > 0


SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from disk import disk, files_of, rotate, tiered
from pair import distinct_pieces
pair = tiered(offload_folder=sys.argv[1])
rotate(pair, distinct_pieces(3, 61))
assert files_of(pair)[0].stat().st_size > 0
print(disk(pair)._folder.path)
"""


def test_processes_share_a_folder_and_clean_up_at_exit(tmp_path):
    pair = tiered(offload_folder=tmp_path)
    rotate(pair, distinct_pieces(3, 61))
    own = list(tmp_path.iterdir())
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), here, os.path.dirname(here)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.path.dirname(done.stdout.strip()) == str(tmp_path)
    assert list(tmp_path.iterdir()) == own
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56


def test_a_forked_process_computes_and_leaves_the_files_alone(tmp_path):
    pair = tiered(offload_folder=tmp_path)
    rows = distinct_pieces(3, 61)
    rotate(pair, rows)
    evict(pair)
    check(pair)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pair.ask([rows[0]])
            status = 0 if pair.reused == 0 else 2
            unpatch_model(pair.model)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert files_of(pair)
    assert min(rotate(pair, rows, 1)) == 56


def test_without_a_folder_files_are_temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pair = tiered()
    rotate(pair, distinct_pieces(3, 61))
    assert disk(pair)._folder.path.parent == tmp_path


# Settings


def test_settings_are_checked_on_entry(tmp_path):
    (tmp_path / "file").write_text("")
    for overrides, named in (
        ({"offload_folder": tmp_path}, "max_memory={'disk'"),
        ({"offload_folder": 3, "max_memory": {"disk": 1}}, "must be a path"),
        ({"offload_folder": tmp_path / "file", "max_memory": {"disk": 1}}, "no folder"),
        ({"offload_folder": tmp_path / "file" / "below", "max_memory": {"disk": 1}}, "no folder"),
        ({"max_memory": {"disk": "much"}}, "is no size"),
        ({"max_memory": {"disc": "1GiB"}}, "'disk'"),
    ):
        with pytest.raises(ValueError, match=named):
            PagedConfig(**overrides)
    PagedConfig(offload_folder=str(tmp_path / "new" / "folder"), max_memory={"cpu": "1GiB", "disk": "10GiB"})
    with pytest.raises(ValueError, match="patched model"):
        PagedCache(copy_of(FAMILIES["llama"]).config, max_memory={"disk": "1GiB"})


def test_models_elsewhere_are_told():
    class Elsewhere(type(copy_of(FAMILIES["llama"]))):
        device = torch.device("xpu:0")

    model = copy_of(FAMILIES["llama"])
    model.__class__ = Elsewhere
    with pytest.raises(ValueError, match=r"max_memory\['disk'\].*xpu"):
        patch_model(model, max_memory={"disk": "1GiB"})
    assert type(model) is Elsewhere


def test_the_table_says_what_was_moved_and_how_fast():
    pair = tiered(policy=None)
    rotate(pair, distinct_pieces(3, 61), 3)
    stats = pair.paged.stats()
    assert stats.fetch_choices + stats.recompute_choices > 0
    assert min(stats.disk_bytes_per_second, stats.compute_tokens_per_second) > 0
    table = str(pair.paged)
    for line in ("bytes offloaded / fetched", "prefixes fetched / computed anew", "speed of host / disk / computing"):
        assert line in table
    assert "offloaded" not in str(Pair().paged)
