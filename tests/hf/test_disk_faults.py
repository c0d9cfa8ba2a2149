"""The disk tier under faults, threads and a long series of random calls: as stock, nothing leaked, memory flat."""

import errno
import gc
import itertools
import os
import shutil
import subprocess

import pytest
from disk import ask_from_threads, ask_through_failures, check, failing_now_and_then, files_of, rotate, tiered
from pair import Pair, distinct_pieces, evict
from resident import MIB
from soak import WAYS, Soak
from test_sharing import BLOCK_BYTES

from hf_paged import unpatch_model
from hf_paged.core.records import RecordFile
from hf_paged.layout import RecordLayout

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")

# Faults


def warm(**kwargs) -> tuple[Pair, list[list[int]]]:
    """Three prompts of which two fit into memory; all are on disk."""
    pair, rows = tiered(blocks=20, **kwargs), distinct_pieces(3, 61)
    rotate(pair, rows, 1)
    evict(pair)
    check(pair)
    return pair, rows


def test_a_deleted_folder_is_survived(tmp_path):
    pair, rows = warm(offload_folder=tmp_path / "offload")
    shutil.rmtree(tmp_path / "offload")
    rotate(pair, rows + distinct_pieces(6, 61)[3:])


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_file_is_computed_anew(keep):
    pair, rows = warm()
    for file in files_of(pair):
        os.truncate(file, int(file.stat().st_size * keep))
    before = pair.paged.stats().blocks_disk
    pair.ask([rows[0]])
    rotate(pair, rows, 1, ["damaged"])
    pair.ask([rows[0]])
    assert before > 0
    evict(pair)
    assert min(rotate(pair, rows, 2)) == 56, "written anew"


def test_flipped_bits_are_computed_anew():
    pair, rows = warm()
    for file in files_of(pair):
        content = bytearray(file.read_bytes())
        for at in range(5, len(content), BLOCK_BYTES):
            content[at] ^= 16
        file.write_bytes(content)
    for row in rows[:2]:
        pair.ask([row])
        assert pair.reused == 0
        assert pair.paged.stats().fallbacks["disk tier: a record is damaged"] >= 7
        check(pair, ["damaged"])
    rotate(pair, rows, 3, ["damaged"])


def test_records_that_have_changed_places_are_not_mistaken():
    pair, rows = warm()
    for file in files_of(pair):
        content = file.read_bytes()
        file.write_bytes(content[BLOCK_BYTES:] + content[:BLOCK_BYTES])
    pair.ask([rows[0]])
    assert pair.reused == 0
    check(pair, ["damaged"])


@pytest.fixture(name="small_disk")
def small_file_system(tmp_path):
    """A file system with room for few records."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    size = f"size={16 * BLOCK_BYTES}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", tmp_path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode()}")
    yield tmp_path
    gc.collect()
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_is_survived_and_used_as_far_as_it_goes(small_disk):
    pair = tiered(blocks=20, offload_folder=small_disk)
    rotate(pair, distinct_pieces(6, 61), 3, ["No space left"])
    stats = pair.paged.stats()
    assert 4 <= stats.blocks_disk <= 16
    assert stats.fallbacks == {}, "by now it knows how much room there is"
    unpatch_model(pair.model)


def test_a_failing_writer_is_survived(monkeypatch):
    """The disk is full from some time on; later there is room again, and `clear` makes use of it."""
    pair, rows, write = tiered(blocks=20), distinct_pieces(5, 61), RecordFile.write
    calls = []

    def failing(self, slot, content):
        calls.append(slot)
        if len(calls) > 7:
            raise NO_SPACE
        return write(self, slot, content)

    with monkeypatch.context() as patched:
        patched.setattr(RecordFile, "write", failing)
        rotate(pair, rows, 2, ["No space left"])
        assert pair.paged.stats().blocks_disk <= 7
    pair.paged.clear()
    assert min(rotate(pair, rows)) == 56


def test_a_disk_that_has_no_room_at_all(monkeypatch):
    def failing(self, slot, content):
        raise NO_SPACE

    monkeypatch.setattr(RecordFile, "write", failing)
    pair = tiered(blocks=20)
    assert max(rotate(pair, distinct_pieces(5, 61), 2, ["No space left"])) == 0
    assert pair.paged.stats().blocks_disk == 0


def test_a_folder_that_cannot_be_made_is_counted(tmp_path):
    (tmp_path / "a").mkdir()
    pair = tiered(offload_folder=tmp_path / "a" / "b")
    (tmp_path / "a").rmdir()
    (tmp_path / "a").write_text("not a folder any more")
    rotate(pair, distinct_pieces(3, 61), 2, ["Not a directory"])
    assert pair.paged.stats().blocks_disk == 0


PLACES = {
    "copying out": (RecordLayout, "read_blocks"),
    "writing": (RecordFile, "write"),
    "reading": (RecordFile, "read"),
    "copying in": (RecordLayout, "write_blocks"),
}


# The writing thread meets errors of the system only, and no Ctrl-C.
FAILURES = [*itertools.product(PLACES, [RuntimeError, OSError, KeyboardInterrupt])]


@pytest.mark.parametrize(("place", "error"), [each for each in FAILURES if each[0] != "writing" or each[1] is OSError])
def test_a_transfer_that_fails_or_is_interrupted(place, error, monkeypatch):
    """Errors cost the blocks, Ctrl-C ends the call; no block is leaked and the next call works."""
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), []

    pair, rows = warm()
    more = distinct_pieces(5, 61)[3:]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing_now_and_then(function, error, calls))
        ask_through_failures(pair, (*rows, *more, *rows), error)
    assert calls
    rotate(pair, rows, 1, ["a transfer"])
    evict(pair)
    assert min(rotate(pair, rows, 1)) == 56


# Threads


def test_threads_share_a_tier():
    ask_from_threads(tiered(blocks=60), distinct_pieces(8, 61), calls=12)


# A long time


def test_a_soak_of_random_calls():
    """`make soak` for more; what a file was cut short by is all that may be missed."""
    soak = Soak(seed=1)
    soak.run(60)
    assert min(soak.counts[name] for name in (*WAYS, "tokens reused", "bytes fetched", "blocks evicted", "release")) > 0
    assert soak.growth < 4 * MIB
