"""Wires a model into a running engine: weights -> decoder -> pool -> backend -> scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvchat.config import KVSpec, ModelConfig, SchedulerConfig
from kvchat.engine.engine import Engine
from kvchat.engine.request import Event
from kvchat.engine.scheduler import Scheduler
from kvchat.errors import UsageError
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.planner import available_memory, plan_num_blocks
from kvchat.model.source import ModelSource, Progress


@dataclass(frozen=True)
class EngineOptions:
    """What a person chose for the engine; None and "auto" are decided here."""

    device: str = "auto"
    dtype: str = "auto"
    backend: str = "cpu"
    context: int | None = None
    kv_mem: str | None = None
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

    @property
    def pool_bytes(self) -> int:
        """The whole pool in bytes, null block included."""
        return self.scheduler.num_blocks * self.spec.bytes_per_block

    @property
    def pool_tokens(self) -> int:
        """Tokens the pool can hold at once."""
        return (self.scheduler.num_blocks - 1) * self.scheduler.block_size


def choose_device(device: str) -> str:
    """The device to run on. CUDA has no backend yet: asked for by name it is refused."""
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {device}: this build has no CUDA backend yet; use --device cpu (or auto)"
        )
    return "cpu"


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
    from kvchat.model.weights import choose_dtype, load_decoder

    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    available = available_memory()
    dtype = choose_dtype(options.dtype, source, config, device, available)
    decoder = load_decoder(
        source, config, dtype, device, lambda done, total: progress("loading", done, total)
    )
    spec = KVSpec(
        config.num_layers, config.num_kv_heads, config.head_dim, options.block_size, dtype
    )
    scheduler_config = SchedulerConfig(
        num_blocks=plan_num_blocks(spec, options.kv_mem, available_memory()),
        block_size=options.block_size,
        max_model_len=min(options.context or config.max_position, config.max_position),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    cache = KVCache(spec, scheduler_config.num_blocks, device)
    rope = build_rope(config, scheduler_config.max_request_tokens, device)
    backend = make_backend(options.backend, config, cache, rope)
    runner = Runner(decoder, cache, backend, Sampler(dry_breakers))
    runner.warm_up(lambda done, total: progress("compiling kernels", done, total))
    pool = BlockPool(scheduler_config.num_blocks, options.block_size, source.fingerprint)
    engine = Engine(Scheduler(scheduler_config, pool), runner, listener, spec.bytes_per_block)
    return engine, EngineFacts(device, dtype, spec, scheduler_config)
