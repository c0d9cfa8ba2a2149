"""Records of one size in a file, in a folder that goes with its owner.

Files are read into memory of one's own and not mapped: a mapping of a file that somebody truncates, or that lies on a
failing disk, ends the process (SIGBUS) instead of telling it, counts as memory of the process, and can change between
the check of a checksum and the use of what was checked. Reading what the system has cached takes 0.08 ms a megabyte.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

_PREFIX, _UNFINISHED, _LOCK = "hf_paged-", ".hf_paged-", "lock"


class RecordFile:
    """A file of records of `record_bytes` bytes each, one a slot. Nothing it holds is believed without a checksum."""

    def __init__(self, path: Path, record_bytes: int):
        self.record_bytes = record_bytes
        self._file = path.open("x+b", buffering=0)

    def write(self, slot: int, content: memoryview) -> int:
        """Write one record whole and return its checksum. Raises `OSError`."""
        at, rest = slot * self.record_bytes, content
        while rest:
            done = os.pwrite(self._file.fileno(), rest, at)
            at, rest = at + done, rest[done:]
        return zlib.crc32(content)

    def prefetch(self, slot: int) -> None:
        """A record is about to be read: the system may begin."""
        if hasattr(os, "posix_fadvise"):
            at = slot * self.record_bytes
            os.posix_fadvise(self._file.fileno(), at, self.record_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, slot: int, into: memoryview, checksum: int) -> bool:
        """Read one record; whether it is what was written. Raises `OSError`."""
        at, rest = slot * self.record_bytes, into
        while rest:
            done = os.preadv(self._file.fileno(), [rest], at)
            if done == 0:  # the file is shorter than it was
                return False
            at, rest = at + done, rest[done:]
        return zlib.crc32(into) == checksum

    def truncate(self) -> None:
        """Give the file's room on the disk back. Raises `OSError`."""
        os.ftruncate(self._file.fileno(), 0)

    def close(self) -> None:
        """No more reading or writing; raises `ValueError` from then on."""
        self._file.close()


class RecordFolder:
    """A folder inside `base` with a file of records for each group, for this process alone.

    It holds a lock as long as it lives, so that one which a process that was killed has left behind can be told from
    one in use: the next folder made in the same place removes it.
    """

    def __init__(self, base: Path | None, record_bytes: Sequence[int]):
        base = Path(tempfile.gettempdir() if base is None else base)
        base.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(base)
        self._owner = os.getpid()
        path = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=base))
        self.files: list[RecordFile] = []
        try:
            self._lock = (path / _LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # Only now may others take it for one that has an owner or has lost it.
            self.path = path.rename(path.with_name(_PREFIX + path.name.removeprefix(_UNFINISHED)))
            for group, size in enumerate(record_bytes):
                self.files.append(RecordFile(self.path / f"group-{group}.kv", size))
        except BaseException:
            for leftover in (path, path.with_name(_PREFIX + path.name.removeprefix(_UNFINISHED))):
                shutil.rmtree(leftover, ignore_errors=True)
            raise

    @property
    def is_own(self) -> bool:
        """Whether this process has made it, and not the one that it was forked from."""
        return os.getpid() == self._owner

    def remove(self) -> None:
        """Close and delete everything; a process that was forked from the owner leaves it where it is."""
        for file in self.files:
            file.close()
        if self.is_own:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned(base: Path) -> None:
    """Remove the folders whose owners have died without doing it."""
    for path in base.glob(_PREFIX + "*"):
        try:
            with (path / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # in use, going away, or not one of ours
            continue
