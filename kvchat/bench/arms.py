"""What is compared: one model, and for each mode of the KV cache a pool of the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvchat.attention.paged_decode import is_supported
from kvchat.bench.shapes import find_shape
from kvchat.config import KVPolicy, KVSpec, ModelConfig, SchedulerConfig
from kvchat.engine.build import make_runner
from kvchat.engine.device import choose_device, device_memory
from kvchat.engine.engine import Engine, StepRunner
from kvchat.engine.fit import CPU_STEP, GPU_STEPS
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Event
from kvchat.engine.runner import Runner
from kvchat.engine.scheduler import Scheduler
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.kv.codecs import CODEC_FINGERPRINT
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import available_memory, format_size
from kvchat.model.decoder import Decoder
from kvchat.model.families import auto_dtype, parse_config, tensor_shapes
from kvchat.model.linear import Quantised, quantise
from kvchat.model.sizes import is_quantised, num_values, weight_bytes
from kvchat.model.source import Progress, resolve
from kvchat.model.weights import choose_dtype, load_decoder

WINDOW, SINK = 128, 64


@dataclass(frozen=True)
class Compute:
    """What a model is computed with: flags of `kvchat run`."""

    device: str = "auto"
    weights: str = "auto"
    use_graphs: bool = True


@dataclass(frozen=True)
class Model:
    """Weights, and what a run must know of them."""

    name: str
    config: ModelConfig
    spec: KVSpec
    decoder: Decoder
    device: str
    fingerprint: bytes
    load_s: float
    use_graphs: bool = True  # on a GPU

    @property
    def weight_bytes(self) -> int:
        """Read in every step: all matrices."""
        return sum(linear.num_bytes for linear in self.decoder.linears())

    @property
    def attention(self) -> str:
        """What reads the KV pool in steps that only generate."""
        if self.device == "cpu":
            return "numba kernels"
        if is_supported(BlockLayout(self.spec, Codec.NATIVE)):
            return "paged_decode"
        return f"gathered for torch, slower: no kernel for heads of {self.spec.head_dim}"

    @property
    def vocab(self) -> range:
        """Ids to draw prompts from: the specials at the front of most vocabularies left out."""
        return range(min(300, self.config.vocab_size // 2), self.config.vocab_size)


@dataclass(frozen=True)
class Setup:
    """One mode of the KV cache over a pool of its own: what the scheduler has to know."""

    mode: str
    layout: BlockLayout
    config: SchedulerConfig
    fingerprint: bytes

    @property
    def kv(self) -> KVPolicy:
        """What may be compressed, and when."""
        return self.config.kv

    @property
    def pool_bytes(self) -> int:
        """Reserved, null block and side arrays included."""
        return self.config.num_blocks * self.layout.bytes_per_block

    def start(
        self, runner: StepRunner, listener: Callable[[list[Event]], None]
    ) -> tuple[Engine, Scheduler]:
        """A fresh engine with an empty pool; nothing of a run before is found again."""
        pool = BlockPool(
            self.config.num_blocks,
            self.config.block_size,
            self.fingerprint,
            span_blocks=self.kv.span_blocks,
            num_reserved=self.kv.num_reserved,
        )
        scheduler = Scheduler(self.config, pool)
        return Engine(scheduler, runner, listener, self.layout.bytes_per_block), scheduler


@dataclass(frozen=True)
class Arm:
    """A Setup that can compute."""

    setup: Setup
    cache: KVCache
    runner: Runner
    compile_s: float


def load_model(
    model: str | None,
    shape: str | None,
    dtype: str,
    block_size: int,
    progress: Progress,
    compute: Compute = Compute(),
) -> Model:
    """The model of this name, or random weights of this shape. Raises KvchatError."""
    started = time.perf_counter()
    device = choose_device(compute.device, dtype, compute.weights).device
    if shape is not None:
        config, fingerprint = find_shape(shape), shape.encode()
        dtype = _shape_dtype(config, dtype, device, compute.weights)
        decoder = Decoder(config, _Random(config, dtype, device, compute.weights).fetch)
        name = f"{shape} (random weights)"
    else:
        assert model is not None, "no model and no shape"
        source = resolve(model, progress)
        config, fingerprint, name = parse_config(source), source.fingerprint, source.name
        dtype = choose_dtype(dtype, source, config, device, available_memory())
        if weight_bytes(config, dtype, compute.weights) > device_memory(device):
            _refuse_weights(config, dtype, compute.weights, device, name)
        decoder = load_decoder(
            source,
            config,
            dtype,
            device,
            lambda done, total: progress("loading", done, total),
            compute.weights,
        )
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)
    seconds = time.perf_counter() - started
    fingerprint += CODEC_FINGERPRINT
    return Model(
        name, config, spec, decoder, device, fingerprint, seconds, use_graphs=compute.use_graphs
    )


def max_batch_tokens(device: str) -> int:
    """Tokens of a step at most, as `kvchat run` has it where nobody chose."""
    return CPU_STEP[0] if device == "cpu" else GPU_STEPS[0][0]


def make_setup(
    model: Model,
    mode: str,
    num_bytes: int,
    max_tokens: int,
    max_seqs: int = CPU_STEP[1],
    num_batched: int | None = None,
) -> Setup:
    """A pool of at most num_bytes in this mode, for chats of up to max_tokens; num_batched tokens
    in a step, or max_batch_tokens."""
    kv_mode = choose_kv_mode(mode, WINDOW, SINK, model.spec, Codec.INT4)
    layout = BlockLayout(model.spec, kv_mode.lowest)
    num_blocks = num_bytes // layout.bytes_per_block
    config = SchedulerConfig(
        max(num_blocks, kv_mode.policy.num_reserved + 2),
        model.spec.block_size,
        max_tokens,
        max_seqs,
        num_batched or max_batch_tokens(model.device),
        kv_mode.policy,
    )
    if config.max_request_tokens < max_tokens:
        raise CapacityError(
            f"a KV pool of {format_size(num_bytes)} holds {config.max_request_tokens:,} tokens of"
            f" one chat in mode {mode}, and the longest has {max_tokens:,}; raise --kv-mem"
        )
    return Setup(mode, layout, config, model.fingerprint)


def least_bytes(model: Model, mode: str, max_tokens: int) -> int:
    """Of a pool that holds one chat of max_tokens in this mode, on its whole way there."""
    kv_mode = choose_kv_mode(mode, WINDOW, SINK, model.spec, Codec.INT4)
    kv = kv_mode.policy
    num_blocks = kv.peak_blocks(max_tokens, model.spec.block_size) + kv.num_reserved + 1
    return num_blocks * BlockLayout(model.spec, kv_mode.lowest).bytes_per_block


def supported_modes(model: Model, modes: list[str]) -> list[str]:
    """Those that this model's heads allow; raises UsageError when none is left."""
    found, reason = [], ""
    for mode in modes:
        try:
            choose_kv_mode(mode, WINDOW, SINK, model.spec, Codec.INT4)
            found.append(mode)
        except UsageError as error:
            reason = str(error)
    if not found:
        raise UsageError(reason)
    return found


def make_arm(model: Model, setup: Setup, progress: Progress) -> Arm:
    """Reserve the pool, and compile what the first step would wait for."""
    available = device_memory(model.device)
    if setup.pool_bytes > available:
        raise CapacityError(
            f"the KV pool wants {format_size(setup.pool_bytes)} and {format_size(available)} are"
            " available; lower --kv-mem or the lengths"
        )
    cache = KVCache(model.spec, setup.config.num_blocks, model.device, setup.layout.lowest)
    started = time.perf_counter()
    runner = make_runner(
        model.decoder, cache, setup.config, "cpu", frozenset(), progress, model.use_graphs
    )
    return Arm(setup, cache, runner, time.perf_counter() - started)


def _shape_dtype(config: ModelConfig, asked: str, device: str, weights: str) -> str:
    """As for a checkpoint of this shape; CapacityError when its weights are too many."""
    available = device_memory(device)
    if asked == "auto":
        asked = auto_dtype(num_values(config), config.checkpoint_dtype, device, available)
    if weight_bytes(config, asked, weights) > available:
        _refuse_weights(config, asked, weights, device, "random weights of this shape")
    return asked


def _refuse_weights(
    config: ModelConfig, dtype: str, weights: str, device: str, name: str
) -> NoReturn:
    """CapacityError with the sizes, and int8 weights where these would fit."""
    needed, available = weight_bytes(config, dtype, weights), device_memory(device)
    way_out = "a smaller model or shape"
    int8_bytes = weight_bytes(config, dtype, "int8")
    if device != "cpu" and weights == "auto" and int8_bytes <= available:
        way_out = f"--weights int8 ({format_size(int8_bytes)})"
    raise CapacityError(
        f"{name} need {format_size(needed)} as {dtype} and {format_size(available)} are available;"
        f" use {way_out}"
    )


class _Random:
    """Weights from a seed, of the size that training leaves: activations stay near one. Drawn on
    the device, where an 8B takes a second."""

    def __init__(self, config: ModelConfig, dtype: str, device: str, weights: str) -> None:
        self._shapes = tensor_shapes(config)
        self._is_int8 = weights == "int8"
        self._kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
        self._generator = torch.Generator(device).manual_seed(0)

    def fetch(self, *names: str) -> Tensor | Quantised:
        """The named tensors stacked along their first dimension; matrices as int8 if asked."""
        made = torch.cat([self._make(name) for name in names])
        return quantise(made) if self._is_int8 and is_quantised(names[0]) else made

    def _make(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, **self._kind)
        made = torch.empty(shape, **self._kind)
        return made.normal_(0.0, shape[-1] ** -0.5, generator=self._generator)
