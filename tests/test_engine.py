"""The engine: events from a worker thread, calls at any time, failures that stay small."""

from __future__ import annotations

import queue
import random
import threading

import pytest
from fake_device import EOS_ID, FakeDevice, continuation, make_request

from kvchat.config import SchedulerConfig
from kvchat.engine.engine import Engine
from kvchat.engine.scheduler import Scheduler
from kvchat.engine.stats import SessionKV
from kvchat.errors import CapacityError, EngineError
from kvchat.kv.block_pool import BlockPool

BLOCK_SIZE = 4
TIMEOUT_S = 20
NEVER_EOS = frozenset()


class House:
    """An engine over a device, and all the events it sent."""

    def __init__(self, device=None, num_blocks=101, **config):
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.device = device or FakeDevice(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(SchedulerConfig(num_blocks, BLOCK_SIZE, **config), self.pool)
        self.inbox = queue.SimpleQueue()
        self.events = []
        self.engine = Engine(self.scheduler, self.device, self.inbox.put, bytes_per_block=1000)

    def submit(self, request_id, tokens, session_id=None, max_tokens=None, **sampling):
        sampling.setdefault("stop_token_ids", NEVER_EOS)
        request = make_request(request_id, tokens, session_id, max_tokens, **sampling)
        self.engine.submit(request)
        return request

    def next_event(self):
        """The next event, which must come within TIMEOUT_S."""
        if not self.events:
            self.events += self.inbox.get(timeout=TIMEOUT_S)
        return self.events.pop(0)

    def until_finished(self, request_ids):
        """All events until these have ended."""
        seen, left = [], set(request_ids)
        while left:
            seen.append(self.next_event())
            if seen[-1].finish_reason:
                left.discard(seen[-1].request_id)
        return seen

    def drain(self):
        """Events that are there already."""
        found, self.events = self.events, []
        while not self.inbox.empty():
            found += self.inbox.get()
        return found

    def assert_all_home(self):
        self.pool.check_integrity([])
        assert self.pool.num_free == self.pool.num_usable


@pytest.fixture
def house():
    house = House()
    yield house
    house.engine.close()


@pytest.fixture(autouse=True, params=[False, True], ids=["sync", "async"])
def is_async(request, monkeypatch):
    """Whether a step is read before the next is launched, or after that."""
    monkeypatch.setattr(FakeDevice, "is_async", request.param)
    return request.param


@pytest.fixture
def read_at_once(is_async):
    """For tests that count steps."""
    if is_async:
        pytest.skip("counts steps that are read before the next is launched")


class GatedDevice(FakeDevice):
    """Each launch waits until the test lets it go on."""

    def __init__(self):
        super().__init__(101, BLOCK_SIZE)
        self.launched, self.gate = threading.Event(), threading.Semaphore(0)

    def launch(self, batch):
        self.launched.set()
        assert self.gate.acquire(timeout=TIMEOUT_S)
        return super().launch(batch)


class FailingDevice(FakeDevice):
    """The n-th launch raises."""

    def __init__(self, failing, error):
        super().__init__(101, BLOCK_SIZE)
        self.num_launches, self.failing, self.error = 0, failing, error

    def launch(self, batch):
        self.num_launches += 1
        if self.num_launches == self.failing:
            raise self.error
        return super().launch(batch)


def text(num_tokens, start=1000):
    return list(range(start, start + num_tokens))


def tokens_of(events, request_id):
    return [t for e in events if e.request_id == request_id for t in e.token_ids]


# --- without a thread ---


@pytest.mark.usefixtures("read_at_once")
def test_step_does_one_step_and_says_when_there_is_nothing_to_do(house):
    assert house.engine.step() is False
    house.submit(1, text(5), max_tokens=2)

    assert [house.engine.step() for _ in range(3)] == [True, True, False]
    assert [(e.token_ids, e.finish_reason) for e in house.drain()] == [
        ((continuation(text(5), 2)[0],), None),
        ((continuation(text(5), 2)[1],), "length"),
    ]


def test_a_prompt_that_never_fits_is_refused_by_submit(house):
    with pytest.raises(CapacityError, match="at most 399 fit"):
        house.submit(1, text(500))

    assert house.engine.step() is False


@pytest.mark.usefixtures("read_at_once")
def test_stats_count_requests_blocks_and_tokens():
    house = House(max_num_seqs=2)
    for request_id in (1, 2, 3):
        house.submit(request_id, text(9, request_id * 100), max_tokens=3)
    house.engine.step()
    house.engine.step()

    stats = house.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_blocks, stats.num_blocks_used) == (100, 6)
    assert (stats.num_blocks_cached, stats.num_blocks_free) == (0, 94)
    assert (stats.num_steps, stats.num_decode_steps, stats.num_decode_rows) == (2, 1, 2)
    assert (stats.num_scheduled_tokens, stats.num_generated_tokens) == (20, 4)
    assert stats.mean_decode_batch == 2.0
    house.engine.release(1)
    assert house.engine.stats().num_blocks_cached == 2


def test_eight_running_replies_share_every_decode_step():
    house = House()
    for request_id in range(8):
        house.submit(request_id, text(9, request_id * 100), max_tokens=20)
    while house.engine.step():
        pass

    assert house.engine.stats().mean_decode_batch == 8.0


@pytest.mark.usefixtures("read_at_once")
def test_the_pool_map_and_a_sessions_share_of_it(house):
    house.submit(1, text(9), session_id=7, max_tokens=1)
    house.engine.step()
    house.engine.fork(7, 8, 4)
    house.submit(2, text(5, 50), session_id=9, max_tokens=1)
    house.engine.step()
    house.engine.release(9)

    owners = [owner for owner, _ in house.engine.pool_map()]
    assert owners[:7] == ["null", "shared", 7, 7, "cached", "free", "free"]
    assert house.engine.session_kv(7)[:3] == (9, 3, 3000)
    assert house.engine.session_kv(8)[:3] == (4, 1, 1000)
    assert house.engine.session_kv(9) == SessionKV(0, 0, 0)
    house.engine.trim(7, 5)
    assert house.engine.session_kv(7).num_tokens == 5


# --- with its thread ---


def test_replies_stream_from_the_worker_each_with_its_own_text(house):
    house.engine.start()
    for request_id in range(8):
        house.submit(request_id, text(20, request_id * 100), max_tokens=30)

    events = house.until_finished(range(8))

    for request_id in range(8):
        prompt = text(20, request_id * 100)
        assert tokens_of(events, request_id) == continuation(prompt, 30)
        reasons = [e.finish_reason for e in events if e.request_id == request_id]
        assert reasons == [None] * 29 + ["length"]


def test_the_worker_sleeps_without_work_and_wakes_for_a_request(house):
    house.engine.start()
    for request_id in range(3):
        house.submit(request_id, text(3), session_id=request_id, max_tokens=2)
        assert tokens_of(house.until_finished([request_id]), request_id) == continuation(text(3), 2)


def test_calls_are_answered_while_the_model_computes():
    device = GatedDevice()
    house = House(device)
    house.engine.start()
    house.submit(1, text(9), session_id=1)
    house.submit(2, text(9, 50), session_id=2)
    assert device.launched.wait(TIMEOUT_S)

    event = house.engine.abort(1)
    house.engine.set_foreground(2)
    house.submit(3, text(9, 70), session_id=3)
    house.engine.trim(1, 0)

    assert (event.request_id, event.finish_reason) == (1, "abort")
    assert house.next_event() == event  # delivered though the step is not done
    assert house.engine.abort(1) is None
    assert house.engine.stats().num_running == 0 or house.engine.stats().num_waiting == 1
    for _ in range(3):
        device.gate.release()
    later = [house.next_event() for _ in range(3)]
    assert {e.request_id for e in later} == {2, 3}
    for _ in range(100):
        device.gate.release()
    house.engine.close()
    house.assert_all_home()


def test_close_lets_the_step_end_and_aborts_what_runs_and_waits():
    device = GatedDevice()
    house = House(device, max_num_seqs=1)
    house.engine.start()
    house.submit(1, text(9), session_id=1)
    house.submit(2, text(9), session_id=2)
    assert device.launched.wait(TIMEOUT_S)
    closer = threading.Thread(target=house.engine.close)
    closer.start()
    while not house.engine._is_closed:
        pass
    device.gate.release()
    closer.join(TIMEOUT_S)

    assert not closer.is_alive()
    assert [(e.request_id, len(e.token_ids), e.finish_reason) for e in house.drain()] == [
        (1, 1, None),
        (1, 0, "abort"),
        (2, 0, "abort"),
    ]
    house.assert_all_home()
    with pytest.raises(EngineError, match="closed"):
        house.submit(3, text(3))
    house.engine.close()


def test_close_without_a_worker_gives_everything_back():
    house = House()
    house.submit(1, text(9))
    house.engine.step()

    house.engine.close()

    assert [e.finish_reason for e in house.drain()] == [None, "abort"]
    house.assert_all_home()


# --- failures ---


def test_a_failed_step_ends_its_requests_with_a_sentence_and_others_go_on(caplog):
    house = House(FailingDevice(2, RuntimeError("no\x1b memory\nleft")), max_num_seqs=2)
    for request_id in (1, 2, 3):
        house.submit(request_id, text(9, request_id * 100), max_tokens=3)
    house.engine.start()

    events = house.until_finished([1, 2, 3])

    ends = {e.request_id: (e.finish_reason, e.error) for e in events if e.finish_reason}
    failed = ("error", r"the step failed (RuntimeError: no\x1b memory\nleft); send again")
    assert ends == {1: failed, 2: failed, 3: ("length", "")}
    assert tokens_of(events, 3) == continuation(text(9, 300), 3)
    assert "Traceback" in caplog.text and "RuntimeError" in caplog.text
    house.submit(4, text(9, 100), session_id=1, max_tokens=3)
    assert tokens_of(house.until_finished([4]), 4) == continuation(text(9, 100), 3)
    house.engine.close()
    house.assert_all_home()


@pytest.mark.usefixtures("read_at_once")
def test_a_step_that_answers_for_too_few_rows_ends_its_requests():
    class ShortDevice(FakeDevice):
        def launch(self, batch):
            step = super().launch(batch)
            step.sampled = step.sampled[:-1]
            return step

    house = House(ShortDevice(101, BLOCK_SIZE))
    for request_id in (1, 2):
        house.submit(request_id, text(9, request_id * 100), max_tokens=1)
    assert house.engine.step() is True

    ends = [(e.request_id, e.finish_reason) for e in house.drain()]
    assert ends == [(1, "error"), (2, "error")]
    assert house.engine.step() is False


@pytest.mark.usefixtures("read_at_once")
def test_replies_that_ended_before_an_update_failed_are_told_all_the_same(monkeypatch):
    house = House()
    for request_id, num_tokens in ((1, 3), (2, 4)):
        house.submit(request_id, text(num_tokens), max_tokens=1)
    monkeypatch.setattr(house.pool, "seal", lambda *args: 1 // 0)  # the first fills no block

    house.engine.step()

    ends = [(e.request_id, e.token_ids, e.finish_reason) for e in house.drain()]
    assert ends == [(1, tuple(continuation(text(3), 1)), "length"), (2, (), "error")]
    assert house.engine.step() is False


def test_an_error_of_the_scheduler_itself_ends_every_request_and_never_spins(monkeypatch):
    house = House()
    house.submit(1, text(9))
    monkeypatch.setattr(house.scheduler, "_serve", lambda *args: 1 // 0)

    assert house.engine.step() is True

    assert [(e.request_id, e.finish_reason) for e in house.drain()] == [(1, "error")]
    assert house.engine.step() is False
    house.assert_all_home()


def test_a_row_that_is_not_finite_ends_with_a_sentence_and_the_rest_goes_on():
    house = House()
    house.device.non_finite_rate = 1.0
    house.submit(1, text(9))
    events = []
    while not events:
        house.engine.step()
        events = house.drain()
    house.device.non_finite_rate = 0.0
    house.submit(2, text(9), session_id=1, max_tokens=2)
    while house.engine.step():
        pass

    events += house.drain()
    assert events[0].finish_reason == "error" and "not finite" in events[0].error
    assert tokens_of(events, 2) == continuation(text(9), 2)


# --- anything at any time ---


@pytest.mark.parametrize("seed", range(3))
def test_sessions_come_and_go_at_any_time_and_nothing_is_lost_or_left(seed):
    house = House(num_blocks=40, max_num_batched_tokens=16)
    house.engine.start()
    rng = random.Random(seed)
    requests, events = {}, []
    for request_id in range(1, 301):
        prompt = [rng.choice((1, 2)) for _ in range(rng.randrange(1, 40))]
        stop = frozenset({EOS_ID})
        max_tokens = rng.choice((1, 5, 30))
        requests[request_id] = house.submit(
            request_id, prompt, max_tokens=max_tokens, stop_token_ids=stop
        )
        victim = rng.randrange(1, request_id + 1)
        rng.choice(
            [
                lambda victim: None,
                house.engine.abort,
                house.engine.release,
                house.engine.set_foreground,
                lambda victim: house.engine.trim(victim, 5),
                lambda victim, child=1000 + request_id: house.engine.fork(victim, child, 8),
            ]
        )(victim)
        if request_id % 20 == 0:
            events += house.until_finished([request_id])

    ended = {event.request_id for event in events if event.finish_reason}
    events += house.until_finished(requests.keys() - ended)
    house.engine.close()

    house.assert_all_home()
    assert house.drain() == []
    for request_id, request in requests.items():
        prompt = request.token_ids[: request.num_prompt_tokens]
        reply = tokens_of(events, request_id)
        assert prompt + reply == request.token_ids
        assert reply == continuation(prompt, len(reply))
        ends = [e.finish_reason for e in events if e.request_id == request_id]
        assert ends[-1] == request.finish_reason and not any(ends[:-1])
