"""All conversations of a process: their names, their order, which one is looked at. Events of the
engine come in from its thread; everything else happens on the one that pumps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue

from kvchat.chat.job import ChatDefaults, ChatEngine, Desk
from kvchat.chat.session import Session
from kvchat.chat.template import ChatFormat
from kvchat.chat.tokenizer import Tokenizer
from kvchat.engine.request import Event
from kvchat.errors import KvchatError, UsageError, quoted

_NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._ -]{0,63}\Z")
_RESERVED = re.compile(r"(?i)\A(con|prn|aux|nul|com\d|lpt\d)(\..*)?\Z")  # devices on some systems


@dataclass(frozen=True)
class Refusal:
    """A session that could not take a text, and why."""

    session: Session
    error: KvchatError


class Library:
    """`notify` is called, from any thread, when there is something to pump."""

    def __init__(
        self,
        engine: ChatEngine,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        defaults: ChatDefaults,
        notify: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = Desk(engine, tokenizer, chat_format, defaults, clock)
        self._engine = engine
        self._notify = notify
        self._events: SimpleQueue[tuple[float, list[Event]]] = SimpleQueue()
        self._session_ids = count(1)
        self._num_named = 0
        self.sessions: list[Session] = []
        self.current = self.new()

    def on_events(self, events: list[Event]) -> None:
        """The engine's listener; any thread."""
        self._events.put((self._desk.clock(), events))
        self._notify()

    def pump(self, timeout: float = 0.0) -> bool:
        """Apply what the engine has sent, waiting at most `timeout` seconds for the first of it;
        whether anything changed."""
        is_changed = False
        try:
            batch = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
            while True:
                is_changed |= self.apply(*batch)
                batch = self._events.get_nowait()
        except Empty:
            self.current.unread = 0
            return is_changed

    def apply(self, at: float, events: Sequence[Event]) -> bool:
        """Hand every event to its session; whether anything changed. `at`: when they came."""
        by_id = {session.id: session for session in self.sessions}
        applied = [by_id[e.session_id].apply(e, at) for e in events if e.session_id in by_id]
        return any(applied)

    @property
    def is_working(self) -> bool:
        """Some session is making a reply."""
        return any(session.is_working for session in self.sessions)

    @property
    def num_unfinished(self) -> int:
        """Replies being made or waiting to be asked for."""
        return sum(session.is_working + len(session.queued) for session in self.sessions)

    def new(self, name: str | None = None) -> Session:
        """A new conversation, which is then the current one."""
        session = Session(self._desk, next(self._session_ids), self._free_name(name))
        self.sessions.append(session)
        return self._look_at(session)

    def switch(self, key: str) -> Session:
        """Look at another session: its number, name, or the beginning of one name."""
        return self._look_at(self.find(key))

    def close(self, key: str | None = None) -> Session:
        """Forget a session and return the one looked at then; a new one takes the last one's
        place."""
        return self._close(self.current if key is None else self.find(key))

    def _close(self, session: Session) -> Session:
        session.drop_queued()
        session.stop()
        index = self.sessions.index(session)
        self.sessions.remove(session)
        self._engine.release(session.id)
        if not self.sessions:
            return self.new()
        if session is not self.current:
            return self.current
        return self._look_at(self.sessions[min(index, len(self.sessions) - 1)])

    def rename(self, name: str) -> None:
        """Give the current session another name."""
        if name != self.current.name:
            self.current.name = self._free_name(name)

    def pin(self, key: str | None = None) -> Session:
        """Keep a session as it is: not compressed, and the last to give way. Raises CapacityError
        when the pool could not hold it so."""
        return self._set_pinned(key, True)

    def unpin(self, key: str | None = None) -> Session:
        """Let a session be compressed, and give way, as any other."""
        return self._set_pinned(key, False)

    def fork(self, name: str | None = None) -> Session:
        """A session that goes on from the current one's last finished turn; it is looked at then.
        The parent goes on with what it does."""
        return self._look_at(self._fork(self.current, name))

    def fan(self, text: str, arms: Sequence[Mapping[str, str]]) -> list[Session]:
        """Send `text` to one fork of the current session per arm, each with that arm's options.
        Nothing is made when an option or the text is refused. The current session stays."""
        parent, made = self.current, list[Session]()
        try:
            for index, options in enumerate(arms, start=1):
                made.append(self._fork(parent, self._arm_name(parent, index)))
                for name, value in options.items():
                    made[-1].set_option(name, value)
                made[-1].send(text)
        except KvchatError:
            for session in made:
                self._close(session)
            raise
        return made

    def send_all(self, text: str) -> list[Refusal]:
        """Send `text` to every session; those that could not take it."""
        refusals = []
        for session in self.sessions:
            try:
                session.send(text)
            except KvchatError as error:
                refusals.append(Refusal(session, error))
        return refusals

    def find(self, key: str) -> Session:
        """The session with this number (from 1), name, or only beginning of a name."""
        for found in (
            [s for number, s in enumerate(self.sessions, start=1) if str(number) == key],
            [s for s in self.sessions if s.name == key],
            [s for s in self.sessions if key and s.name.startswith(key)],
        ):
            if len(found) == 1:
                return found[0]
            if found:
                names = ", ".join(session.name for session in found)
                raise UsageError(f'"{quoted(key)}" could be {names}')
        raise UsageError(f'no session is called "{quoted(key)}"; /sessions lists them')

    def _set_pinned(self, key: str | None, is_pinned: bool) -> Session:
        session = self.current if key is None else self.find(key)
        self._engine.set_pinned(session.id, is_pinned)
        session.is_pinned = is_pinned
        return session

    def _fork(self, parent: Session, name: str | None) -> Session:
        session = Session(
            self._desk, next(self._session_ids), self._free_name(name), settings_of=parent
        )
        session.fork_from(parent)
        self.sessions.append(session)
        return session

    def _look_at(self, session: Session) -> Session:
        self.current = session
        session.unread = 0
        self._engine.set_foreground(session.id)
        return session

    def _arm_name(self, parent: Session, index: int) -> str:
        """chat-1.1, chat-1.2, ...: the next that is free."""
        taken = {session.name for session in self.sessions}
        stem = parent.name[:58]
        return next(n for n in (f"{stem}.{i}" for i in count(index)) if n not in taken)

    def _free_name(self, name: str | None) -> str:
        """`name` if it may be used, or the next chat-N."""
        taken = {session.name for session in self.sessions}
        if name is None:
            while True:
                self._num_named += 1
                if (name := f"chat-{self._num_named}") not in taken:
                    return name
        if not _NAME.match(name) or ".." in name or _RESERVED.match(name):
            raise UsageError(
                f'a session cannot be called "{quoted(name)}": up to 64 letters, digits, '
                "spaces and . _ - are allowed, a letter or digit first"
            )
        if name in taken:
            raise UsageError(f'a session is already called "{name}"')
        return name
