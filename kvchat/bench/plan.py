"""What fits: bytes of weights, workspace and KV pool for sessions of a length. Arithmetic only.

From config.json and the safetensors header, or a well-known shape: no weights, no GPU, no torch.
The bytes of blocks are BlockLayout's, so that a plan and a pool cannot differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from kvchat.bench.shapes import find_shape
from kvchat.config import DTYPE_BYTES, KVPolicy, KVSpec, ModelConfig
from kvchat.engine.fit import CPU_STEP, step_sizes
from kvchat.engine.workspace import StepCaps, cuda_workspace
from kvchat.errors import UsageError, quoted
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.model.families import auto_dtype, check_tensors, parse_config
from kvchat.model.sizes import num_values, weight_bytes
from kvchat.model.source import resolve

MATRIX_SESSIONS = (1, 2, 4, 8, 16, 32, 64)
# What a process holds on a GPU before its first tensor: context, loaded modules, cuBLAS. An
# allowance, not a measurement: it differs by card and driver (300 to 600 MiB are usual).
CUDA_CONTEXT_BYTES = 512 * 2**20
_MIN_MATRIX_CONTEXT = 1024
_MAX_MATRIX_CONTEXTS = 7
_FLOAT32 = DTYPE_BYTES["float32"]


@dataclass(frozen=True)
class PlanModel:
    """What a plan knows of a model."""

    name: str
    config: ModelConfig
    num_values: int  # weights that a running model holds, a tied matrix once
    stored_bytes: dict[str, int] | None  # in its files, by dtype; None for a shape


@dataclass(frozen=True)
class Ask:
    """What should fit, and where."""

    num_sessions: int
    context: int  # tokens of each session
    mem: int  # bytes for everything
    mode: Codec = Codec.NATIVE
    dtype: str = "float16"
    device: str = "cpu"  # or cuda
    block_size: int = 16
    weights: str = "auto"  # or int8


@dataclass(frozen=True)
class Plan:
    """The bytes of an Ask, item by item."""

    ask: Ask
    weights: int
    workspace: int
    logits: int
    cuda_context: int
    num_blocks: int  # of the pool, the null block included
    pool: int

    @property
    def fixed(self) -> int:
        """All but the pool."""
        return self.weights + self.workspace + self.logits + self.cuda_context

    @property
    def total(self) -> int:
        """All bytes."""
        return self.fixed + self.pool

    @property
    def fits(self) -> bool:
        """Whether that is within the memory given."""
        return self.total <= self.ask.mem


@dataclass(frozen=True)
class Suggestion:
    """A change after which it fits: `plan` is the same arithmetic, done again with the change."""

    change: str
    plan: Plan


@dataclass(frozen=True)
class Waste:
    """Token slots that a mix of chats reserves, and uses, with one way of keeping them."""

    way: str
    reserved: int
    used: int
    num_fit: int  # chats of this mix, in its order and again, that fit the same bytes

    @property
    def share(self) -> float:
        """Of the reserved slots those that hold nothing."""
        return 1 - self.used / self.reserved


def load_model(target: str) -> PlanModel:
    """A model on this disk, checked as `kvchat run` checks it; nothing is downloaded."""
    if not Path(target).expanduser().exists():
        from kvchat.model.hub import cached_folder

        folder = cached_folder(target)
        if folder is None:
            raise UsageError(
                f"{quoted(target)} is not on this disk, and plan downloads nothing; name a file or"
                " folder, or a shape: --shape llama3-8b"
            )
        target = str(folder)
    source = resolve(target)
    config = parse_config(source)
    check_tensors(source, config)
    return PlanModel(source.name, config, num_values(config), source.stored_bytes())


def load_shape(name: str) -> PlanModel:
    """A well-known model of which nothing need be on this disk."""
    config = find_shape(name)
    return PlanModel(name.lower(), config, num_values(config), None)


def choose_dtype(model: PlanModel, asked: str, device: str, mem: int) -> str:
    """What `kvchat run --dtype` would compute in with so much memory."""
    if asked != "auto":
        return asked
    return auto_dtype(model.num_values, model.config.checkpoint_dtype, device, mem)


def layout_of(config: ModelConfig, ask: Ask) -> BlockLayout:
    """The blocks of a pool that serves `ask`. UsageError where its codec cannot store the heads."""
    spec = KVSpec(
        config.num_layers, config.num_kv_heads, config.head_dim, ask.block_size, ask.dtype
    )
    return BlockLayout(spec, ask.mode)


def modes(config: ModelConfig) -> tuple[Codec, ...]:
    """The codecs that this model's heads allow."""
    return tuple(Codec) if config.head_dim % 8 == 0 else (Codec.NATIVE,)


def make_plan(model: PlanModel, ask: Ask) -> Plan:
    """Every item of `ask` in bytes."""
    layout = layout_of(model.config, ask)
    weights = weight_bytes(model.config, ask.dtype, ask.weights)
    workspace, logits, num_step_tokens = _step_items(model.config, layout, ask, weights)
    num_blocks = pool_blocks(layout, ask, num_step_tokens)
    return Plan(
        ask=ask,
        weights=weights,
        workspace=workspace,
        logits=logits,
        cuda_context=CUDA_CONTEXT_BYTES if ask.device != "cpu" else 0,
        num_blocks=num_blocks,
        pool=num_blocks * layout.bytes_per_block,
    )


def _step_items(
    config: ModelConfig, layout: BlockLayout, ask: Ask, weights: int
) -> tuple[int, int, int]:
    """(workspace, logits, tokens) of a step; on a GPU what a run reserves in so much memory."""
    if ask.device == "cpu":
        return workspace_bytes(config, ask), logits_bytes(config, ask), CPU_STEP[0]
    beside = ask.mem - CUDA_CONTEXT_BYTES - weights
    sizes = step_sizes(config, layout, (None, None), ask.weights, beside)
    items = cuda_workspace(config, layout, StepCaps(*sizes, ask.context), ask.weights)
    return items.total - items.logits - items.driver, items.logits, sizes[0]


def session_blocks(layout: BlockLayout, mode: Codec, num_tokens: int) -> int:
    """The most blocks that one session holds on its way to num_tokens, by the policy of a process
    that runs in this mode: sinks and window are native, whole spans between them compressed."""
    return _session_blocks(mode, layout.span_blocks, layout.spec.block_size, num_tokens)


@cache
def _session_blocks(
    mode: Codec, span_blocks: tuple[int, ...], block_size: int, num_tokens: int
) -> int:
    policy = KVPolicy(mode.name.lower(), span_blocks=span_blocks)
    num_blocks = policy.num_blocks(num_tokens, block_size)
    while policy.max_tokens(num_blocks, block_size) < num_tokens:
        num_blocks += 1
    return num_blocks


def pool_blocks(layout: BlockLayout, ask: Ask, num_step_tokens: int = CPU_STEP[0]) -> int:
    """Blocks of the pool: the sessions', the null block, and for a compressing mode the tokens of
    a step, which are native until it is done."""
    in_flight = -(-num_step_tokens // ask.block_size) if ask.mode else 0
    return 1 + in_flight + ask.num_sessions * session_blocks(layout, ask.mode, ask.context)


def workspace_bytes(config: ModelConfig, ask: Ask) -> int:
    """What a step on a CPU takes beside weights, pool and logits.

    The widest moment of a layer; K and V of one layer of the longest session, gathered for a long
    chunk; the table of angles; the block tables. An estimate: for two shapes in float32 and
    bfloat16 torch's profiler counted from 1 % less to 18 % more.
    """
    size, hidden, ffn = DTYPE_BYTES[ask.dtype], config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (2 * hidden + 4 * ffn) * size  # x, normed; gate and up, silu(gate), their product
    attention = (2 * hidden + q + 2 * kv) * size + 2 * q * _FLOAT32  # rotated q, attended
    norm = hidden * (size + 3 * _FLOAT32)
    step = CPU_STEP[0] * max(mlp, attention, norm)
    scratch = 2 * kv * ask.context * _FLOAT32
    angles = ask.context * config.head_dim * _FLOAT32
    tables = ask.num_sessions * -(-ask.context // ask.block_size) * 4
    return step + scratch + angles + tables


def logits_bytes(config: ModelConfig, ask: Ask) -> int:
    """On a CPU one row of logits a session: as computed, and as float32 where that is another
    dtype."""
    size = DTYPE_BYTES[ask.dtype]
    return ask.num_sessions * config.vocab_size * (size + _FLOAT32 * (size != _FLOAT32))


def max_sessions(model: PlanModel, ask: Ask) -> int:
    """The most sessions of ask.context tokens that fit; 0 when not even one does."""
    return _largest(lambda n: make_plan(model, replace(ask, num_sessions=n)).fits, 2**20)


def max_context(model: PlanModel, ask: Ask) -> int:
    """The longest context for ask.num_sessions that fits, at most the model's; 0 for none."""
    return _largest(
        lambda n: make_plan(model, replace(ask, context=n)).fits, model.config.max_position
    )


def matrix(model: PlanModel, ask: Ask) -> dict[int, dict[int, Codec | None]]:
    """By context and number of sessions: the least compression with which they fit, or None."""
    return {
        context: {n: _least_mode(model, ask, n, context) for n in MATRIX_SESSIONS}
        for context in matrix_contexts(model.config)
    }


def matrix_contexts(config: ModelConfig) -> list[int]:
    """Powers of two from 1,024 up to the model's context, the last ones where these are many."""
    top = config.max_position
    first = min(_MIN_MATRIX_CONTEXT, top)
    powers = [first << i for i in range(40) if first << i < top]
    return [*powers, top][-_MAX_MATRIX_CONTEXTS:]


def suggest(model: PlanModel, ask: Ask) -> list[Suggestion]:
    """Single changes after which `ask` fits, and at last combined ones; each is checked again."""
    found = [_checked(model, change, other) for change, other in _single_changes(model, ask)]
    fitting = [s for s in found if s is not None]
    if all("--mem" in s.change for s in fitting):
        found = [_checked(model, change, other) for change, other in _double_changes(model, ask)]
        fitting += [s for s in found if s is not None]
    return fitting


def default_mix(num_chats: int, context: int) -> list[int]:
    """Lengths as chats have them, many short and few long: quantiles of a log-normal distribution
    with median context / 6 and sigma 1, cut at the context."""
    normal = statistics.NormalDist()
    quantiles = (normal.inv_cdf((i + 0.5) / num_chats) for i in range(num_chats))
    return [max(1, min(context, round(context / 6 * math.exp(z)))) for z in quantiles]


def mix_waste(model: PlanModel, ask: Ask, mix: list[int]) -> list[Waste]:
    """The mix kept contiguously at the asked context each, and in native blocks."""
    native = replace(ask, mode=Codec.NATIVE)
    spec = layout_of(model.config, native).spec
    budget = max(0, ask.mem - make_plan(model, native).fixed) // spec.bytes_per_token
    ways = {
        "contiguous, reserved at full length": [max(ask.context, n) for n in mix],
        "paged": [-(-n // ask.block_size) * ask.block_size for n in mix],
    }
    return [
        Waste(way, sum(slots), sum(mix), _num_fit(slots, budget)) for way, slots in ways.items()
    ]


def _num_fit(slots: list[int], budget: int) -> int:
    """How many of the chats, over and over, fit the budget (in tokens)."""
    rounds, left = divmod(budget, sum(slots))
    num_more = 0
    for num_slots in slots:
        if num_slots > left:
            break
        left -= num_slots
        num_more += 1
    return rounds * len(slots) + num_more


def _largest(is_good: Callable[[int], bool], top: int) -> int:
    """The largest n of 1 .. top for which is_good(n), which holds up to some n; else 0."""
    low, high = 0, 1
    while high <= top and is_good(high):
        low, high = high, high * 2
    high = min(high, top + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low


def _least_mode(model: PlanModel, ask: Ask, num_sessions: int, context: int) -> Codec | None:
    for mode in modes(model.config):
        other = replace(ask, num_sessions=num_sessions, context=context, mode=mode)
        if make_plan(model, other).fits:
            return mode
    return None


def _checked(model: PlanModel, change: str, ask: Ask) -> Suggestion | None:
    if ask.num_sessions < 1 or ask.context < 1:
        return None
    plan = make_plan(model, ask)
    return Suggestion(change, plan) if plan.fits else None


def _single_changes(model: PlanModel, ask: Ask) -> Iterator[tuple[str, Ask]]:
    for mode in modes(model.config)[ask.mode + 1 :]:
        yield f"--kv-cache {mode.name.lower()}", replace(ask, mode=mode)
    if ask.dtype == "float32":
        yield "--dtype bfloat16", replace(ask, dtype="bfloat16")
    if ask.device != "cpu" and ask.weights == "auto":
        yield "--weights int8", replace(ask, weights="int8")
    num_sessions = max_sessions(model, ask)
    yield f"--sessions {num_sessions}", replace(ask, num_sessions=num_sessions)
    context = max_context(model, ask)
    yield f"--ctx {context}", replace(ask, context=context)
    more = _with_more_memory(model, ask)
    is_kept = choose_dtype(model, "auto", ask.device, more.mem) == ask.dtype
    yield f"--mem {more.mem // 2**20}MiB" + ("" if is_kept else f" --dtype {ask.dtype}"), more


def _with_more_memory(model: PlanModel, ask: Ask) -> Ask:
    """The same with as much as it needs; on a GPU with more memory steps are larger."""
    while not (plan := make_plan(model, ask)).fits:
        ask = replace(ask, mem=-(-plan.total // 2**20) * 2**20)
    return ask


def _double_changes(model: PlanModel, ask: Ask) -> Iterator[tuple[str, Ask]]:
    """For when no single change but more memory helps: the strongest codec and narrow weights."""
    narrow, flags = ask, ""
    if ask.dtype == "float32":
        narrow, flags = replace(ask, dtype="bfloat16"), "--dtype bfloat16 "
    elif ask.device != "cpu" and ask.weights == "auto":
        narrow, flags = replace(ask, weights="int8"), "--weights int8 "
    for mode in modes(model.config)[ask.mode + 1 :]:
        best = replace(narrow, mode=mode)
        name = f"{flags}--kv-cache {mode.name.lower()}"
        if flags:
            yield name, best
        num_sessions, context = max_sessions(model, best), max_context(model, best)
        if num_sessions < ask.num_sessions:
            yield f"{name} --sessions {num_sessions}", replace(best, num_sessions=num_sessions)
        if context < ask.context:
            yield f"{name} --ctx {context}", replace(best, context=context)
