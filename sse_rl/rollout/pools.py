"""Which state slots and which KV pages are free. Number 0 of both is scratch, never handed out."""

from __future__ import annotations


class SlotPool:
    """State slots 1..size-1, each with one owner."""

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give(self, slot: int) -> None:
        assert slot > 0 and slot not in self._free, f"slot {slot} is free already"
        self._free.append(slot)


class PagePool:
    """KV pages 1..size-1, each with as many owners as sequences that read it."""

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, 0, -1))
        self._owners = [0] * size

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """One more owner for each of these pages."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} has no owner to share it"
            self._owners[page] += 1
        return list(pages)

    def give(self, pages: list[int]) -> None:
        """One owner less; a page without one is free."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free already"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
