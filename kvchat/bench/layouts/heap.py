"""Extents of one arena: best fit, split, joined again. Offsets and sizes only, in any one unit."""

from __future__ import annotations

from bisect import bisect_left, insort


class Heap:
    """Like an allocator of device memory that takes the smallest free extent that is big enough
    (as torch's does), without its rounding: nothing is lost but by fragmentation."""

    def __init__(self, size: int) -> None:
        assert size > 0, f"a heap of {size}"
        self.size = size
        self.num_free = size
        self._used: dict[int, int] = {}  # offset -> length
        self._starts = {0: size}  # free extents: offset -> length
        self._ends = {size: 0}  # end -> offset
        self._by_size = [(size, 0)]  # (length, offset), ascending

    @property
    def largest_free(self) -> int:
        """The longest extent that could be taken now."""
        return self._by_size[-1][0] if self._by_size else 0

    def take(self, length: int) -> int | None:
        """The offset of an extent of this length; None when no free one is long enough."""
        assert length > 0, f"an extent of {length}"
        idx = bisect_left(self._by_size, (length, -1))
        if idx == len(self._by_size):
            return None
        free_length, offset = self._by_size[idx]
        self._remove(offset, free_length)
        if free_length > length:
            self._insert(offset + length, free_length - length)
        self._used[offset] = length
        self.num_free -= length
        return offset

    def give(self, offset: int) -> None:
        """Take an extent back, once, and join it with its free neighbours."""
        length = self._used.pop(offset)
        self.num_free += length
        after = self._starts.get(offset + length)
        if after is not None:
            self._remove(offset + length, after)
            length += after
        before = self._ends.get(offset)
        if before is not None:
            length += offset - before
            self._remove(before, offset - before)
            offset = before
        self._insert(offset, length)

    def check(self) -> None:
        """Assert that extents tile the heap, and that no two free ones touch."""
        free = sorted(self._starts.items())
        at, was_free = 0, False
        for offset, length, is_free in sorted(
            [(o, n, True) for o, n in free] + [(o, n, False) for o, n in self._used.items()]
        ):
            assert offset == at, f"extent at {offset}, the one before ends at {at}"
            assert not (is_free and was_free), f"free extents touch at {offset}"
            at, was_free = offset + length, is_free
        assert at == self.size, f"extents end at {at} of {self.size}"
        assert sorted((n, o) for o, n in free) == self._by_size, f"{free} {self._by_size}"
        assert {o + n: o for o, n in free} == self._ends, f"{free} {self._ends}"
        assert sum(n for _, n in free) == self.num_free, f"{free} {self.num_free}"

    def _insert(self, offset: int, length: int) -> None:
        self._starts[offset] = length
        self._ends[offset + length] = offset
        insort(self._by_size, (length, offset))

    def _remove(self, offset: int, length: int) -> None:
        del self._starts[offset], self._ends[offset + length]
        del self._by_size[bisect_left(self._by_size, (length, offset))]
