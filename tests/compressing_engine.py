"""A whole engine over a random model and a pool that compresses, stepped by hand; every row of
logits that a token was drawn from is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.attention.backends import make_backend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, ModelConfig, SamplingParams, SchedulerConfig
from kvchat.engine.engine import Engine
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Request
from kvchat.engine.runner import Runner
from kvchat.engine.sampler import Sampler
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec, block_ids
from kvchat.model.decoder import Decoder
from kvchat.model.families import tensor_shapes


def make_config(**changes):
    """A Llama of two small layers."""
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2}
    shape |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_position": 1024}
    return ModelConfig(family="llama", norm_eps=1e-5, rope_theta=10000.0, **shape | changes)


def random_decoder(config, dtype="float32", seed=5):
    """Weights of noise, scaled so that activations stay near 1 and logits lie apart."""
    shapes = tensor_shapes(config)
    generator = torch.Generator().manual_seed(seed)

    def draw(name):
        noise = torch.randn(shapes[name], generator=generator)
        if name.endswith("norm.weight"):
            return (1 + 0.1 * noise).to(getattr(torch, dtype))
        return (noise * 2 / math.sqrt(shapes[name][-1])).to(getattr(torch, dtype))

    return Decoder(config, lambda *names: torch.cat([draw(name) for name in names]))


def make_spec(config, block_size=16, dtype="float32"):
    return KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)


def forced_policy(mode, spec, window, sink):
    """The policy of --kv-cache `mode` --force."""
    return choose_kv_mode(mode, window, sink, spec, Codec.INT4).policy


class PeakPool(BlockPool):
    """Remembers the most blocks held; without sharing it finds no prefix, as if each session had a
    salt of its own."""

    is_sharing = True
    peak = 0

    def match(self, token_ids):
        return super().match(token_ids) if self.is_sharing else 0

    def alloc(self, token_ids):
        return super().alloc(token_ids if self.is_sharing else [])

    def append(self, seq, num_tokens):
        ops = super().append(seq, num_tokens)
        self.peak = max(self.peak, self.num_held)
        return ops


class KeepingSampler(Sampler):
    """Keeps the logits of every draw, by the request's seed."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def sample(self, logits, draws):
        for row, draw in zip(logits, draws, strict=True):
            self.kept.setdefault(draw.seed, []).append(row.clone())
        return super().sample(logits, draws)


class CountingRunner:
    """Computes nothing: the tokens count up. Blocks come and go as with a model."""

    is_async = False

    def __init__(self):
        self.last_id = 100

    def launch(self, batch):
        self.num_sampled = sum(row.is_sampled for row in batch.rows)
        return self

    def tokens(self):
        self.last_id += self.num_sampled
        return list(range(self.last_id - self.num_sampled, self.last_id))


@dataclass(frozen=True)
class Turn:
    """One reply: its ids, the logits that they were drawn from [tokens, vocab_size], and how many
    tokens of the prompt were found computed."""

    token_ids: list[int]
    logits: Tensor
    num_cached: int


class House:
    """`decoder` None: nothing is computed."""

    def __init__(
        self, decoder, spec, policy, num_blocks, *,
        backend="cpu", budget=512, is_sharing=True, max_len=1024,
    ):  # fmt: skip
        spans = {"span_blocks": policy.span_blocks, "num_reserved": policy.num_reserved}
        self.pool = PeakPool(num_blocks, spec.block_size, **spans)
        self.pool.is_sharing = is_sharing
        self.filler = self.pool.alloc([])
        self.sampler = KeepingSampler()
        if decoder is None:
            runner = CountingRunner()
        else:
            self.cache = KVCache(spec, num_blocks, lowest=Codec(len(policy.span_blocks) - 1))
            rope = build_rope(decoder.config, max_len)
            self.backend = make_backend(backend, decoder.config, self.cache, rope)
            runner = Runner(decoder, self.cache, self.backend, self.sampler)
        config = SchedulerConfig(
            num_blocks, spec.block_size, max_len, max_num_batched_tokens=budget, kv=policy
        )
        self.scheduler = Scheduler(config, self.pool)
        self.engine = Engine(self.scheduler, runner, self.receive)
        self.last_id = 0
        self.texts = {}  # by session id: all that was said

    def receive(self, events):
        for event in events:
            assert not event.error, event

    def submit(self, session_id, prompt, max_tokens):
        """Send a prompt, the session's whole text included, from the screen."""
        self.last_id += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        request = Request(self.last_id, session_id, [*prompt], len(prompt), sampling, self.last_id)
        self.engine.set_foreground(session_id)
        self.engine.submit(request)
        return request

    def turn(self, session_id, prompt, max_tokens):
        """A whole turn, and what must hold after every one."""
        request = self.submit(session_id, prompt, max_tokens)
        while self.engine.step():
            pass
        assert request.finish_reason == "length" and not request.wait_reason
        self.texts[session_id] = request.token_ids
        self.check()
        logits = torch.stack(self.sampler.kept.pop(request.seed, [torch.zeros(1)]))
        return Turn(request.token_ids[len(prompt) :], logits, request.num_cached_tokens)

    def seq(self, session_id):
        """What the session holds."""
        return next(seq for held_id, seq, _ in self.scheduler.sequences() if held_id == session_id)

    def codecs(self, session_id):
        """The codec of each entry of the session's table."""
        return [Codec(entry >> 28) for entry in self.seq(session_id).table]

    def check(self):
        """Every block is where it belongs, and nobody has written into the filler's."""
        held = [seq for _, seq, _ in self.scheduler.sequences()]
        self.pool.check_integrity([*held, self.filler])
        ids = block_ids(self.filler.table)
        assert not ids or (self.cache.payload[ids] == 0xFF).all()

    def fill(self, num_left):
        """Let the filler hold all but num_left blocks and the reserve; poison those and all that
        holds nothing, with NaN."""
        self.pool.truncate(self.filler, 0)
        if num_blocks := max(0, self.pool.num_free - num_left):
            assert self.pool.append(self.filler, num_blocks * self.pool.block_size) == []
        ids = block_ids(self.filler.table)
        ids += [idx for idx, state in enumerate(self.pool.map()) if state == "free"]
        self.cache.payload[ids] = 0xFF
        self.cache.side[ids] = 0xFF
        self.pool.peak = self.pool.num_held

    def close(self):
        """All sessions and the filler leave: every block comes home."""
        self.engine.close()
        self.pool.free(self.filler)
        self.pool.check_integrity([])
        assert self.pool.num_held == 0
