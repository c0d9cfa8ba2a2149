"""Records on disk against a dict; which of them a prompt can use against trying all; when they are worth reading."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

import pytest

from hf_paged.core.fetch import (
    TRIAL_BYTES,
    TRIAL_EVERY,
    FetchPolicy,
    Option,
    find_hops,
    find_options,
)
from hf_paged.core.manager import BlockManager
from hf_paged.core.prefix import PrefixIndex, chain_key, pack_tokens, root_key, seen_from
from hf_paged.core.records import RecordFile, RecordFolder
from hf_paged.core.tier import TierIndex, TierStack

# Behind the skip: a machine that is there for its GPU may lack hypothesis.
hypothesis = pytest.importorskip("hypothesis")
import hypothesis.strategies as st  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule  # noqa: E402

WRITTEN: Future = Future()
WRITTEN.set_result(None)
RECORD_BYTES, SLOTS, GROUPS = 24, 4, 2
KEYS = [(parent, bytes(length)) for parent in (b"a", b"b") for length in (4, 8, 16)]  # 16 bytes fill a block
some_key, some_group = st.sampled_from(KEYS), st.integers(0, GROUPS - 1)


class TierMachine(RuleBasedStateMachine):
    """What is read is what was put last, or nothing; nothing is lost but by age and by crashes."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.index = TierIndex(GROUPS, SLOTS, 16)
        self.files = [RecordFile(self.folder / str(group), RECORD_BYTES) for group in range(GROUPS)]
        self.model = [OrderedDict() for _ in range(GROUPS)]  # key to content; `None`: a crash may have taken it
        self.room = [SLOTS] * GROUPS

    def _add(self, group, key):
        kept = self.model[group]
        kept.pop(key, None)
        while len(kept) >= self.room[group] > 0:
            kept.popitem(last=False)
        return self.index.add(group, chain_key(*key), *key)

    @rule(group=some_group, key=some_key, content=st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES))
    def put(self, group, key, content):
        record = self._add(group, key)
        assert (record is None) == (self.room[group] == 0)
        if record is not None:
            record.checksum, record.written = self.files[group].write(record.slot, memoryview(content)), WRITTEN
            self.model[group][key] = content

    @rule(group=some_group, key=some_key, is_full=st.booleans(), after=st.integers(0, RECORD_BYTES - 1))
    def fail_to_put(self, group, key, is_full, after):
        """The writer gives up after some bytes, because the disk is full or for another reason."""
        record, pwrite = self._add(group, key), os.pwrite
        if record is None:
            return

        def failing(file, content, at):
            if len(content) < RECORD_BYTES or after == 0:
                raise OSError(errno.ENOSPC if is_full else errno.EIO, "failed")
            return pwrite(file, content[:after], at)

        os.pwrite = failing
        try:
            with pytest.raises(OSError):
                self.files[group].write(record.slot, memoryview(bytes(RECORD_BYTES)))
        finally:
            os.pwrite = pwrite
        record.written = WRITTEN
        assert self.index.get(group, chain_key(*key)) is None, "what was not written whole is not there"
        if is_full:
            used = self.index._high_water[group] - len(self.index._retired[group])
            self.index.retire(group, record)
            self.room[group] = used - 1
        else:
            self.index.discard(group, record)

    @rule(group=some_group, key=some_key)
    def get(self, group, key):
        record, expected = self.index.get(group, chain_key(*key)), self.model[group].get(key, "missing")
        assert (record is None) == (expected == "missing")
        if record is not None:
            content = bytearray(RECORD_BYTES)
            is_whole = self.files[group].read(record.slot, memoryview(content), record.checksum)
            assert self.index.holds(group, record)
            assert is_whole or expected is None
            assert not is_whole or expected in (None, bytes(content))
            if not is_whole:
                assert self.index.discard(group, record)
                del self.model[group][key]

    @rule(group=some_group, count=st.integers(0, SLOTS + 1))
    def make_room(self, group, count):
        """What has gone is told, oldest first, and no more of it than must be."""
        kept, expected = self.model[group], []
        while kept and self.room[group] - len(kept) < count:
            expected.append(kept.popitem(last=False)[0])
        gone = self.index.make_room(group, count)
        assert [(record.parent, record.tokens) for record in gone] == expected
        assert not any(self.index.holds(group, record) for record in gone)
        assert self.index.capacity(group) == self.room[group]

    @rule(group=some_group, keys=st.lists(some_key, max_size=3))
    def touch(self, group, keys):
        self.index.touch(group, [chain_key(*key) for key in keys])
        for key in keys:
            if key in self.model[group]:
                self.model[group].move_to_end(key)

    @rule(parent=st.sampled_from([b"a", b"b"]), length=st.integers(0, 20))
    def find_short(self, parent, length):
        here = [len(t) for kept in self.model for p, t in kept if p == parent and len(t) <= min(length, 15)]
        assert len(self.index.longest_short(parent, bytes(length))) == max(here, default=0)

    @precondition(lambda self: any(self.model))
    @rule(group=some_group, size=st.integers(0, RECORD_BYTES * SLOTS))
    def truncate(self, group, size):
        path = self._path(group)
        if size < os.stat(path).st_size:
            os.truncate(path, size)
            self._distrust(group)

    @rule(group=some_group, data=st.data())
    def flip_a_bit(self, group, data):
        path = self._path(group)
        size = os.stat(path).st_size
        if size:
            at = data.draw(st.integers(0, size - 1))
            with open(path, "r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))
            self._distrust(group, at // RECORD_BYTES)

    @rule()
    def delete_the_folder(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule()
    def clear(self):
        self.index.clear()
        for group in range(GROUPS):
            self.model[group].clear()
            self.files[group].truncate()
            self.room[group] = SLOTS

    def _path(self, group):
        return f"/proc/self/fd/{self.files[group]._file.fileno()}"

    def _distrust(self, group, slot=None):
        for key in self.model[group]:
            if slot in (None, self.index.get(group, chain_key(*key)).slot):
                self.model[group][key] = None

    @invariant()
    def agrees(self):
        self.index.check_integrity()
        assert len(self.index) == sum(map(len, self.model))

    def teardown(self):
        for file in self.files:
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# Which blocks a prompt can use

# Where a block is, and on which tiers then.
PLACES = {"memory": (), "near": (0,), "far": (1,), "both": (0, 1), "gone": ()}
ROOT, TOKENS = root_key(b"model", None), list(range(100, 127))  # blocks of 4: six full ones and three tokens


@settings(max_examples=300, deadline=None)
@given(
    windows=st.sampled_from([(None,), (6,), (None, 3), (None, 6, 9)]),
    where=st.lists(st.lists(st.sampled_from([*PLACES, "near"]), min_size=3, max_size=3), max_size=7),
    seam=st.sampled_from([None, 1, 3]),
    limit=st.integers(1, 27),
)
def test_options_are_the_beginnings_that_are_whole(windows, where, seam, limit):
    """Each beginning is tried by itself: whatever the next token sees must be in memory or on a tier, the nearest."""
    index, tiers = PrefixIndex(4, windows), [TierIndex(len(windows), 50, 16, level) for level in range(2)]
    starts = [0]
    for i in range(len(where)):
        starts.append(starts[-1] + (3 if i == seam else 4))
    stops = [stop for stop in starts[1:] if stop <= len(TOKENS)]
    key, blocks = ROOT, 0
    for i, stop in enumerate(stops):
        packed = pack_tokens(TOKENS[starts[i] : stop])
        held = []
        for group in range(len(windows)):
            blocks += 1
            held.append(blocks if where[i][group] == "memory" else 0)
            for level in PLACES[where[i][group]]:
                tiers[level].add(group, chain_key(key, packed), key, packed).written = Future()
        key = index.add(key, packed, held)
    sizes = [10 ** (2 * group) for group in range(len(windows))]
    hops = find_hops(index, TierStack(tiers), ROOT, TOKENS, limit)
    options = find_options(hops, windows, sizes, 0, limit, num_levels=2)
    expected = []
    for count in range(1, len(stops) + 1):
        if starts[count - 1] >= limit or len(hops) < count:
            break
        num_tokens = min(stops[count - 1], limit)
        seen = [
            (group, where[i][group])
            for group, window in enumerate(windows)
            for i in range(count)
            if stops[i] > seen_from(num_tokens, window)
        ]
        read = [(sizes[group], PLACES[place][0]) for group, place in seen if PLACES[place]]
        num_bytes = tuple(sum(size for size, level in read if level == wanted) for wanted in range(2))
        if any(num_bytes) and all(place != "gone" for _, place in seen):
            expected.append(Option(count, num_tokens, num_bytes))
    assert options == expected
    there = [i for i, each in enumerate(where[: len(stops)]) if set(each[: len(windows)]) != {"gone"}]
    reachable = [i for i in there if starts[i] < limit and (seam is None or i <= seam or seam in there)]
    assert len(hops) >= max(reachable, default=-1) + 1, "the walk ended too early"


# When they are worth reading

TEN = [Option(count, 100 * count, (count * 10**6,)) for count in range(1, 11)]


def policy(bytes_per_second: float | None = None, tokens_per_second: float | None = None) -> FetchPolicy:
    made = FetchPolicy()
    if bytes_per_second:
        made.note_fetched(10**7, 10**7 / bytes_per_second)
    if tokens_per_second:
        made.note_computed(1000, 1000 / tokens_per_second)
    return made


def test_the_quicker_one_is_chosen():
    """100 tokens or a megabyte: at 1 MB/s and 100 tokens/s both take a second."""
    assert policy(10**6, 99).choose(TEN) == (TEN[-1], False)
    assert policy(10**6, 101).choose(TEN) is None
    assert policy(10**6, 50).choose([Option(1, 100, (10**6,)), Option(2, 110, (3 * 10**6,))]).option.num_hops == 1


def test_a_first_estimate_comes_from_trying_a_little():
    choice = policy(None, 100).choose(TEN)
    assert choice.is_trial
    assert choice.option == TEN[3]
    assert choice.option.num_bytes[0] <= TRIAL_BYTES < TEN[4].num_bytes[0]
    assert policy(None, 100).choose([Option(1, 9, (10**9,)), Option(2, 10, (10**8,))]).option.num_bytes == (10**8,)
    assert policy(10**6, None).choose(TEN) == (TEN[-1], False), "nothing is known of computing"


def test_what_was_slow_is_tried_again_now_and_then():
    slow = policy(10**5, 10**4)
    for _ in range(2):
        assert [slow.choose(TEN) for _ in range(TRIAL_EVERY)] == [None] * TRIAL_EVERY
        assert slow.choose(TEN).is_trial
        slow.note_fetched(10**6, 10)
    for _ in range(TRIAL_EVERY):
        slow.choose(TEN)
    for _ in range(60):
        slow.note_fetched(10**8, 0.01)  # the disk has become quick
    assert slow.choose(TEN) == (TEN[-1], False)


def test_tiers_are_weighed_by_their_own_speeds():
    """The first five are near, the others far: these are read only where that is quicker, too."""
    mixed = [Option(count, 100 * count, (min(count, 5) * 10**6, max(0, count - 5) * 10**6)) for count in range(1, 11)]
    for far, expected in ((10**5, 5), (10**7, 10)):
        made = policy(10**7, 500)
        made.note_fetched(10**6, 10**6 / far, level=1)
        assert made.choose(mixed).option.num_hops == expected
    assert [made.bytes_per_second(level) for level in range(2)] == [pytest.approx(10**7)] * 2


def test_each_tier_is_tried_by_itself():
    mixed = [Option(count, 100 * count, (min(count, 5) * 10**6, max(0, count - 5) * 10**6)) for count in range(1, 11)]
    made = policy(10**7, 500)
    choice = made.choose(mixed)
    assert choice.is_trial
    assert choice.option.num_hops == 9, "four megabytes from the far one"
    made.note_fetched(4 * 10**6, 400, level=1)
    for _ in range(TRIAL_EVERY):
        assert made.choose(mixed) == (mixed[4], False)
        made.note_fetched(5 * 10**6, 0.5)
    assert made.choose(mixed).is_trial, "which the near one's being read does not put off"


def test_passes_over_few_tokens_do_not_count():
    made = policy(10**6, 1000)
    for _ in range(50):
        made.note_computed(2, 1.0)
    assert made.tokens_computed.per_second == pytest.approx(1000)


# Folders


def test_folders_in_one_place_are_apart_and_go_alone(tmp_path):
    first, second = RecordFolder(tmp_path, [8]), RecordFolder(tmp_path, [8, 16])
    assert len(list(tmp_path.iterdir())) == 2
    first.files[0].write(0, memoryview(b"1" * 8))
    checksum = second.files[0].write(0, memoryview(b"2" * 8))
    into = bytearray(8)
    first.remove()
    assert list(tmp_path.iterdir()) == [second.path]
    assert second.files[0].read(0, memoryview(into), checksum)
    assert into == b"2" * 8
    with pytest.raises(ValueError):
        first.files[0].read(0, memoryview(into), checksum)
    second.remove()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path):
    script = """
import os, pathlib, runpy, signal, sys
RecordFolder = runpy.run_path(sys.argv[3])["RecordFolder"]  # without torch, which takes seconds to import
folder = RecordFolder(pathlib.Path(sys.argv[1]), [8])
print(folder.path, flush=True)
if sys.argv[2] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""
    source = sys.modules[RecordFolder.__module__].__file__
    command = [sys.executable, "-c", script, str(tmp_path)]
    dead = subprocess.run([*command, "die", source], capture_output=True, text=True, check=False)
    assert Path(dead.stdout.strip()).is_dir(), dead.stderr
    with subprocess.Popen(
        [*command, "live", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as alive:
        other = Path(alive.stdout.readline().strip())
        RecordFolder(tmp_path, [8]).remove()
        assert list(tmp_path.iterdir()) == [other], "the dead one's is gone, the living one's is not"
        alive.communicate()


# Giving up blocks


def test_an_interrupt_while_blocks_are_given_up_changes_nothing():
    """Copying a block to disk takes time: it comes before the tables that need its memory are touched."""
    manager = BlockManager(4, 4)
    old, table = manager.new_table(ROOT), manager.new_table()
    for each, count in ((old, 4), (table, 2)):
        manager.append([each], count, tokens=[list(range(count))])
    manager.index_table(old, True)
    manager.free(old)
    twin = manager.fork(table)

    def interrupt(victims):
        assert [block for _, block in victims] == [1]
        raise KeyboardInterrupt

    manager.budget.before_eviction = interrupt
    with pytest.raises(KeyboardInterrupt):
        manager.append([twin], 4)  # takes a copy of the tail and one block more
    assert twin.num_tokens == 2
    assert manager.cached == 1
    manager.check_integrity()
    manager.budget.before_eviction = None
    manager.append([twin], 4)
    assert manager.cached == 0
