"""How much memory the pool may take: arithmetic on bytes and blocks, no tensors."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvchat.errors import CapacityError, UsageError, quoted
from kvchat.kv.layout import BLOCK_ID_BITS, BlockLayout

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_CPU_POOL_LIMIT = 4 * 2**30
_CPU_POOL_SHARE = 0.40
_GPU_POOL_SHARE = 0.85  # of what is free beside weights and workspace
# A pool of fewer blocks could not hold one short chat beside the null block.
MIN_BLOCKS = 5
MAX_BLOCKS = 1 << BLOCK_ID_BITS
_MAX_BYTES = 2**60


def parse_size(text: str, total: int) -> int:
    """Bytes meant by `2GiB`, `512M`, `1e9` or `70%` (of `total` bytes)."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(%|[kmgt]?(?:i?b)?)\s*", text.lower())
    try:
        number = float(found.group(1)) if found else -1.0
    except ValueError:
        number = -1.0
    unit = found.group(2) if found else ""
    num_bytes = number * (total / 100 if unit == "%" else _UNITS[unit.rstrip("ib")])
    if not 0 < num_bytes < _MAX_BYTES:
        raise UsageError(
            f"memory size {quoted(text)} is not understood; write it as 2GiB, 512MiB or 70%"
        )
    return int(num_bytes)


def format_size(num_bytes: float) -> str:
    """`num_bytes` for a person: 512 B, 1.5 MiB, 4.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory this process may still take, a cgroup's limit included.

    Pages of files count as available, as in MemAvailable: a model just read or fetched fills them.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        available = kib * 1024
    except (OSError, StopIteration):  # macOS has no such file; half of all is a careful guess
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        given_back = int(stat["inactive_file"]) + int(stat["active_file"])
    except (OSError, ValueError, KeyError):  # no cgroup, or "max"
        return available
    return max(0, min(available, limit - used + given_back))


def resident_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process has now; None where the system does not say."""
    try:
        num_pages = int((root / "proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def plan_num_blocks(
    layout: BlockLayout, kv_mem: str | None, available: int, device: str = "cpu"
) -> int:
    """Blocks of the pool, the null block included, their side pieces counted.

    `kv_mem` is the user's size or share of what is available; None means 85 % of it on a GPU,
    where nobody else needs it, else the smaller of 4 GiB and 40 %. Raises CapacityError when that
    is more than there is, or than blocks have numbers, or too little for one chat.
    """
    block = layout.bytes_per_block
    wanted = default_pool(available, device)
    if kv_mem is not None:
        wanted = parse_size(kv_mem, available)
    else:
        wanted = min(wanted, MAX_BLOCKS * block)
    if wanted > available:
        raise CapacityError(
            f"the KV pool wants {format_size(wanted)} but {format_size(available)} are available; "
            f"lower --kv-mem"
        )
    num_blocks = wanted // block
    if num_blocks < MIN_BLOCKS:
        least = format_size(MIN_BLOCKS * block)
        raise CapacityError(
            f"a KV pool of {format_size(wanted)} holds {num_blocks} blocks of "
            f"{format_size(block)}; raise --kv-mem to at least {least}"
        )
    if num_blocks > MAX_BLOCKS:
        raise CapacityError(
            f"a KV pool of {format_size(wanted)} has {num_blocks:,} blocks of {format_size(block)},"
            f" and {MAX_BLOCKS:,} can be told apart; lower --kv-mem to {MAX_BLOCKS * block}"
        )
    return num_blocks


def default_pool(available: int, device: str) -> int:
    """Bytes of the pool where nobody chose."""
    if device != "cpu":
        return int(available * _GPU_POOL_SHARE)
    return min(_CPU_POOL_LIMIT, int(available * _CPU_POOL_SHARE))


def plan_host_slots(layout: BlockLayout, host_mem: str | None, available: int) -> int:
    """Blocks that may be parked in `host_mem`, a size or share of main memory; None means none.

    Raises CapacityError when that is more than there is, or too little for one block.
    """
    if host_mem is None:
        return 0
    wanted = parse_size(host_mem, available)
    if wanted > available:
        raise CapacityError(
            f"--host-mem wants {format_size(wanted)} but {format_size(available)} are available;"
            " lower it"
        )
    num_slots = wanted // layout.bytes_per_block
    if not num_slots:
        raise CapacityError(
            f"--host-mem {host_mem} holds no block of {format_size(layout.bytes_per_block)};"
            " raise it"
        )
    return num_slots
