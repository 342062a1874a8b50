"""Which requests there are, who goes before whom, and who has to give way to whom."""

from __future__ import annotations

from kvchat.engine.request import Request


class Roster:
    """The unfinished requests, one at most for each session. Running ones hold a sequence."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}  # by session id, in order of arrival
        self.num_running = 0
        self.foreground: int | None = None  # the session on screen
        self.pinned: set[int] = set()  # sessions that keep what they hold, as it is

    def by_priority(self) -> list[Request]:
        """The foreground's request, then by arrival."""
        first = self.requests.get(self.foreground) if self.foreground is not None else None
        if first is None:
            return list(self.requests.values())
        return [first, *(request for request in self.requests.values() if request is not first)]

    def is_first(self, request: Request) -> bool:
        """Nobody who runs goes before it."""
        if request.session_id == self.foreground:
            return True
        if request.seq is None:
            return not self.num_running
        return next(other for other in self.by_priority() if other.seq is not None) is request

    def victim(self, request: Request, is_pinned: bool = False) -> Request | None:
        """The youngest running request that comes after this one, never the foreground's; of the
        pinned sessions or of the others."""
        is_foreground = request.session_id == self.foreground
        if request.seq is None and not is_foreground:
            return None
        for other in reversed(self.requests.values()):
            if other is request and not is_foreground:
                return None
            is_other_kind = (other.session_id in self.pinned) != is_pinned
            if other.seq is None or other.session_id == self.foreground or is_other_kind:
                continue
            return other
        return None
