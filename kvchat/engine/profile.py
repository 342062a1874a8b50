"""`--profile`: where a step's time goes, as a table and as a trace for a browser's trace viewer.

A profiler puts timed methods into the objects of one engine, found from the engine by what they
can do; these objects know nothing of it, and without a profiler nothing is timed or asked. Times
are the host's: where a device works by itself, a part is what it takes to hand the work over.
The trace has the Trace Event Format that chrome://tracing and ui.perfetto.dev read.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvchat import __version__
from kvchat.engine.engine import Engine
from kvchat.errors import UsageError, quoted

MAX_SPANS = 200_000  # kept for the trace, the last ones: about 30 MiB, and 20 MB of file
STEP = "rest of the step"
LAUNCH = "rest of the forward pass"
WAIT = "waiting for tokens"
HAND_OVER = "events handed over"  # the listener, which whoever knows it has timed
# What an object does, by the methods it has: the part of a step that each of them is, or "" for
# one that only tells what the object is.
ROLES: tuple[dict[str, str], ...] = (
    {"schedule": "schedule", "update": "update"},
    {"apply": "block operations", "audit": ""},
    {"plan": "plan", "write_kv": "write_kv", "attend": "attend"},
    {"norm": "norm", "linear": "products", "add_linear": "products", "gated": "products"},
    {"sample": "sampling"},
    {"greedy": "sampling", "draw": "sampling"},
    {"launch": LAUNCH, "count_bytes": ""},
    {"step": STEP, "_read": WAIT, "submit": ""},
)
# The rows of the table, in order; parts of other threads and of listeners come after them.
STEP_PARTS = (
    "schedule",
    "block operations",
    "plan",
    "norm",
    "products",
    "write_kv",
    "attend",
    "sampling",
    LAUNCH,
    WAIT,
    "update",
    HAND_OVER,
    STEP,
)


# Told of every engine whose steps are to be timed, before its first one.
Watch = Callable[[Engine], None]


def unwatched(engine: Engine) -> None:
    """No profiler: nothing is timed."""


# A call that has ended: its name, its part, the thread's id, when it began and how long it took, in
# nanoseconds of one clock.
Span = tuple[str, str, int, int, int]


class _Total:
    """What the calls of one part came to in one thread, in nanoseconds."""

    __slots__ = ("alone_ns", "num_calls")

    def __init__(self) -> None:
        self.num_calls = 0
        self.alone_ns = 0  # without the calls in them


class _Thread(threading.local):
    """What each thread has of its own; `threads` gets all of them."""

    def __init__(self, threads: list[tuple[int, str, dict[str, _Total]]]) -> None:
        self.id = threading.get_native_id()
        self.inside_ns: list[int] = []  # in calls within the open ones, innermost last
        self.totals: dict[str, _Total] = defaultdict(_Total)
        threads.append((self.id, threading.current_thread().name, self.totals))


class Profiler:
    """Times calls, by part and as spans. Parts are times of a call without the calls in it."""

    def __init__(
        self, max_spans: int = MAX_SPANS, clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self.spans: deque[Span] = deque(maxlen=max_spans)
        self.num_steps = 0
        self.steps_ns = 0  # in steps, all they call included
        self._first_ns = self._last_ns = 0  # a step began, a step ended
        self._clock = clock
        self._threads: list[tuple[int, str, dict[str, _Total]]] = []
        self._thread = _Thread(self._threads)
        self._timed: list[tuple[dict[str, Any], str]] = []

    @property
    def num_spans(self) -> int:
        """Calls timed, kept or not."""
        return sum(calls for calls, _ in self.parts().values())

    def watch(self, engine: Engine) -> None:
        """Time the engine's steps and what they call: every object of kvchat's own that it leads
        to and that has a role. Objects that are watched already stay so."""
        for item in _owned(engine):
            for role in ROLES:
                if all(callable(getattr(item, name, None)) for name in role):
                    for name, part in role.items():
                        if part:
                            self._time(item, name, part, needs_open=part != STEP)

    def time(self, owner: object, name: str, part: str) -> None:
        """Time one method of one object from now on, wherever it is called."""
        self._time(owner, name, part, needs_open=False)

    def unwatch(self) -> None:
        """Give every object its own methods back."""
        while self._timed:
            members, name = self._timed.pop()
            del members[name]

    def parts(self) -> dict[str, tuple[int, int]]:
        """Calls and nanoseconds by part, over all threads."""
        found: dict[str, tuple[int, int]] = {}
        for _, _, totals in self._threads.copy():  # others may still be running
            for part, total in totals.copy().items():
                calls, alone_ns = found.get(part, (0, 0))
                found[part] = (calls + total.num_calls, alone_ns + total.alone_ns)
        return found

    def table(self) -> list[list[str]]:
        """Part, milliseconds a step, share of the steps' time, calls a step; what is outside of
        steps below the sum."""
        rows = [["part", "ms a step", "share", "calls a step"]]
        parts = self.parts()
        for name in (*STEP_PARTS, *(name for name in parts if name not in STEP_PARTS)):
            if name in parts:
                rows.append([name, *self._cells(*parts[name])])
            if name == STEP:
                rows.append(["a step, all of it", *self._cells(self.num_steps, self.steps_ns)])
        return rows

    def lines(self) -> list[str]:
        """The table as text, and what it covers and costs."""
        if not self.num_steps:
            return ["profile: no step has run"]
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        parts = self.parts()
        named = sum(parts[name][1] for name in STEP_PARTS[:-1] if name in parts)
        cost_ns = self.num_spans * _span_cost_ns()
        return [
            f"profile: {self.num_steps:,} steps took {self.steps_ns / 1e9:.2f} s of"
            f" {(self._last_ns - self._first_ns) / 1e9:.2f} s from the first to the last",
            *lines,
            f"the parts above the rest cover {named / self.steps_ns:.1%} of a step; timing"
            f" {self.num_spans:,} calls cost about {cost_ns / self.steps_ns:.1%}",
        ]

    def about(self) -> dict[str, Any]:
        """What the trace says of itself."""
        kept = len(self.spans)
        return {"program": f"kvchat {__version__}", "calls": self.num_spans, "kept": kept}

    def events(self) -> Iterator[dict[str, Any]]:
        """The threads' names and the spans that were kept, as a trace viewer reads them; times in
        microseconds."""
        for thread_id, name, _ in self._threads.copy():
            event = {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread_id}
            yield event | {"args": {"name": name}}
        spans = self.spans.copy()  # others may still be running
        first_ns = min((span[3] for span in spans), default=0)
        for name, part, thread_id, start_ns, took_ns in spans:
            event = {"name": name, "cat": part, "ph": "X", "pid": 1, "tid": thread_id}
            yield event | {"ts": (start_ns - first_ns) / 1000, "dur": took_ns / 1000}

    def _cells(self, num_calls: int, took_ns: int) -> list[str]:
        return [
            f"{took_ns / self.num_steps / 1e6:.3f}",
            f"{took_ns / self.steps_ns:.1%}",
            f"{num_calls / self.num_steps:,.1f}",
        ]

    def _time(self, owner: object, name: str, part: str, needs_open: bool) -> None:
        members = owner.__dict__
        if name not in members:
            label = f"{type(owner).__name__}.{name}"
            members[name] = self._make_timed(getattr(owner, name), label, part, needs_open)
            self._timed.append((members, name))

    def _make_timed(
        self, method: Callable[..., object], label: str, part: str, needs_open: bool
    ) -> Callable[..., object]:
        """The method, timed; with needs_open only within another timed call."""
        clock, thread, is_step = self._clock, self._thread, part == STEP

        def timed(*arguments: object, **named: object) -> object:
            open_ns = thread.inside_ns
            if needs_open and not open_ns:
                return method(*arguments, **named)
            found: object = None
            open_ns.append(0)
            start_ns = clock()
            try:
                found = method(*arguments, **named)
                return found
            finally:
                took_ns = clock() - start_ns
                alone_ns = took_ns - open_ns.pop()
                if open_ns:
                    open_ns[-1] += took_ns
                if not is_step:
                    self._keep(label, part, start_ns, took_ns, alone_ns)
                elif found is not False:  # there was something to do
                    self._keep(label, part, start_ns, took_ns, alone_ns)
                    self._count_step(start_ns, took_ns)

        return timed

    def _keep(self, label: str, part: str, start_ns: int, took_ns: int, alone_ns: int) -> None:
        thread = self._thread
        self.spans.append((label, part, thread.id, start_ns, took_ns))
        total = thread.totals[part]
        total.num_calls += 1
        total.alone_ns += alone_ns

    def _count_step(self, start_ns: int, took_ns: int) -> None:
        self._first_ns = self._first_ns or start_ns
        self._last_ns = start_ns + took_ns
        self.num_steps += 1
        self.steps_ns += took_ns


@contextmanager
def profiling(path: Path | None, note: Callable[[str], None]) -> Iterator[Profiler | None]:
    """What `--profile FILE` asks for, from start to exit; None without a file.

    Raises UsageError at once when the file cannot be written. On the way out, whatever the reason,
    the trace is written and `note` is told the table.
    """
    if path is None:
        yield None
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"--profile {quoted(str(path))}: {error.strerror}") from None
    profiler = Profiler()
    try:
        yield profiler
    finally:
        profiler.unwatch()
        note("\n".join([*profiler.lines(), _write(profiler, path)]))


def _write(profiler: Profiler, path: Path) -> str:
    """The trace into its file, an event a line; what to say of it."""
    about = profiler.about()
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)},')
            separator = ' "traceEvents": [\n'
            for event in profiler.events():
                file.write(separator + json.dumps(event))
                separator = ",\n"
            file.write("\n]}\n")
    except OSError as error:
        return f"--profile {quoted(str(path))} was not written: {error.strerror}"
    cut = f" (the last of {about['calls']:,})" if about["kept"] < about["calls"] else ""
    return f"{about['kept']:,} spans{cut} in {quoted(str(path))}: open it in ui.perfetto.dev"


def _owned(engine: Engine) -> Iterator[object]:
    """The engine and kvchat's own objects that it leads to, once each."""
    waiting: list[object] = [engine]
    seen = set[int]()
    while waiting:
        item = waiting.pop()
        is_own = type(item).__module__.partition(".")[0] == "kvchat" and hasattr(item, "__dict__")
        if is_own and id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += vars(item).values()


def _span_cost_ns() -> float:
    """What it takes to time one call of a method that does nothing."""
    profiler, calls = Profiler(max_spans=1), range(2000)
    timed = profiler._make_timed(_nothing, "", "", False)
    started = time.perf_counter_ns()
    for _ in calls:
        timed()
    middle = time.perf_counter_ns()
    for _ in calls:
        _nothing()
    return max(0.0, (2 * middle - started - time.perf_counter_ns()) / len(calls))


def _nothing() -> None:
    pass
