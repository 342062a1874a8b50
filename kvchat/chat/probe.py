"""What a chat template does, learned by rendering conversations whose contents are known words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from kvchat.chat.messages import Message
from kvchat.chat.tokenizer import Piece, Tokenizer
from kvchat.errors import ModelError, quoted

# Letters only, and no word of any template's: filters leave them alone.
_WORDS = ("qzsystemzq", "qzfirstzq", "qzreplyzq", "qzsecondzq")
_SYSTEM, _FIRST, _REPLY, _SECOND = _WORDS

_BRACKETED = re.compile(r"[<\[{(|].*\w.*[>\]})|]\Z")

Render = Callable[..., list[dict[str, str]]]


class Probe:
    """The renderings of a probe conversation. Raises ModelError when the template cannot chat."""

    def __init__(self, render: Render) -> None:
        first = [Message("user", _FIRST)]
        reply = [*first, Message("assistant", _REPLY)]
        second = [*reply, Message("user", _SECOND)]
        system = [Message("system", _SYSTEM)]
        with_system, plain, asked = render([system + second, second, first])
        (answered,) = render([reply], add_generation_prompt=False)
        if "error" in plain or "error" in asked:
            reason = quoted(plain.get("error") or asked["error"], 200)
            raise ModelError(f"the model's chat template is refused: {reason}; use --chat-format")
        self.has_system = _SYSTEM in with_system.get("text", "")
        self._texts = [with_system["text"] if self.has_system else plain["text"], asked["text"]]
        self._answered = answered.get("text", "")
        self._asked = asked["text"]
        self._turns = plain["text"]

    @property
    def reply_lead(self) -> str:
        """White space between the prompt and a reply: it is the template's, not the reply's."""
        if not self._answered.startswith(self._asked):
            return ""
        lead = self._answered[len(self._asked) :].partition(_REPLY)[0]
        return lead if lead.isspace() else ""

    def end_of_turn(self, tokenizer: Tokenizer) -> Piece | None:
        """What the template writes after a reply: a marker, or a line of text; None for nothing."""
        between = self._turns.partition(_REPLY)[2].partition(_SECOND)[0]
        for text in (self._answered.partition(_REPLY)[2], between):
            for piece in tokenizer.split(text, at_start=False):
                if piece.marker is not None:
                    return piece
                lines = piece.text.split("\n")
                line = next((line.strip() for line in lines if line.strip()), "")
                if line:
                    return Piece(line)
        return None

    def fragments(self, tokenizer: Tokenizer) -> list[str]:
        """Lines of ordinary text around contents, and words such as [INST]: these mark roles, too.

        A lone word in a stretch that also holds a marker (<|im_start|>user) is safe already.
        """
        found: dict[str, None] = {}
        for text in self._texts:
            for stretch in _between(text, _WORDS):
                pieces = tokenizer.split(stretch, at_start=False)
                is_marked = any(piece.marker for piece in pieces)
                lines = [
                    line.strip() for p in pieces if not p.marker for line in p.text.split("\n")
                ]
                words = [word for line in lines for word in line.split() if _BRACKETED.match(word)]
                lines = [x for x in lines if len(x) > 1 and not (is_marked and x.isalnum())]
                found |= dict.fromkeys(lines + words)
        return list(found)


def _between(text: str, words: Sequence[str]) -> Iterator[str]:
    for word in words:
        before, found, after = text.partition(word)
        if found:
            yield before
            text = after
    yield text
