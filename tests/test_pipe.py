"""Chat without a screen: replies alone on stdout, the rest on stderr."""

import io

import pytest
from chat_templates import QWEN3
from scripted_engine import ScriptedEngine, scripted_library, scripted_tokenizer, text_source

from kvchat.chat.template import load_chat_format
from kvchat.errors import CapacityError, EngineError
from kvchat.terminal.pipe import MAX_TURN_BYTES, answer_turns, read_turns
from kvchat.terminal.show import Show


class InstantEngine(ScriptedEngine):
    """Says all of a reply as soon as it is asked."""

    error = ""

    def submit(self, request):
        super().submit(request)
        self.fail(self.error) if self.error else self.run()


def _answers(turns, replies, template=None, error="", **options):
    """(stdout, stderr) of answering `turns`."""
    tokenizer = scripted_tokenizer()
    engine = InstantEngine(tokenizer)
    engine.replies += replies
    engine.error = error
    if template:
        source = text_source(chat_template=template)
        options["chat_format"] = load_chat_format(source, tokenizer, None)
    out, err = io.StringIO(), io.StringIO()
    answer_turns(Show(out, err), scripted_library(engine, **options), turns)
    return out.getvalue(), err.getvalue()


def test_replies_are_parted_by_a_blank_line():
    assert _answers(["a", "b", "c"], ["one", "two\n", ""]) == ("one\n\ntwo\n\n\n", "")


def test_what_a_reply_says_is_made_safe():
    assert _answers(["a"], ["\x1b[2J\r\nx\ry"]) == ("\\x1b[2J\nx\\x0dy\n", "")


def test_reasoning_stays_out_of_stdout():
    out, err = _answers(["a"], ["<think>\nhm\n</think>\n\nYes."], template=QWEN3)

    assert (out, err) == ("Yes.\n", "hm\n\n")
    assert _answers(["a"], ["<think>\nhm"], template=QWEN3) == ("\n", "hm\n")


def test_a_full_context_is_said_on_stderr():
    out, err = _answers(["a"], ["x" * 100], max_model_len=60)

    assert out.strip("x\n") == ""
    assert err.startswith("context full: 60 of 60 tokens")


def test_an_engine_error_is_raised_with_its_sentence():
    with pytest.raises(EngineError, match="the step failed"):
        _answers(["a"], ["x"], error="the step failed")


def test_lines_are_read_as_they_come_and_bounded():
    turns = read_turns(None, None, io.BytesIO(b"\xef\xbb\xbfone\r\n\n two \n" + b"x" * (5 << 20)))

    assert next(turns) == "one"
    assert next(turns) == " two "
    with pytest.raises(CapacityError, match="4 MiB"):
        next(turns)


def test_a_turn_of_just_the_limit_is_read():
    assert len(next(read_turns("", None, io.BytesIO(b"x" * MAX_TURN_BYTES)))) == MAX_TURN_BYTES
