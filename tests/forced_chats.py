"""Whole engines side by side: the replies of one, token by token, through the logits of another.

Two right engines may part at a near tie, and then say different things for ever. So the second is
made to say what the first said, and tells how far each token was from the one it would have taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvchat.attention.reference import ReferenceBackend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, SamplingParams, SchedulerConfig
from kvchat.engine.build import make_runner
from kvchat.engine.engine import Engine
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Request
from kvchat.engine.runner import Runner
from kvchat.engine.sampler import Sampler
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec

WINDOW = SINK = 64


@dataclass(frozen=True)
class Room:
    """What an engine has: its pool and the caps of a step."""

    mode: str = "native"
    num_blocks: int = 400
    num_host_slots: int = 0
    max_len: int = 2048
    budget: int = 512
    max_seqs: int = 16
    block_size: int = 16


@dataclass
class Said:
    """A reply: the length of its prompt, its ids, and how many tokens were found computed."""

    num_prompt: int
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0


class ForcedSampler(Sampler):
    """Takes the ids of `said`, by request id, and notes what each gives away: the largest logit
    less the one it takes, 0 where that is the largest."""

    def __init__(self, said: dict[int, Said]) -> None:
        super().__init__()
        self.gaps: list[float] = []
        self._said = said

    def sample(self, logits, draws):
        taken = []
        for row, draw in zip(logits.float(), draws, strict=True):
            reply = self._said[draw.seed]
            token_id = reply.token_ids[len(draw.token_ids) - reply.num_prompt]
            self.gaps.append(float(row.max() - row[token_id]))
            taken.append(token_id)
        return taken


class Chats:
    """An engine over a decoder, on its device. said: by request id, which is the seed too.

    forced None: kvchat's own runner for the device; else the reference backend, over a pool of the
    same kind on the same device, says what is given.
    """

    def __init__(self, decoder, dtype, room=Room(), forced=None, use_graphs=True):
        config, device = decoder.config, decoder.device
        spec = KVSpec(
            config.num_layers, config.num_kv_heads, config.head_dim, room.block_size, dtype
        )
        policy = choose_kv_mode(room.mode, WINDOW, SINK, spec, Codec.INT4).policy
        made = SchedulerConfig(
            room.num_blocks, room.block_size, room.max_len, room.max_seqs, room.budget, policy,
            room.num_host_slots,
        )  # fmt: skip
        lowest = Codec(len(policy.span_blocks) - 1)
        self.cache = KVCache(spec, room.num_blocks, device, lowest, room.num_host_slots)
        self.cache.payload[1:].fill_(255)  # NaN: what is read unwritten ends the reply
        self.cache.side[1:].fill_(255)
        self.sampler = ForcedSampler(forced or {})
        if forced is None:
            self.runner = make_runner(
                decoder, self.cache, made, "cpu", frozenset(), lambda *_: None, use_graphs
            )
        else:
            rope = build_rope(config, made.max_request_tokens, device)
            backend = ReferenceBackend(config, self.cache, rope)
            self.runner = Runner(decoder, self.cache, backend, self.sampler)
        pool = BlockPool(
            room.num_blocks, room.block_size, span_blocks=policy.span_blocks,
            num_reserved=policy.num_reserved,
        )  # fmt: skip
        self.scheduler = Scheduler(made, pool)
        self.engine = Engine(self.scheduler, self.runner, self._take)
        self.said: dict[int, Said] = {}
        self.codecs_seen: set[Codec] = set()

    def submit(self, session_id, prompt, num_reply, **sampling):
        """Ask; returns the request."""
        params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": num_reply} | sampling
        request_id = len(self.said) + 1
        self.said[request_id] = Said(len(prompt))
        request = Request(
            request_id, session_id, [*prompt], len(prompt), SamplingParams(**params), request_id
        )
        self.engine.submit(request)
        return request

    def run(self):
        """Until nobody generates; returns what was said, by request id."""
        while self.engine.step():
            seqs = [seq for _, seq, _ in self.scheduler.sequences()]
            self.codecs_seen |= {Codec(entry >> 28) for seq in seqs for entry in seq.table}
        return {request_id: reply.token_ids for request_id, reply in self.said.items()}

    def turn(self, session_id, prompt, num_reply):
        """One reply, by itself: the whole text with it."""
        request = self.submit(session_id, prompt, num_reply)
        self.run()
        assert request.finish_reason == "length"
        return request.token_ids

    def _take(self, events):
        for event in events:
            assert not event.error, event
            reply = self.said[event.request_id]
            reply.token_ids += event.token_ids
            reply.num_cached = max(reply.num_cached, event.num_cached_tokens)


def gaps(scenario, decoder, dtype, room, said):
    """What a reference over this decoder would have given up to say all this: a gap each token."""
    forced = Chats(decoder, dtype, room, forced=said)
    scenario(forced)
    found = forced.sampler.gaps
    assert len(found) == sum(len(reply.token_ids) for reply in said.values())
    return torch.tensor(found)
