"""`kvchat bench decode`: tokens a second of many chats that all generate, and of prompts alone.

Prompts are random ids, replies are greedy and do not end. A case's clock runs once every session
has its first token and some steps more are done, so no prompt is in it; what the scheduler and the
sampler do for a step is.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from kvchat.bench.arms import (
    Arm,
    Compute,
    Model,
    load_model,
    make_arm,
    make_setup,
    max_batch_tokens,
)
from kvchat.config import KV_RUNGS, KVPolicy, SamplingParams
from kvchat.engine.engine import StepHandle, StepRunner
from kvchat.engine.ledger import TensorBytes
from kvchat.engine.request import Batch, Event, Request
from kvchat.errors import EngineError, UsageError, quoted
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.model.source import Progress

_WARM_UP_STEPS = 8
_MAX_SESSIONS, _MAX_PROMPT = 4096, 1_000_000
_SPARE_BLOCKS = 16  # the reserve, the null block


@dataclass(frozen=True)
class DecodeCase:
    """So many sessions, each with a prompt of so many tokens, in a mode of the KV cache."""

    num_sessions: int
    num_prompt: int
    mode: str = "native"

    @property
    def name(self) -> str:
        """As in 8x4096:int8."""
        return f"{self.num_sessions}x{self.num_prompt}:{self.mode}"


@dataclass(frozen=True)
class DecodeSpeed:
    """A measured case. host_us: of a step, the host's own work: all but waiting for the device,
    and on a CPU, which computes in the launch, all but that."""

    case: DecodeCase
    num_steps: int
    step_us: float
    host_us: float
    launch_us: float

    @property
    def tokens_a_second(self) -> float:
        """Of all sessions together."""
        return self.case.num_sessions / self.step_us * 1e6

    @property
    def line(self) -> str:
        """For people."""
        return (
            f"{self.case.name:16} {self.tokens_a_second:10,.1f} t/s"
            f" {self.step_us:10,.0f} us a step, of these {self.host_us:,.0f} the host's"
        )

    def record(self) -> dict[str, Any]:
        """For programs."""
        named = {"case": self.case.name, "tokens_a_second": self.tokens_a_second}
        return {**asdict(self), **named}


@dataclass(frozen=True)
class PromptSpeed:
    """Median seconds from the submit of a prompt, with nobody else there, to its first token."""

    num_prompt: int
    seconds: float

    @property
    def name(self) -> str:
        """As in prompt 512."""
        return f"prompt {self.num_prompt}"

    @property
    def tokens_a_second(self) -> float:
        """Of the prompt."""
        return self.num_prompt / self.seconds

    @property
    def line(self) -> str:
        """For people."""
        ms = 1e3 * self.seconds
        return f"{self.name:16} {self.tokens_a_second:10,.1f} t/s {ms:10,.1f} ms to the first token"

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {"case": self.name, "tokens_a_second": self.tokens_a_second, **asdict(self)}


@dataclass(frozen=True)
class DecodeFlags:
    """What a person chose: a model or a shape, cases as parse_case reads them, prompt lengths."""

    model: str | None
    shape: str | None
    dtype: str
    block: str
    cases: tuple[str, ...]
    prompts: tuple[int, ...]
    num_steps: int
    reps: int
    output: str  # text or jsonl
    device: str = "auto"
    weights: str = "auto"
    no_graphs: bool = False


def lines(flags: DecodeFlags, progress: Progress) -> Iterator[str]:
    """A line for each case and each prompt as soon as it is measured, as text after one that says
    what is measured. Raises KvchatError."""
    cases = [parse_case(text) for text in flags.cases]
    if not cases and not flags.prompts:
        cases = [DecodeCase(8, 512)]
    compute = Compute(flags.device, flags.weights, not flags.no_graphs)
    model = load_model(flags.model, flags.shape, flags.dtype, int(flags.block), progress, compute)
    found: Iterator[DecodeSpeed | PromptSpeed] = chain(
        run_decode_bench(model, cases, flags.num_steps, progress),
        run_prompt_bench(model, flags.prompts, flags.reps, progress),
    )
    about = {"model": model.name, "dtype": model.spec.dtype, "attention": model.attention}
    if flags.output == "text":
        yield f"{model.name}  {model.spec.dtype}  {model.device}  attention: {model.attention}"
    for speed in found:
        yield json.dumps(about | speed.record()) if flags.output == "jsonl" else speed.line


def parse_case(text: str) -> DecodeCase:
    """`8x4096` or `8x4096:int8`. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,7})x(\d{1,7})(?::(\w+))?", text)
    mode = (found[3] or "native") if found else ""
    if not found or mode not in KV_RUNGS:
        raise UsageError(
            f"{quoted(text, 40)}: write SESSIONSxTOKENS or SESSIONSxTOKENS:MODE as 8x4096:int8,"
            f" a mode of {', '.join(KV_RUNGS)}"
        )
    case = DecodeCase(int(found[1]), int(found[2]), mode)
    if not (0 < case.num_sessions <= _MAX_SESSIONS and 0 < case.num_prompt <= _MAX_PROMPT):
        raise UsageError(f"{text}: 1 to {_MAX_SESSIONS} sessions, 1 to {_MAX_PROMPT:,} tokens")
    return case


def run_decode_bench(
    model: Model, cases: list[DecodeCase], num_steps: int, progress: Progress
) -> Iterator[DecodeSpeed]:
    """Measure case after case, those of one mode in one pool."""
    for mode in dict.fromkeys(case.mode for case in cases):
        own = [case for case in cases if case.mode == mode]
        arm = _make_arm(model, mode, own, num_steps, progress)
        for case in own:
            progress(case.name, 0, 1)
            yield _Bench(model, arm).decode(case, num_steps)
            progress(case.name, 1, 1)


def run_prompt_bench(
    model: Model, lengths: Sequence[int], reps: int, progress: Progress
) -> Iterator[PromptSpeed]:
    """Measure prompts of these lengths, each alone; one repetition before is not counted."""
    if not lengths:
        return
    arm = _make_arm(model, "native", [DecodeCase(2, max(lengths))], 1, progress)
    bench = _Bench(model, arm)
    for length in lengths:
        progress(f"prompt {length}", 0, 1)
        seconds = [bench.prompt(length) for _ in range(reps + 1)][1:]
        yield PromptSpeed(length, statistics.median(seconds))
        progress(f"prompt {length}", 1, 1)


def _make_arm(
    model: Model, mode: str, cases: list[DecodeCase], num_steps: int, progress: Progress
) -> Arm:
    """A pool that holds each of the cases native, and what computes over it."""
    budget = max(max_batch_tokens(model.device), 2 * max(case.num_sessions for case in cases))
    longest = max(_num_tokens(case, num_steps, budget) for case in cases)
    size = model.spec.block_size
    num_blocks = _SPARE_BLOCKS + max(
        case.num_sessions * (2 - (-_num_tokens(case, num_steps, budget) // size)) for case in cases
    )
    num_bytes = num_blocks * BlockLayout(model.spec, _lowest(mode)).bytes_per_block
    max_seqs = max(case.num_sessions for case in cases)
    return make_arm(model, make_setup(model, mode, num_bytes, longest, max_seqs, budget), progress)


def _lowest(mode: str) -> Codec:
    return Codec(max((dst for _, dst in KV_RUNGS[mode]), default=0))


def _num_tokens(case: DecodeCase, num_steps: int, budget: int) -> int:
    """The longest that a session of the case may become: who was first generates while the others'
    prompts are read, in steps of `budget` tokens less one for each session that generates."""
    prompts = case.num_sessions * case.num_prompt
    num_before = -(-prompts // (budget - case.num_sessions)) + case.num_sessions
    if KV_RUNGS[case.mode]:
        num_before += prompts // KVPolicy.slice_tokens  # until they are compressed
    return case.num_prompt + 2 * num_before + _WARM_UP_STEPS + num_steps + 2


class _Watch:
    """A runner that notes how long launches and waits take."""

    def __init__(self, runner: StepRunner) -> None:
        self.is_async = runner.is_async
        self.launch_s = self.wait_s = 0.0
        self._runner = runner

    def launch(self, batch: Batch) -> StepHandle:
        """The runner's."""
        started = time.perf_counter()
        handle = self._runner.launch(batch)
        self.launch_s += time.perf_counter() - started
        return _WatchedStep(handle, self)

    def count_bytes(self) -> TensorBytes:
        """The runner's."""
        return self._runner.count_bytes()

    @property
    def device_s(self) -> float:
        """Seconds in which the host did nothing of its own."""
        return self.wait_s if self.is_async else self.launch_s


class _WatchedStep:
    def __init__(self, handle: StepHandle, watch: _Watch) -> None:
        self._handle, self._watch = handle, watch

    def tokens(self) -> list[int]:
        started = time.perf_counter()
        tokens = self._handle.tokens()
        self._watch.wait_s += time.perf_counter() - started
        return tokens


class _Bench:
    """An empty engine over the arm's pool."""

    def __init__(self, model: Model, arm: Arm) -> None:
        self._vocab, self._rng = model.vocab, random.Random(0)
        self._watch = _Watch(arm.runner)
        self._engine, self._scheduler = arm.setup.start(self._watch, self._take)
        self._config = arm.setup.config
        self._num_requests = 0
        self._num_come: dict[int, int] = {}  # tokens, by session

    def decode(self, case: DecodeCase, num_steps: int) -> DecodeSpeed:
        """All sessions generate for so many steps."""
        for session_id in range(case.num_sessions):
            longest = self._config.max_request_tokens
            self._submit(session_id, case.num_prompt, longest - case.num_prompt)
        while min(self._num_come.values()) < 1 or self._is_compressing():
            self._step()
        for _ in range(_WARM_UP_STEPS):
            self._step()
        num_before = sum(self._num_come.values())
        device_s, launch_s = self._watch.device_s, self._watch.launch_s
        started = time.perf_counter()
        for _ in range(num_steps):
            self._step()
        seconds = time.perf_counter() - started
        num_tokens = sum(self._num_come.values()) - num_before
        if num_tokens != num_steps * case.num_sessions:
            raise EngineError(f"{case.name}: {num_tokens} tokens in {num_steps} steps")
        device_s, launch_s = self._watch.device_s - device_s, self._watch.launch_s - launch_s
        self._end()
        us = 1e6 / num_steps
        return DecodeSpeed(case, num_steps, us * seconds, us * (seconds - device_s), us * launch_s)

    def prompt(self, num_prompt: int) -> float:
        """Seconds to the first token of a prompt that nobody has seen."""
        session_id = self._num_requests
        started = time.perf_counter()
        self._submit(session_id, num_prompt, 1)
        while not self._num_come[session_id]:
            self._step()
        seconds = time.perf_counter() - started
        self._end()
        return seconds

    def _submit(self, session_id: int, num_prompt: int, num_reply: int) -> None:
        ids = self._rng.choices(self._vocab, k=num_prompt)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_reply, ignore_eos=True)
        self._num_requests += 1
        self._num_come[session_id] = 0
        self._engine.submit(Request(self._num_requests, session_id, ids, num_prompt, sampling))

    def _is_compressing(self) -> bool:
        """An eager mode is behind with the prompts: more blocks are held than it means to hold."""
        kv, size = self._config.kv, self._config.block_size
        lengths = [seq.num_tokens for _, seq, _ in self._scheduler.sequences()]
        num_meant = sum(kv.num_blocks(length, size) + kv.span_blocks[-1] for length in lengths)
        return kv.is_eager and self._scheduler.pool.num_held > num_meant

    def _step(self) -> None:
        if not self._engine.step():
            raise EngineError("the replies ended early; run again with --debug")

    def _end(self) -> None:
        """Every session leaves, and what is launched is waited for."""
        for session_id in [*self._num_come]:
            self._engine.release(session_id)
        while self._engine.step():
            pass
        self._num_come = {}

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if event.error:
                raise EngineError(event.error)
            if event.session_id in self._num_come:
                self._num_come[event.session_id] += len(event.token_ids)
