"""How much memory the pool may take: arithmetic on bytes and blocks, no tensors."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvchat.errors import CapacityError, UsageError, quoted
from kvchat.kv.layout import BlockLayout

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_CPU_POOL_LIMIT = 4 * 2**30
_CPU_POOL_SHARE = 0.40
# A pool of fewer blocks could not hold one short chat beside the null block.
_MIN_BLOCKS = 5
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


def plan_num_blocks(layout: BlockLayout, kv_mem: str | None, available: int) -> int:
    """Blocks of the pool, the null block included, their side pieces counted.

    `kv_mem` is the user's size or share; None means the smaller of 4 GiB and 40 % of what is
    available. Raises CapacityError when that is more than there is, or too little for one chat.
    """
    wanted = min(_CPU_POOL_LIMIT, int(available * _CPU_POOL_SHARE))
    if kv_mem is not None:
        wanted = parse_size(kv_mem, available)
    if wanted > available:
        raise CapacityError(
            f"the KV pool wants {format_size(wanted)} but {format_size(available)} are available; "
            f"lower --kv-mem"
        )
    num_blocks = wanted // layout.bytes_per_block
    if num_blocks < _MIN_BLOCKS:
        least = format_size(_MIN_BLOCKS * layout.bytes_per_block)
        raise CapacityError(
            f"a KV pool of {format_size(wanted)} holds {num_blocks} blocks of "
            f"{format_size(layout.bytes_per_block)}; raise --kv-mem to at least {least}"
        )
    return num_blocks


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
