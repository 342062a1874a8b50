"""What tests of whole chats share."""

from kvchat.chat.library import Library
from kvchat.chat.session import Session

PATIENCE_S = 60.0


def finish(library: Library) -> None:
    """Pump until every reply is finished."""
    while library.is_working:
        assert library.pump(PATIENCE_S), "the engine sent nothing for a minute"


def say(library: Library, session: Session, text: str) -> str:
    """Send one turn and wait for its reply."""
    session.send(text)
    finish(library)
    return session.messages[-1].content
