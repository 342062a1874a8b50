"""Whether a model fits a GPU's memory, and how large steps may be. Arithmetic only, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvchat.config import DTYPE_BYTES, KVPolicy, ModelConfig
from kvchat.engine.workspace import StepCaps, cuda_workspace
from kvchat.errors import CapacityError
from kvchat.kv.layout import BlockLayout
from kvchat.kv.planner import MIN_BLOCKS, format_size
from kvchat.model.families import auto_dtype
from kvchat.model.sizes import num_values, weight_bytes

CPU_STEP = (512, 256)  # tokens and rows of a step where nobody chose
# The same on a GPU, from large to small: the first whose workspace leaves most of the memory to
# the pool.
GPU_STEPS = ((2048, 256), (2048, 64), (1024, 32), (512, 16))
_WORKSPACE_SHARE = 1 / 8


def step_sizes(
    config: ModelConfig,
    layout: BlockLayout,
    asked: tuple[int | None, int | None],
    weights: str,
    free: int,
) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) on a GPU with so much free beside the weights; what
    was asked for is given."""
    num_tokens, num_rows = asked
    for default in GPU_STEPS:
        sizes = num_tokens or default[0], num_rows or default[1]
        needed = cuda_workspace(config, layout, StepCaps(*sizes, _least_len(layout)), weights).total
        if needed <= free * _WORKSPACE_SHARE:
            break
    return sizes


def free_for_pool(
    config: ModelConfig, layout: BlockLayout, kv: KVPolicy, caps: StepCaps, weights: str, free: int
) -> int:
    """Of `free` bytes beside the weights, those that steps leave. A sequence is at most as long as
    caps says, and as all of them would hold."""
    longest = kv.max_tokens(free // layout.bytes_per_block, layout.spec.block_size)
    caps = replace(caps, max_len=max(1, min(caps.max_len, longest)))
    return max(0, free - cuda_workspace(config, layout, caps, weights).total)


def check_fits(
    config: ModelConfig,
    layout: BlockLayout,
    sizes: tuple[int, int],
    weights: str,
    free: int,
    main_memory: int,
) -> None:
    """CapacityError when weights, workspace and the least pool are more than a GPU's free bytes;
    it names what would do, each worked out in the same way."""
    parts = _parts(config, layout, sizes, weights)
    if sum(parts) <= free:
        return
    dtype = layout.spec.dtype
    form = "int8" if weights == "int8" else dtype
    found = ", or ".join(_ways_out(config, layout, sizes, weights, free, main_memory))
    names = [
        f"{format_size(part)} for {what}" for part, what in zip(parts[1:], _PARTS, strict=True)
    ]
    raise CapacityError(
        f"the weights need {format_size(parts[0])} as {form}, beside {' and '.join(names)};"
        f" {format_size(free)} of GPU memory are free: use {found or 'a smaller model'}"
    )


_PARTS = ("steps", "the smallest KV pool")


def _parts(
    config: ModelConfig, layout: BlockLayout, sizes: tuple[int, int], weights: str
) -> tuple[int, int, int]:
    workspace = cuda_workspace(config, layout, StepCaps(*sizes, _least_len(layout)), weights)
    dtype = layout.spec.dtype
    pool = MIN_BLOCKS * layout.bytes_per_block
    return weight_bytes(config, dtype, weights), workspace.total, pool


def _least_len(layout: BlockLayout) -> int:
    return MIN_BLOCKS * layout.spec.block_size


def _ways_out(
    config: ModelConfig,
    layout: BlockLayout,
    sizes: tuple[int, int],
    weights: str,
    free: int,
    main_memory: int,
) -> Iterator[str]:
    smallest = min(sizes[0], GPU_STEPS[-1][0]), min(sizes[1], GPU_STEPS[-1][1])
    steps = f"-b {smallest[0]} -np {smallest[1]}"
    for flags, other_sizes, other in (
        (steps, smallest, weights),
        ("--weights int8", sizes, "int8"),
        (f"--weights int8 {steps}", smallest, "int8"),
    ):
        is_new = (other_sizes, other) != (sizes, weights)
        needed = sum(_parts(config, layout, other_sizes, other))
        if is_new and needed <= free:
            yield f"{flags} ({format_size(needed)} in all)"
            break
    dtype = auto_dtype(num_values(config), config.checkpoint_dtype, "cpu", main_memory)
    needed = num_values(config) * DTYPE_BYTES[dtype]
    if needed <= main_memory:
        yield f"--device cpu ({format_size(needed)} of main memory as {dtype})"
