"""A seeded simulation of many chats over one small pool, on a virtual clock.

People open sessions, send turns, undo, fork, press Ctrl-C and close windows whenever they like,
also while a step is being launched or read. The device (fake_device) checks every row against its
request's text; every person checks every token against the model applied to the own chat alone.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from compression_watch import WatchedPool, watch_giving_way
from fake_device import EOS_ID, START, FakeDevice, extend, make_request, next_token, states_of

from kvchat.config import KVPolicy, SchedulerConfig
from kvchat.engine.request import Batch, Event, Request
from kvchat.errors import CapacityError
from kvchat.kv.block_ops import ParkBlock, RestoreBlock
from kvchat.kv.block_pool import Sequence

SYSTEM_PROMPTS = [[900 + i] * n for i, n in enumerate((0, 7, 18))]  # shared by many sessions
NATIVE = KVPolicy()
MAX_FORKING = 12  # nobody forks while so many sessions are open, or forks would breed forks


@dataclass(frozen=True)
class Scenario:
    """One simulated evening. Times are in the clock's units; a step takes 1 and a bit."""

    seed: int
    num_blocks: int = 24
    block_size: int = 4
    max_model_len: int = 80
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    mean_gap: float = 20.0  # between two sessions' openings
    num_sessions: int = 625
    max_wait: int = 600  # steps without a row for a request
    meddling: float = 0.05  # how often somebody acts in the middle of a step
    is_late: bool = False  # tokens are read one step late
    failure_rate: float = 0.0005  # of steps
    kv: KVPolicy = NATIVE
    non_finite_rate: float = 0.0005  # of sampled rows
    num_host_slots: int = 0


class Stalled(Exception):
    """Somebody waits too long."""


@dataclass(slots=True, eq=False)
class Person:
    """One session's user: what was said so far, and what goes on."""

    session_id: int
    history: list[int]  # up to the last finished turn
    num_turns: int  # still to send
    request: Request | None = None
    reply: list[int] = field(default_factory=list)
    state: int = START  # of history, prompt and reply
    sent_at: int = 0  # step
    served_at: int = 0  # the last step with a row of the request
    is_pinned: bool = False
    was_pinned: bool = False  # at some time since the turn was sent


class Simulation:
    """`module` is the scheduler's, or a mutated one in the tests of the tests."""

    def __init__(self, module: ModuleType, scenario: Scenario, check_every: int = 25) -> None:
        self.scenario, self.check_every = scenario, check_every
        self.config = SchedulerConfig(
            scenario.num_blocks,
            scenario.block_size,
            scenario.max_model_len,
            scenario.max_num_seqs,
            scenario.max_num_batched_tokens,
            scenario.kv,
            scenario.num_host_slots,
        )
        self.rng = random.Random(scenario.seed)
        self.pool = WatchedPool(self)
        self.scheduler = module.Scheduler(self.config, self.pool)
        watch_giving_way(self)
        self.device = FakeDevice(scenario.num_blocks, scenario.block_size, scenario.seed)
        self.device.non_finite_rate = scenario.non_finite_rate
        self.people: dict[int, Person] = {}  # by session id, while the session is open
        self.foreground: int | None = None
        self.clock, self.num_steps, self.num_opened, self.last_id = 0.0, 0, 0, 0
        self.timers: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.counts: Counter[str] = Counter()
        self.longest_turn = self.longest_gap = 0  # in steps
        self.looked_at = 0  # the step in which the foreground changed
        self.num_compressed = 0  # tokens, in the step being made
        self.computed: dict[Sequence, int] = {}  # when it began

    def run(self) -> None:
        """Until all sessions are closed; raises on anything that should not be."""
        launched = None
        self.after(0.0, self.open)
        while self.timers or self.people or launched:
            self.fire_due()
            batch = self.schedule()
            self.do_something_at_once()
            if not self.scenario.is_late:
                if batch:
                    self.finish_step(batch)
                elif self.timers:
                    self.clock = max(self.clock, self.timers[0][0])
                continue
            sampled = self.device.launch(batch).tokens() if batch else None
            if launched:
                self.read(*launched)
            elif not batch and self.timers:
                self.clock = max(self.clock, self.timers[0][0])
            launched = (batch, sampled) if batch else None
        self.pool.check_integrity([])
        assert self.pool.num_held == 0, f"{self.pool.num_held} blocks are not home"
        self.scheduler.arena.check_integrity([])
        assert self.scheduler.schedule() is None

    # --- steps ---

    def schedule(self) -> Batch | None:
        """Schedule and check what every step must keep."""
        front = self.people.get(self.foreground)
        request = front.request if front else None
        num_preemptions = request.num_preemptions if request else 0
        waiting = [r for r in self.requests() if r.seq is None and r is not request]
        self.num_compressed = 0
        self.computed = {seq: n for _, seq, n in self.scheduler.sequences()}
        batch = self.scheduler.schedule()
        if request:
            assert request.num_preemptions == num_preemptions, "the foreground was a victim"
        still = [r.seq is None for r in waiting]
        assert still == sorted(still), "a background request overtook an older one"
        self.check_liveness(batch)
        if batch is None:
            return None
        self.num_steps += 1
        self.counts["steps without rows"] += not batch.rows
        num_tokens = sum(row.num_tokens for row in batch.rows)
        self.clock += 1 + num_tokens / 16
        assert num_tokens == batch.num_tokens <= self.config.max_num_batched_tokens, f"{num_tokens}"
        assert len({row.request for row in batch.rows}) == len(batch.rows)
        assert len(batch.rows) <= self.scheduler.num_running <= self.config.max_num_seqs
        return batch

    def requests(self) -> list[Request]:
        """Unfinished ones, in order of arrival."""
        requests = [person.request for person in self.people.values() if person.request]
        return sorted(requests, key=lambda request: request.request_id)

    def check_liveness(self, batch: Batch | None) -> None:
        """Nobody waits for ever, nobody that runs is passed over without a word."""
        served = {row.request for row in batch.rows} if batch else set()
        for person in self.people.values():
            request = person.request
            if request is None:
                continue
            if request in served:
                person.served_at = self.num_steps
                continue
            gap = self.num_steps - max(person.served_at, person.sent_at)
            self.longest_gap = max(self.longest_gap, gap)
            if gap > self.scenario.max_wait:
                raise Stalled(f"{gap} steps without a token, {request=}")
            is_ending = batch is None or request.num_pending_tokens > 0
            assert request.wait_reason or is_ending, f"waits without a word: {request=}"
            if person.session_id == self.foreground and not is_ending:
                # The reserve is filled up first; what is parked comes back as a whole.
                is_moving = request.wait_reason.startswith("waiting for memory, ")
                gap = min(gap, self.num_steps - self.looked_at)
                longest = self.config.kv.num_reserved + self.scenario.num_host_slots
                assert is_moving and gap <= longest, f"{gap=} {request=}"

    def finish_step(self, batch: Batch) -> None:
        """Launch and read in turn, or fail."""
        is_parking = any(isinstance(op, ParkBlock | RestoreBlock) for op in batch.block_ops)
        if self.rng.random() < self.scenario.failure_rate * (10 if is_parking else 1):
            self.counts["failures"] += 1
            self.device.launch_in_part(batch)
            if batch.rows and self.rng.random() < 0.5:
                self.interrupt(self.people[self.rng.choice(batch.rows).request.session_id])
            self.deliver(self.scheduler.fail(batch, "failed"))
        else:
            sampled = self.device.launch(batch).tokens()
            self.do_something_at_once()
            self.read(batch, sampled)

    def read(self, batch: Batch, sampled: list[int]) -> None:
        """Update, deliver the events, now and then look at all blocks."""
        self.deliver(self.scheduler.update(batch, sampled))
        if self.num_steps % self.check_every == 0:
            held = list(self.scheduler.sequences())
            self.pool.check_integrity([seq for _, seq, _ in held])
            parked = self.scheduler.parked
            self.scheduler.arena.check_integrity([*parked.values()])
            assert parked.keys().isdisjoint(session_id for session_id, _, _ in held), f"{parked=}"
            for session_id, seq, num_computed in held:
                is_idle = not self.people[session_id].request
                assert seq.num_tokens == num_computed or not is_idle, f"{num_computed} of {seq=}"

    def deliver(self, events: list[Event]) -> None:
        """Each person reads the own reply and compares it with the model on that chat alone."""
        for event in events:
            person = self.people[event.session_id]
            assert person.request and person.request.request_id == event.request_id, f"{event=}"
            for token_id in event.token_ids:
                assert token_id == next_token(person.state), f"a wrong token: {event=}"
                person.state = extend(person.state, token_id)
                person.reply.append(token_id)
            if event.finish_reason:
                self.end_turn(person, event.finish_reason)

    # --- people ---

    def after(self, delay: float, action: Callable[..., None], *args: object) -> None:
        """Do `action` later; equal times in the order of asking."""
        self.last_id += 1
        heapq.heappush(self.timers, (self.clock + delay, self.last_id, action, args))

    def fire_due(self) -> None:
        """Do all that is due by now."""
        while self.timers and self.timers[0][0] <= self.clock:
            _, _, action, args = heapq.heappop(self.timers)
            action(*args)

    def do_something_at_once(self) -> None:
        """Now and then somebody acts in the middle of a step."""
        if self.people and self.rng.random() < self.scenario.meddling:
            person = self.rng.choice(list(self.people.values()))
            actions = [self.interrupt, self.fork, self.look_at, self.undo]
            if self.config.kv.rungs:
                actions.append(self.pin)
            self.rng.choice(actions)(person)

    def open(self) -> None:
        """A new session; the next one comes later."""
        if self.num_opened < self.scenario.num_sessions:
            self.join(list(self.rng.choice(SYSTEM_PROMPTS)))
            self.after(self.rng.expovariate(1 / self.scenario.mean_gap), self.open)

    def join(self, history: list[int]) -> Person:
        self.num_opened += 1
        person = Person(self.num_opened, history, self.rng.choice([1, 1, 2, 2, 3, 4]))
        self.people[person.session_id] = person
        self.after(self.rng.random() * 5, self.send, person)
        if self.rng.random() < 0.3:
            self.look_at(person)
        return person

    def look_at(self, person: Person) -> None:
        self.foreground = person.session_id if self.rng.random() < 0.9 else None
        self.scheduler.set_foreground(self.foreground)
        self.looked_at = self.num_steps

    def send(self, person: Person) -> None:
        """The next turn, or good-bye."""
        if self.people.get(person.session_id) is not person or person.request:
            return
        person.num_turns -= 1
        if person.num_turns < 0:
            self.close(person)
            return
        num_new = self.rng.choice([1, 2, 3, 5, 8, 13, 30, self.config.max_request_tokens])
        prompt = person.history + [self.rng.randrange(1, 40) for _ in range(num_new)]
        limit, person.was_pinned = self.limit(person), person.is_pinned
        if self.rng.random() < 0.9:  # mostly it fits, sometimes exactly
            prompt = prompt[: limit - 1]
        self.last_id += 1
        max_tokens = self.rng.choice([1, 3, 8, 20, None])
        request = make_request(self.last_id, prompt, person.session_id, max_tokens)
        try:
            self.scheduler.submit(request)
        except CapacityError:
            assert len(prompt) >= limit
            self.counts["refused"] += 1
            self.close(person)
            return
        assert len(prompt) < limit
        person.request, person.reply, person.state = request, [], states_of(prompt)[-1]
        person.sent_at = self.num_steps
        self.counts["turns"] += 1
        if self.rng.random() < 0.1:
            self.after(self.rng.random() * 20, self.interrupt, person)
        if self.rng.random() < 0.1:
            self.after(self.rng.random() * 20, self.fork, person)
        if self.rng.random() < 0.05:
            self.after(self.rng.random() * 20, self.close, person)

    def end_turn(self, person: Person, reason: str) -> None:
        """Check how it ended; think; go on."""
        request, person.request = person.request, None
        assert request is not None and request.finish_reason == reason
        self.longest_turn = max(self.longest_turn, self.num_steps - person.sent_at)
        self.counts[reason] += 1
        prompt = request.token_ids[: request.num_prompt_tokens]
        if reason != "error":
            assert request.token_ids == prompt + person.reply, "a token was lost"
            person.history = request.token_ids[:]
        assert EOS_ID not in person.reply[:-1]
        if reason == "stop":
            assert person.reply[-1] == EOS_ID
        elif reason == "length":
            max_tokens, num_tokens = request.sampling.max_tokens, len(request.token_ids)
            is_full = num_tokens == self.config.max_request_tokens
            is_full |= person.was_pinned and num_tokens >= self.config.max_native_tokens
            assert is_full or len(person.reply) == max_tokens
        self.after(self.rng.random() * 30, self.send, person)

    def interrupt(self, person: Person) -> None:
        """Ctrl-C, now and then to say it in other words."""
        if person.request and self.people.get(person.session_id) is person:
            self.counts["aborted while parked"] += person.session_id in self.scheduler.parked
            event = self.scheduler.abort(person.request.request_id)
            self.deliver([event])
            if self.rng.random() < 0.3:
                self.undo(person)

    def undo(self, person: Person) -> None:
        """Take back the end of the chat, at once or only with the next turn."""
        if not person.request:
            num_tokens = self.rng.randrange(len(person.history) + 1)
            del person.history[num_tokens:]
            if self.rng.random() < 0.7:
                self.scheduler.trim(person.session_id, num_tokens)
            self.counts["undone"] += 1
            self.counts["undone while parked"] += person.session_id in self.scheduler.parked

    def pin(self, person: Person) -> None:
        """Keep it as it is, or no longer."""
        if self.people.get(person.session_id) is not person:
            return
        try:
            self.scheduler.set_pinned(person.session_id, not person.is_pinned)
        except CapacityError:
            self.counts["pins refused"] += 1
            return
        person.is_pinned = not person.is_pinned
        person.was_pinned |= person.is_pinned
        self.counts["pins"] += 1

    def limit(self, person: Person) -> int:
        """What the person's session can hold."""
        config = self.config
        return config.max_native_tokens if person.is_pinned else config.max_request_tokens

    def fork(self, person: Person) -> None:
        """A new session that shares what was said, now and then an unfinished reply as well."""
        is_open = self.people.get(person.session_id) is person
        num_more = min(self.scenario.num_sessions - self.num_opened, MAX_FORKING - len(self.people))
        if is_open and num_more > 0:
            said = person.history
            if person.request and self.rng.random() < 0.5:
                said = person.request.token_ids
            child = self.join(said[:])
            shared = self.scheduler.fork(person.session_id, child.session_id, len(child.history))
            assert shared.num_tokens + shared.num_lost_tokens <= len(child.history)
            self.counts["forks"] += 1
            self.counts["forks while parked"] += person.session_id in self.scheduler.parked
            self.counts["forks that share"] += shared.num_tokens > 0
            self.counts["forks that lose"] += shared.num_lost_tokens > 0

    def close(self, person: Person) -> None:
        """Close the window, whatever goes on."""
        if self.people.pop(person.session_id, None) is not person:
            return
        self.counts["closed while parked"] += person.session_id in self.scheduler.parked
        event = self.scheduler.release(person.session_id)
        assert (event is not None) == (person.request is not None), f"{event=}"
        self.counts["closed while generating"] += event is not None
        if self.foreground == person.session_id:
            self.look_at(self.rng.choice([*self.people.values()] or [person]))
