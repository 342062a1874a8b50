"""Wires a model into a running engine: weights -> decoder -> pool -> backend -> scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvchat.config import KVPolicy, KVSpec, ModelConfig, SchedulerConfig
from kvchat.engine.engine import Engine
from kvchat.engine.gate import decisive, recall
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Event
from kvchat.engine.scheduler import Scheduler
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import (
    available_memory,
    format_size,
    plan_host_slots,
    plan_num_blocks,
)
from kvchat.model.source import ModelSource, Progress

if TYPE_CHECKING:
    from kvchat.model.decoder import Decoder


@dataclass(frozen=True)
class EngineOptions:
    """What a person chose for the engine; None and "auto" are decided here."""

    device: str = "auto"
    dtype: str = "auto"
    backend: str = "cpu"
    context: int | None = None
    kv_mem: str | None = None
    kv_cache: str | None = None  # a mode of engine/kv_mode, or its default
    kv_window: int = 128
    kv_sink: int = 64
    host_mem: str | None = None  # for parked chats, where the device has memory of its own
    force: bool = False  # use codecs that have not passed the probe
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256
    threads: int | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What was decided, for the banner and the views."""

    device: str
    dtype: str
    spec: KVSpec
    scheduler: SchedulerConfig
    lowest: Codec = Codec.NATIVE  # codec that a block may come to
    warnings: tuple[str, ...] = ()  # what is not as it was asked

    @property
    def layout(self) -> BlockLayout:
        """The bytes of a block."""
        return BlockLayout(self.spec, self.lowest)

    @property
    def pool_bytes(self) -> int:
        """The whole pool in bytes, null block and side array included."""
        return self.scheduler.num_blocks * self.layout.bytes_per_block

    @property
    def host_bytes(self) -> int:
        """Main memory reserved for parked blocks."""
        return self.scheduler.num_host_slots * self.layout.bytes_per_block

    @property
    def pool_tokens(self) -> int:
        """Tokens the pool can hold at once."""
        return (self.scheduler.num_blocks - 1) * self.scheduler.block_size


def choose_device(device: str, host_mem: str | None = None) -> str:
    """The device to run on. CUDA has no backend yet: asked for by name it is refused. So is
    host_mem on a CPU."""
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {device}: this build has no CUDA backend yet; use --device cpu (or auto)"
        )
    if host_mem is not None:
        raise UsageError(
            "--host-mem parks idle chats of a GPU in main memory; on a CPU the KV pool is there"
            " already: raise --kv-mem instead"
        )
    return "cpu"


def _allowed_codec(fingerprint: bytes, options: EngineOptions) -> tuple[Codec, str]:
    """The lowest codec that the automatic modes may use for this model, and why no lower one."""
    if options.force:
        return Codec.INT4, ""
    probed = recall(fingerprint)
    int8, int4 = (
        decisive(probed, codec, options.kv_sink, options.kv_window)
        for codec in (Codec.INT8, Codec.INT4)
    )
    if int8 is not None and not int8.passes:
        return Codec.NATIVE, int8.sentence()
    if int4 is None:
        said = "with so few tokens kept native" if probed else "(kvchat probe measures it)"
        return Codec.INT8, f"the model has not been probed {said}"
    return (Codec.INT4, "") if int4.passes else (Codec.INT8, int4.sentence())


def _check_context(source: ModelSource, config: ModelConfig, options: EngineOptions) -> None:
    if options.context and options.context > config.max_position:
        raise UsageError(
            f"--ctx-size {options.context} is more than the {config.max_position} tokens that"
            f" {source.name} was made for; ask for at most these"
        )


def _load(
    source: ModelSource, config: ModelConfig, dtype: str, device: str, progress: Progress
) -> tuple[Decoder, str]:
    """The weights in memory, and the dtype they are in."""
    from kvchat.model.weights import choose_dtype, load_decoder

    dtype = choose_dtype(dtype, source, config, device, available_memory())

    def tell(done: int, total: int) -> None:
        progress("loading", done, total)

    return load_decoder(source, config, dtype, device, tell), dtype


def _scheduler_config(
    layout: BlockLayout, kv: KVPolicy, config: ModelConfig, options: EngineOptions
) -> SchedulerConfig:
    """The caps of a step. A context that was asked for is given in full or refused."""
    num_blocks = plan_num_blocks(layout, options.kv_mem, available_memory())
    made = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_model_len=options.context or config.max_position,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv=kv,
        num_host_slots=plan_host_slots(layout, options.host_mem, available_memory()),
    )
    if options.context and made.max_request_tokens < options.context:
        num_needed = kv.peak_blocks(options.context, options.block_size) + kv.num_reserved + 1
        needed = num_needed * layout.bytes_per_block
        raise CapacityError(
            f"--ctx-size {options.context} needs a KV pool of {format_size(needed)}, and it has"
            f" {format_size(num_blocks * layout.bytes_per_block)}; raise --kv-mem to {needed} or"
            f" lower --ctx-size to {made.max_request_tokens}"
        )
    return made


def build_engine(
    source: ModelSource,
    config: ModelConfig,
    options: EngineOptions,
    progress: Progress,
    listener: Callable[[list[Event]], None],
    dry_breakers: frozenset[int],
) -> tuple[Engine, EngineFacts]:
    """Load the weights, reserve the pool, compile what is needed; the engine is not started yet.

    No repeat that DRY penalises reaches over a token of dry_breakers.
    """
    import torch

    from kvchat.attention.backends import make_backend
    from kvchat.attention.rope import build_rope
    from kvchat.engine.runner import Runner
    from kvchat.engine.sampler import Sampler
    from kvchat.kv.cache import KVCache
    from kvchat.kv.codecs import CODEC_FINGERPRINT

    device = choose_device(options.device, options.host_mem)
    _check_context(source, config, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    decoder, dtype = _load(source, config, options.dtype, device, progress)
    spec = KVSpec(
        config.num_layers, config.num_kv_heads, config.head_dim, options.block_size, dtype
    )
    fingerprint = source.fingerprint + CODEC_FINGERPRINT
    kv_mode = choose_kv_mode(
        options.kv_cache,
        options.kv_window,
        options.kv_sink,
        spec,
        *_allowed_codec(fingerprint, options),
    )
    layout, kv = BlockLayout(spec, kv_mode.lowest), kv_mode.policy
    scheduler_config = _scheduler_config(layout, kv, config, options)
    num_blocks = scheduler_config.num_blocks
    cache = KVCache(spec, num_blocks, device, layout.lowest, scheduler_config.num_host_slots)
    rope = build_rope(config, scheduler_config.max_request_tokens, device)
    backend = make_backend(options.backend, config, cache, rope)
    runner = Runner(decoder, cache, backend, Sampler(dry_breakers))
    runner.warm_up(lambda done, total: progress("compiling kernels", done, total))
    pool = BlockPool(
        num_blocks,
        options.block_size,
        fingerprint,
        span_blocks=kv.span_blocks,
        num_reserved=kv.num_reserved,
    )
    bytes_used = tuple(layout.bytes_used(Codec(i)) for i in range(layout.lowest + 1))
    engine = Engine(
        Scheduler(scheduler_config, pool), runner, listener, layout.bytes_per_block, bytes_used
    )
    facts = EngineFacts(device, dtype, spec, scheduler_config, layout.lowest, kv_mode.warnings)
    return engine, facts
