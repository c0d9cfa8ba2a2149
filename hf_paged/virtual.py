"""Address space of which pieces get memory on demand and give it back: nothing that is in use moves.

Devices hand memory out in pages of some megabytes. Pieces need not begin or end with one: a page is there as long as a
piece reaches into it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch


class Driver(Protocol):
    """What a device's driver does. Addresses and sizes are whole pages, in bytes.

    Attributes:
        page_bytes: memory comes in multiples of it.
    """

    page_bytes: int

    def reserve(self, num_bytes: int) -> int:
        """Address space without memory. Raises `RefusedMemoryError`."""

    def back(self, address: int, num_bytes: int) -> int:
        """Memory for a part of it, with any content; returns its handle. Raises `RefusedMemoryError`."""

    def unback(self, address: int, num_bytes: int, handle: int) -> None:
        """Give that memory back."""

    def free(self, address: int, num_bytes: int) -> None:
        """Give back address space in which no memory is left."""

    def tensor(self, space: AddressSpace) -> torch.Tensor:
        """The space as bytes `[num_bytes]`, which keeps it alive; some of it has memory."""

    def wait(self) -> bool:
        """Wait for all that the device was asked to do; returns whether that is possible now."""


@dataclass(eq=False, slots=True)
class _Backing:
    """Adjacent pages that were given memory together.

    Attributes:
        pieces: how many pieces reach into them.
    """

    first_page: int
    num_pages: int
    handle: int
    pieces: int = 0


class AddressSpace:
    """Reserved addresses on a device. When nobody needs the object any more, all of it is given back.

    Args:
        driver: of the device.
        num_bytes: at least so many.

    Attributes:
        address: where it begins.
        num_bytes: in whole pages.

    Raises `RefusedMemoryError`.
    """

    def __init__(self, driver: Driver, num_bytes: int):
        page = driver.page_bytes
        self._driver = driver
        self.num_bytes = -(-num_bytes // page) * page
        self.address = driver.reserve(self.num_bytes)
        self._pages: dict[int, _Backing] = {}
        self._pieces: dict[Hashable, list[_Backing]] = {}
        finalizer = weakref.finalize(self, _bury, driver, self.address, self.num_bytes, self._pages)
        finalizer.atexit = False  # the process takes its memory along

    @property
    def backed_bytes(self) -> int:
        """Memory that is there."""
        return len(self._pages) * self._driver.page_bytes

    def back(self, key: Hashable, start: int, stop: int) -> None:
        """Have memory from byte `start` to `stop`, until `give_back(key)`; what is there already keeps its content.

        Raises `RefusedMemoryError` and changes nothing.
        """
        page_bytes = self._driver.page_bytes
        page, stop_page = start // page_bytes, -(-stop // page_bytes)
        # Pages that neighbours may reach into come by themselves, so that these do not hold the others.
        ends = {page + (start % page_bytes > 0), stop // page_bytes, stop_page}
        touched: list[_Backing] = []
        try:
            while page < stop_page:
                backing = self._pages.get(page)
                if backing is None:
                    end = next(at for at in range(page + 1, stop_page + 1) if at in ends or at in self._pages)
                    backing = self._back_pages(page, end - page)
                backing.pieces += 1
                touched.append(backing)
                page = backing.first_page + backing.num_pages
        except BaseException:
            self._let_go(touched)
            raise
        self._pieces[key] = touched

    def give_back(self, *keys: Hashable) -> None:
        """Pieces are not needed any more; memory that no other one reaches into goes."""
        self._let_go([backing for key in keys for backing in self._pieces.pop(key)])

    def _back_pages(self, first_page: int, num_pages: int) -> _Backing:
        _bury_the_dead()
        page_bytes = self._driver.page_bytes
        handle = self._driver.back(self.address + first_page * page_bytes, num_pages * page_bytes)
        backing = _Backing(first_page, num_pages, handle)
        self._pages.update(dict.fromkeys(range(first_page, first_page + num_pages), backing))
        return backing

    def _let_go(self, backings: list[_Backing]) -> None:
        for backing in backings:
            backing.pieces -= 1
        gone = {backing for backing in backings if backing.pieces == 0}
        if not gone or not self._driver.wait():  # then they stay for whoever needs these pages next
            return
        for backing in gone:
            _unback(self._driver, self.address, backing)
            for page in range(backing.first_page, backing.first_page + backing.num_pages):
                del self._pages[page]


def _unback(driver: Driver, address: int, backing: _Backing) -> None:
    page_bytes = driver.page_bytes
    driver.unback(address + backing.first_page * page_bytes, backing.num_pages * page_bytes, backing.handle)


# Address spaces that nobody needs any more, and that could not be given back at once.
_dead: deque[tuple[Driver, int, int, dict[int, _Backing]]] = deque()


def _bury(driver: Driver, address: int, num_bytes: int, pages: dict[int, _Backing]) -> None:
    _dead.append((driver, address, num_bytes, pages))
    _bury_the_dead()


def _bury_the_dead() -> None:
    """Give back address spaces, once nothing reads them. A finalizer may run while a device cannot be waited for."""
    while True:
        try:
            driver, address, num_bytes, pages = _dead.popleft()
        except IndexError:  # also where another thread was quicker
            return
        if not driver.wait():
            _dead.append((driver, address, num_bytes, pages))
            return
        for backing in set(pages.values()):
            _unback(driver, address, backing)
        driver.free(address, num_bytes)
