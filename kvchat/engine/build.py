"""Wires a model into a running engine: weights -> decoder -> pool -> backend -> scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvchat.config import KVPolicy, KVSpec, ModelConfig, SchedulerConfig
from kvchat.engine.device import choose_device, device_memory, device_name
from kvchat.engine.engine import Engine
from kvchat.engine.fit import CPU_STEP, check_fits, free_for_pool, step_sizes
from kvchat.engine.gate import decisive, recall
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Event
from kvchat.engine.scheduler import Scheduler
from kvchat.engine.workspace import StepCaps
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import (
    available_memory,
    format_size,
    plan_host_slots,
    plan_num_blocks,
)
from kvchat.model.sizes import weight_bytes
from kvchat.model.source import ModelSource, Progress

if TYPE_CHECKING:
    from kvchat.attention.cuda_ops import Launch
    from kvchat.engine.runner import Runner
    from kvchat.kv.cache import KVCache
    from kvchat.model.decoder import Decoder


@dataclass(frozen=True)
class EngineOptions:
    """What a person chose for the engine; None and "auto" are decided here."""

    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"  # or int8, on a GPU
    backend: str = "cpu"  # of a CPU
    context: int | None = None
    kv_mem: str | None = None
    kv_cache: str | None = None  # a mode of engine/kv_mode, or its default
    kv_window: int = 128
    kv_sink: int = 64
    host_mem: str | None = None  # for parked chats, where the device has memory of its own
    force: bool = False  # use codecs that have not passed the probe
    block_size: int = 16
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    threads: int | None = None
    use_graphs: bool = True


@dataclass(frozen=True)
class EngineFacts:
    """What was decided, for the banner and the views."""

    device: str  # as a person knows it
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
    source: ModelSource,
    config: ModelConfig,
    device: str,
    spec: KVSpec,
    weights: str,
    progress: Progress,
) -> Decoder:
    """The weights in memory."""
    import torch

    from kvchat.model.weights import load_decoder

    def tell(done: int, total: int) -> None:
        progress("loading", done, total)

    try:
        return load_decoder(source, config, spec.dtype, device, tell, weights)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            "the GPU's memory ran out while the weights were loaded; something else took it"
            " meanwhile: start again, or use --device cpu"
        ) from error


def _scheduler_config(
    layout: BlockLayout,
    kv: KVPolicy,
    config: ModelConfig,
    options: EngineOptions,
    device: str,
    sizes: tuple[int, int],
) -> SchedulerConfig:
    """The caps of a step, and the pool that the memory left by weights and steps allows. A context
    that was asked for is given in full or refused."""
    max_len = options.context or config.max_position
    available = device_memory(device)
    if device != "cpu":
        caps = StepCaps(*sizes, max_len)
        available = free_for_pool(config, layout, kv, caps, options.weights, available)
    num_blocks = plan_num_blocks(layout, options.kv_mem, available, device)
    made = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_model_len=max_len,
        max_num_batched_tokens=sizes[0],
        max_num_seqs=sizes[1],
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


def _step_sizes(
    layout: BlockLayout, config: ModelConfig, options: EngineOptions, device: str
) -> tuple[int, int]:
    """Tokens and chats of a step at most. CapacityError where a GPU cannot hold the model."""
    asked = options.max_num_batched_tokens, options.max_num_seqs
    if device == "cpu":
        return asked[0] or CPU_STEP[0], asked[1] or CPU_STEP[1]
    free = device_memory(device)
    beside = free - weight_bytes(config, layout.spec.dtype, options.weights)
    sizes = step_sizes(config, layout, asked, options.weights, beside)
    check_fits(config, layout, sizes, options.weights, free, available_memory())
    return sizes


def make_runner(
    decoder: Decoder,
    cache: KVCache,
    config: SchedulerConfig,
    backend: str,
    dry_breakers: frozenset[int],
    progress: Progress,
    use_graphs: bool = True,
) -> Runner:
    """What computes the steps over this pool, on the decoder's device; compiled, and on a GPU
    captured unless use_graphs is False.

    backend: of attention/backends, on a CPU.
    """
    from kvchat.attention.backends import make_backend
    from kvchat.attention.rope import build_rope
    from kvchat.engine.runner import Runner
    from kvchat.engine.sampler import Sampler

    rope = build_rope(decoder.config, config.max_request_tokens, decoder.device)
    sampler = Sampler(dry_breakers)
    if decoder.device.type == "cpu":
        made = make_backend(backend, decoder.config, cache, rope)
        runner = Runner(decoder, cache, made, sampler)
        runner.warm_up(lambda done, total: progress("compiling kernels", done, total))
        return runner
    from kvchat.attention.cuda import CudaBackend
    from kvchat.engine.capture_sizes import row_sizes
    from kvchat.engine.cuda_runner import CudaRunner
    from kvchat.model.cuda_ops import CudaOps

    load = _TellingLoad(progress)
    if not isinstance(decoder.ops, CudaOps):  # else another pool's graphs use what it has reserved
        decoder.ops = CudaOps(cache.spec.dtype, load)
        decoder.ops.warm_up(decoder.linears())
    max_rows = row_sizes(config.max_num_seqs)[-1]
    cuda = CudaBackend(decoder.config, cache, rope, max_rows, config.max_request_tokens, load)
    cache.use_kernels(cuda.block_ops)
    runner = CudaRunner(decoder, cache, cuda, sampler, config, use_graphs, load)
    progress("compiling kernels", 1, 1)
    runner.warm_up(lambda done, total: progress("capturing graphs", done, total))
    return runner


class _TellingLoad:
    """kernels.load_kernel, with a bar that moves: the first time on a machine it takes seconds."""

    _NUM_KERNELS = 14  # about so many; the bar ends when all are there

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._num_loaded = 0

    def __call__(self, *args: Any, **more: Any) -> Launch:  # noqa: ANN401
        from kvchat.attention.kernels import load_kernel

        done = min(self._num_loaded, self._NUM_KERNELS - 1)
        self._progress("compiling kernels", done, self._NUM_KERNELS)
        self._num_loaded += 1
        return load_kernel(*args, **more)


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

    from kvchat.kv.cache import KVCache
    from kvchat.kv.codecs import CODEC_FINGERPRINT
    from kvchat.model.weights import choose_dtype

    choice = choose_device(options.device, options.dtype, options.weights, options.host_mem)
    device = choice.device
    _check_context(source, config, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = choose_dtype(options.dtype, source, config, device, available_memory())
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
    sizes = _step_sizes(layout, config, options, device)
    decoder = _load(source, config, device, spec, options.weights, progress)
    made = _scheduler_config(layout, kv, config, options, device, sizes)
    cache = KVCache(spec, made.num_blocks, device, layout.lowest, made.num_host_slots)
    runner = make_runner(
        decoder, cache, made, options.backend, dry_breakers, progress, options.use_graphs
    )
    pool = BlockPool(
        made.num_blocks,
        options.block_size,
        fingerprint,
        span_blocks=kv.span_blocks,
        num_reserved=kv.num_reserved,
    )
    bytes_used = tuple(layout.bytes_used(Codec(i)) for i in range(layout.lowest + 1))
    engine = Engine(Scheduler(made, pool), runner, listener, layout.bytes_per_block, bytes_used)
    warnings = (*filter(None, [choice.warning]), *kv_mode.warnings)
    facts = EngineFacts(device_name(device), dtype, spec, made, layout.lowest, warnings)
    return engine, facts
