"""What compression costs one model, measured through the pool: the figures of `kvchat probe`.

Texts are scored token by token, so that what is compressed is what is read. Every setting has a
pool of its own and all go over the same texts in step, each compared with the native one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import make_backend
from kvchat.attention.rope import RopeTable
from kvchat.config import KVPolicy, KVSpec
from kvchat.kv.block_pool import BlockOp, BlockPool, Sequence
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec
from kvchat.model.decoder import Decoder

MIN_SHARE = 0.5  # of the context read, compressed: a row below it says little about the codec
PREFILL_CHUNK = 256
Ticks = Callable[[int], None]  # told of the steps done


@dataclass(frozen=True)
class Setting:
    """How a pool compresses: to the codecs of `rungs` one after another, outside of the first
    `sink` and the last `window` tokens. No rungs: native."""

    rungs: tuple[Codec, ...]
    sink: int = 0
    window: int = 0

    @property
    def name(self) -> str:
        """As in the table: native, int8, int8 -> int4."""
        return " -> ".join(rung.name.lower() for rung in self.rungs) or "native"

    @property
    def lowest(self) -> Codec:
        """The codec that most of the context ends as."""
        return max(self.rungs, default=Codec.NATIVE)


@dataclass(frozen=True)
class Probed:
    """A model and all that its pools need."""

    decoder: Decoder
    spec: KVSpec
    rope: RopeTable
    backend: str = "cpu"


@dataclass(slots=True, eq=False)
class _Text:
    """One sequence of an arm: its tokens so far, and how far each rung has got, in entries."""

    seq: Sequence
    token_ids: list[int] = field(default_factory=list)
    next_entries: dict[Codec, int] = field(default_factory=dict)
    num_compressed: int = 0  # entries


class Arm:
    """A pool of its own under one setting, for texts that grow in step."""

    def __init__(self, probed: Probed, setting: Setting, num_texts: int, num_tokens: int) -> None:
        spec = probed.spec
        num_blocks = 2 + num_texts * (1 + math.ceil(num_tokens / spec.block_size))
        self.setting = setting
        self._decoder = probed.decoder
        device = probed.decoder.device
        self._cache = KVCache(spec, num_blocks, device, setting.lowest)
        self._pool = BlockPool(
            num_blocks, spec.block_size, span_blocks=self._cache.layout.span_blocks
        )
        self._policy = KVPolicy(
            window=setting.window, sink=setting.sink, span_blocks=self._pool.span_blocks
        )
        self._backend = make_backend(
            probed.backend, probed.decoder.config, self._cache, probed.rope
        )
        self._backend.warm_up(lambda done, total: None)
        self._texts = [_Text(self._pool.alloc([])) for _ in range(num_texts)]

    @property
    def num_bytes(self) -> int:
        """Memory of its pool."""
        return self._cache.num_bytes

    @torch.inference_mode()
    def feed(self, token_ids: list[list[int]]) -> Tensor:
        """Append tokens to each text and compress what may be; a text without new ones rests.

        Returns float32 [texts that go on, vocab_size], the logits after each one's last token.
        """
        fed = [(text, ids) for text, ids in zip(self._texts, token_ids, strict=True) if ids]
        ops: list[BlockOp] = []
        for text, new_ids in fed:
            text.token_ids += new_ids
            claimed = self._pool.append(text.seq, len(new_ids))
            assert claimed is not None, "the pool was made to hold all texts native"
            ops += claimed
        self._cache.apply(ops)
        query_lens = [len(new_ids) for _, new_ids in fed]
        self._backend.plan(
            AttentionBatch(
                query_lens,
                [len(text.token_ids) for text, _ in fed],
                [text.seq.table for text, _ in fed],
            )
        )
        device = self._decoder.device
        input_ids = torch.tensor([i for _, new_ids in fed for i in new_ids], device=device)
        last = torch.tensor(query_lens, device=device).cumsum(0) - 1
        logits = self._decoder(input_ids, self._backend, last)
        self._cache.apply([op for text, _ in fed for op in self._compress(text)])
        return logits

    def share_compressed(self) -> float:
        """Of all tokens held now, how many are in compressed blocks."""
        num_entries = sum(len(text.seq.table) for text in self._texts)
        return sum(text.num_compressed for text in self._texts) / num_entries

    def _compress(self, text: _Text) -> Iterator[BlockOp]:
        """Every span that has left the sinks and the window, rung by rung."""
        num_tokens = len(text.token_ids)
        self._pool.seal(text.seq, text.token_ids, num_tokens)
        block_size = self._pool.block_size
        for rung in self.setting.rungs:
            num_entries = self._pool.span_blocks[rung]
            places = self._policy.compressible(num_tokens, rung, block_size)
            first, end = (position // block_size for position in places)
            for start in range(max(first, text.next_entries.get(rung, 0)), end, num_entries):
                op = self._pool.compress([text.seq], start, rung)
                assert op is not None, "compressing frees more than it takes"
                yield op
                text.next_entries[rung] = start + num_entries
                text.num_compressed += num_entries * (rung == self.setting.rungs[0])


@dataclass
class Score:
    """A setting against native, over all scored positions."""

    setting: Setting
    share_compressed: float = 0.0  # of the context read, mean
    nll: float = 0.0  # nats a token
    native_nll: float = 0.0
    kl_mean: float = 0.0  # nats
    kl_p99: float = 0.0
    agreement: float = 0.0  # of the most likely tokens, 0 to 1
    num_scored: int = 0
    needles: tuple[int, int] | None = None  # found, asked; None: the model has no chat format

    @property
    def delta_nll(self) -> float:
        """Nats a token above native."""
        return self.nll - self.native_nll

    @property
    def is_telling(self) -> bool:
        """Enough of what was read was compressed."""
        return self.share_compressed >= MIN_SHARE


def score_texts(
    probed: Probed, settings: list[Setting], texts: list[list[int]], tick: Ticks
) -> list[Score]:
    """Score the second half of texts of one length, one token a step, under every setting."""
    num_tokens = len(texts[0])
    assert all(len(text) == num_tokens for text in texts), "texts go in step"
    native = Arm(probed, Setting(()), len(texts), num_tokens)
    arms = [Arm(probed, setting, len(texts), num_tokens) for setting in settings]
    tallies = [_Tally() for _ in arms]
    for position in range(num_tokens - 1):
        new_ids = [[text[position]] for text in texts]
        reference = native.feed(new_ids).log_softmax(-1)
        targets = torch.tensor([text[position + 1] for text in texts], device=reference.device)
        for arm, tally in zip(arms, tallies, strict=True):
            share = arm.share_compressed() if position else 0.0  # of what this step reads
            scored = arm.feed(new_ids).log_softmax(-1)
            if position >= num_tokens // 2:
                tally.add(reference, scored, targets, share)
        tick(position + 1)
    return [tally.score(arm.setting) for arm, tally in zip(arms, tallies, strict=True)]


class _Tally:
    """What score_texts gathers for one arm."""

    def __init__(self) -> None:
        self._shares: list[float] = []
        self._columns: list[Tensor] = []  # [4, num_texts]: KL, same top, NLL, native NLL

    def add(self, reference: Tensor, scored: Tensor, targets: Tensor, share: float) -> None:
        """One step: log-probabilities [num_texts, vocab_size] and the tokens that came."""
        kl = (reference.exp() * (reference - scored)).sum(-1)
        is_same = (reference.argmax(-1) == scored.argmax(-1)).float()
        nlls = [-logs.gather(1, targets[:, None])[:, 0] for logs in (scored, reference)]
        self._columns.append(torch.stack([kl, is_same, *nlls]).double().cpu())
        self._shares.append(share)

    def score(self, setting: Setting) -> Score:
        kl, is_same, nll, native_nll = torch.cat(self._columns, dim=1)
        return Score(
            setting,
            sum(self._shares) / len(self._shares),
            float(nll.mean()),
            float(native_nll.mean()),
            float(kl.mean()),
            float(kl.quantile(0.99)),
            float(is_same.mean()),
            kl.numel(),
        )


def sample_texts(
    probed: Probed, first_id: int, num_texts: int, num_tokens: int, seed: int, tick: Ticks
) -> list[list[int]]:
    """Texts that the model itself makes at temperature 1, for a probe without a text."""
    arm = Arm(probed, Setting(()), num_texts, num_tokens)
    generator = torch.Generator().manual_seed(seed)
    texts = [[first_id] for _ in range(num_texts)]
    for num_done in range(1, num_tokens):
        chances = arm.feed([text[-1:] for text in texts]).softmax(-1).cpu()
        for text, token_id in zip(texts, chances.multinomial(1, generator=generator), strict=True):
            text.append(int(token_id))
        tick(num_done)
    return texts


def replies(
    arm: Arm, prompts: list[list[int]], max_tokens: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    """Greedy replies to all prompts at once, by an arm of as many empty texts; a stop id ends a
    reply and is left out."""
    num_rounds = math.ceil(max(map(len, prompts)) / PREFILL_CHUNK)
    for number in range(num_rounds):
        chunks = [_part(prompt, number, num_rounds) for prompt in prompts]
        logits = arm.feed(chunks)
    made: list[list[int]] = [[] for _ in prompts]
    going = [*range(len(prompts))]
    for num_made in range(1, max_tokens + 1):
        next_ids: list[list[int]] = [[] for _ in prompts]
        for idx, token_id in zip(going, logits.argmax(-1).tolist(), strict=True):
            if token_id not in stop_ids:
                made[idx].append(token_id)
                next_ids[idx] = [token_id]
        going = [idx for idx in going if next_ids[idx]]
        if not going or num_made == max_tokens:
            break
        logits = arm.feed(next_ids)
    return made


def _part(token_ids: list[int], number: int, num_parts: int) -> list[int]:
    """One of num_parts pieces of about equal length."""
    assert len(token_ids) >= num_parts, "every text goes on in every step"
    bounds = [len(token_ids) * i // num_parts for i in (number, number + 1)]
    return token_ids[slice(*bounds)]
