"""The rows that decode: which request has which, and the tensors that a captured step reads.

Block tables stay on the device: a step sends the entries that are new, and of a row that has got
another table, or one that was compressed, all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvchat.attention.cuda import RowTensors
from kvchat.engine.device_sampler import NUM_DRAW_FIELDS
from kvchat.engine.request import Row
from kvchat.engine.step_buffer import StepBuffer
from kvchat.kv.block_pool import Sequence
from kvchat.kv.host_memory import send

KNOWN = -1  # in place of a source: the host knows the token
_MIN_UPDATES = 64  # entries that a step sends beside whole tables


@dataclass(slots=True)
class _Held:
    """What the device has of a row's table."""

    request_id: int
    seq: Sequence | None = None
    entries: list[int] = field(default_factory=list)


class DecodeRows:
    """Up to max_rows rows, their tables of up to max_entries entries of block_size positions."""

    def __init__(
        self, max_rows: int, max_entries: int, block_size: int, device: torch.device | str
    ) -> None:
        self.max_rows = max_rows
        self._block_size = block_size
        self._num_updates = max(_MIN_UPDATES, 2 * max_rows)
        rows = (max_rows,)
        self._buffer = StepBuffer(
            {
                "update_at": ("int64", (self._num_updates,)),
                "draws": ("float64", (max_rows, NUM_DRAW_FIELDS)),
                "sources": ("int64", rows),
                "given": ("int64", rows),
                "update_entries": ("int32", (self._num_updates,)),
                "positions": ("int32", rows),
                "slots": ("int32", rows),
                "seq_lens": ("int32", rows),
            },
            device,
        )
        # An entry more, which updates that are none go to.
        self._entries = torch.zeros(max_rows * max_entries + 1, dtype=torch.int32, device=device)
        self._tables = self._entries[:-1].view(max_rows, max_entries)
        sent = self._buffer.tensors
        self.tensors = RowTensors(sent["positions"], sent["slots"], sent["seq_lens"], self._tables)
        self.draws = sent["draws"]  # float64 [max_rows, NUM_DRAW_FIELDS]
        self._held: list[_Held] = []  # by row
        self._row_of: dict[int, int] = {}  # by request id
        self._has_new_entries = False  # somewhere before a table's end

    def note_compression(self) -> None:
        """Entries of some tables were replaced."""
        self._has_new_entries = True

    def assign(self, rows: list[Row]) -> list[int]:
        """A place in [0, len(rows)) for each; who was there in the step before mostly stays."""
        wanted = {row.request.request_id for row in rows}
        for request_id in [held for held in self._row_of if held not in wanted]:
            self._remove(request_id)
        for row in rows:
            if row.request.request_id not in self._row_of:
                self._row_of[row.request.request_id] = len(self._held)
                self._held.append(_Held(row.request.request_id))
        return [self._row_of[row.request.request_id] for row in rows]

    def fill(self, rows: list[Row], places: list[int], sources: list[int], num_padded: int) -> dict:
        """What a step reads but its draws: those are the caller's to fill in the arrays returned,
        before `send`.

        sources: by row, where its token stands in what `receive` is given, or KNOWN.
        """
        arrays = self._buffer.begin()
        num_rows, block_size = len(rows), self._block_size
        for name in ("positions", "slots", "seq_lens", "given"):
            arrays[name][num_rows:num_padded] = 0
        arrays["sources"][num_rows:num_padded] = KNOWN
        starts, slots, given = [], [], []
        for row, source in zip(rows, sources, strict=True):
            start = row.start
            starts.append(start)
            slots.append(row.table[start // block_size] * block_size + start % block_size)
            given.append(row.request.token_ids[start] if source == KNOWN else 0)
        at = np.array(places)
        arrays["positions"][at] = starts
        arrays["seq_lens"][at] = np.array(starts) + 1
        arrays["slots"][at] = slots
        arrays["given"][at] = given
        arrays["sources"][at] = sources
        self._update_tables(rows, places, arrays)
        return arrays

    def send(self) -> None:
        """Queue the copy to the device."""
        self._buffer.send()

    def receive(self, num_rows: int, sampled: Tensor) -> Tensor:
        """On the device, and so captured: bring the tables up to date; the rows' token ids.

        sampled: int64, of the step before. Returns int64 [num_rows].
        """
        sent = self._buffer.tensors
        self._entries.scatter_(0, sent["update_at"], sent["update_entries"])
        sources = sent["sources"][:num_rows]
        pending = sampled[sources.clamp(min=0)]
        # A row whose logits were not finite ends at the next update: its token does not matter.
        return torch.where(sources == KNOWN, sent["given"][:num_rows], pending).clamp(min=0)

    def _remove(self, request_id: int) -> None:
        """The last row takes its place."""
        row, last = self._row_of.pop(request_id), self._held.pop()
        if last.request_id != request_id:
            self._held[row] = _Held(last.request_id)
            self._row_of[last.request_id] = row

    def _update_tables(
        self, rows: list[Row], places: list[int], arrays: dict[str, np.ndarray]
    ) -> None:
        at: list[int] = []
        entries: list[int] = []
        width = self._tables.shape[1]
        for row, place in zip(rows, places, strict=True):
            held, table = self._held[place], row.table
            first = self._first_new(held, row.request.seq, table)
            if first == len(table):
                continue
            new = table[first:]
            if first and len(at) + len(new) <= self._num_updates:
                at += range(place * width + first, place * width + first + len(new))
                entries += new
                held.entries[first:] = new
            else:
                held.seq, held.entries = row.request.seq, [*table]
                sent = send(table, torch.int32, self._tables.device)
                self._tables[place, : len(table)] = sent
        self._has_new_entries = False
        arrays["update_at"][: len(at)] = at
        arrays["update_at"][len(at) :] = self._entries.numel() - 1
        arrays["update_entries"][: len(at)] = entries

    def _first_new(self, held: _Held, seq: Sequence | None, table: list[int]) -> int:
        """The first entry that the device has not; 0: it has to get the whole table."""
        num_known = len(held.entries)
        if seq is not held.seq or len(table) < num_known:
            return 0
        if self._has_new_entries and table[: num_known - 1] != held.entries[:-1]:
            return 0
        # A shared tail that is written to becomes a copy of it.
        return num_known - (table[num_known - 1] != held.entries[-1])
