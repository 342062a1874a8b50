"""Where every byte is, counted anew: blocks on the pool's map and again in the chats' tables, bytes
on the tensors. No torch; what the tensors take, the runner counts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from kvchat.engine.device import GpuBytes
from kvchat.engine.scheduler import Scheduler
from kvchat.engine.workspace import CUBLAS_BYTES
from kvchat.kv.layout import Codec, unpack_entry
from kvchat.kv.planner import resident_memory

# By whether it is on a GPU.
_SCRATCH = ("attention: RoPE tables, last step's plan", "attention, RoPE and block tables, logits")


class TensorBytes(NamedTuple):
    """What the allocator has given out, not what was asked of it. One block takes block_payload
    and block_side bytes; of these a block of each codec uses side_used."""

    num_blocks: int
    payload: int
    side: int
    block_payload: int
    block_side: int
    side_used: tuple[int, ...]
    weights: int
    scratch: int  # what steps keep: RoPE tables, plans; on a GPU tables and logits, too
    host: int  # places for parked blocks in main memory
    gpu: GpuBytes | None = None  # where the tensors are on one


class Entry(NamedTuple):
    """A line of the ledger."""

    part: str
    what: str
    num_blocks: int | None  # None: not blocks
    num_bytes: int


class Ledger(NamedTuple):
    """The entries of a part make up `totals[part]`, which was counted in another way; problems are
    sentences about what does not."""

    entries: tuple[Entry, ...]
    totals: dict[str, int]
    problems: tuple[str, ...]
    resident: int | None  # bytes of main memory that the process has
    gpu: GpuBytes | None = None


def read_ledger(scheduler: Scheduler, tensors: TensorBytes) -> Ledger:
    """The ledger as it is between two steps."""
    pool = scheduler.pool
    states = pool.map()
    held, cached = Counter[Codec](), Counter[Codec]()
    for block_id, state in enumerate(states):
        if state == "cached":
            cached[pool.codec(block_id)] += 1
        elif isinstance(state, int):
            held[pool.codec(block_id)] += 1
    entries = (
        *_payload(held, cached, Counter(states), tensors),
        *_side(held + cached, len(states), tensors),
        _tables(scheduler),
        Entry("scratch", _SCRATCH[tensors.gpu is not None], None, tensors.scratch),
        Entry("weights", "the model", None, tensors.weights),
        *_host(scheduler, tensors),
        *_gpu(tensors),
    )
    totals = {"payload": tensors.payload, "side arrays": tensors.side, "host": tensors.host}
    problems = (
        *_wrong_sums(entries, totals),
        *_wrong_blocks(scheduler, states, held, tensors),
        *_wrong_gpu(tensors),
    )
    return Ledger(entries, totals, problems, resident_memory(), tensors.gpu)


def _payload(
    held: Counter[Codec], cached: Counter[Codec], states: Counter[object], tensors: TensorBytes
) -> Iterator[Entry]:
    kinds = [
        *((f"{codec.label}, held", held[codec]) for codec in sorted(held)),
        *((f"{codec.label}, cached", cached[codec]) for codec in sorted(cached)),
        ("free", states["free"]),
        ("null block", states["null"]),
    ]
    for what, num_blocks in kinds:
        yield Entry("payload", what, num_blocks, num_blocks * tensors.block_payload)


def _side(full: Counter[Codec], num_blocks: int, tensors: TensorBytes) -> Iterator[Entry]:
    """Used by the blocks that hold tokens, and the rest of what is reserved for every block."""
    if not tensors.side:
        return
    num_used = 0
    for codec in sorted(codec for codec in full if codec != Codec.NATIVE):
        used = full[codec] * tensors.side_used[codec]
        num_used += used
        yield Entry("side arrays", f"scales and zeros of {codec.label}", full[codec], used)
    rest = num_blocks * tensors.block_side - num_used
    yield Entry("side arrays", "reserved, not used", None, rest)


def _host(scheduler: Scheduler, tensors: TensorBytes) -> Iterator[Entry]:
    arena, block_bytes = scheduler.arena, tensors.block_payload + tensors.block_side
    num_used = arena.num_slots - arena.num_free
    yield Entry("host", "parked blocks", num_used, num_used * block_bytes)
    if arena.num_slots:
        yield Entry("host", "free places", arena.num_free, arena.num_free * block_bytes)


def _gpu(tensors: TensorBytes) -> Iterator[Entry]:
    """All that is in use of a GPU beside the rows above."""
    gpu = tensors.gpu
    if gpu is None:
        return
    rest = gpu.allocated - _named_bytes(tensors)
    yield Entry("torch", "given out beside these: cuBLAS, rounding", None, rest)
    yield Entry("torch", "kept: graphs, for the next steps", None, gpu.reserved - gpu.allocated)
    yield Entry("CuPy", "its pool", None, gpu.cupy)
    others = gpu.used - gpu.reserved - gpu.cupy
    yield Entry("CUDA", "context, kernels, other programs", None, others)


def _named_bytes(tensors: TensorBytes) -> int:
    return tensors.payload + tensors.side + tensors.scratch + tensors.weights


def _wrong_gpu(tensors: TensorBytes) -> Iterator[str]:
    """What torch has given out against what is known of: up to 1 % may be unknown, and what torch
    gives to cuBLAS."""
    if tensors.gpu is None:
        return
    named, allocated = _named_bytes(tensors), tensors.gpu.allocated
    if not named <= allocated <= 1.01 * named + CUBLAS_BYTES:
        yield f"GPU: {named:,} bytes are known of, torch has given out {allocated:,}"


def _tables(scheduler: Scheduler) -> Entry:
    """Python's lists and the numbers in them, which may be the same objects in several lists."""
    tables = [seq.table for _, seq, _ in scheduler.sequences()]
    numbers = {id(entry): entry for table in tables for entry in table}
    size = sum(map(sys.getsizeof, tables)) + sum(map(sys.getsizeof, numbers.values()))
    what = f"{sum(map(len, tables)):,} entries in Python's lists"
    return Entry("block tables", what, None, size)


def _wrong_sums(entries: tuple[Entry, ...], totals: dict[str, int]) -> Iterator[str]:
    for part, total in totals.items():
        counted = sum(entry.num_bytes for entry in entries if entry.part == part)
        if counted != total:
            yield f"{part}: {counted:,} bytes in blocks, the tensor has {total:,}"


def _wrong_blocks(
    scheduler: Scheduler, states: list, held: Counter[Codec], tensors: TensorBytes
) -> Iterator[str]:
    """The chats' tables against the pool's map: codecs, and references to each block."""
    num_refs, codecs = Counter[int](), dict[int, Codec]()
    for _, seq, _ in scheduler.sequences():
        named = {unpack_entry(entry)[:2] for entry in seq.table}
        num_refs.update(block_id for block_id, _ in named)
        codecs.update(named)
    if len(states) != tensors.num_blocks:
        yield f"the map has {len(states):,} blocks, the tensor {tensors.num_blocks:,}"
    if Counter(codecs.values()) != held:
        yield f"held by the map: {_told(held)}; in tables: {_told(Counter(codecs.values()))}"
    wrong = [i for i, n in enumerate(states) if (n if isinstance(n, int) else 0) != num_refs[i]]
    if wrong:
        yield f"references to {len(wrong):,} blocks are not those in the tables: {wrong[:5]}"


def _told(counts: Counter[Codec]) -> str:
    return ", ".join(f"{counts[codec]:,} {codec.label}" for codec in sorted(counts)) or "none"
