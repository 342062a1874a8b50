"""Whole transcripts of the interactive chat: what a person types, what the terminal shows."""

import asyncio
import base64
import os
import re
import signal
import stat
from dataclasses import replace

import pytest
from chat_templates import QWEN3
from repl_driver import FACTS, play

from kvchat import paths
from kvchat.config import KVPolicy
from kvchat.engine.history import Compressed
from kvchat.engine.ledger import Entry, Ledger
from kvchat.engine.stats import CodecShare, SessionKV
from kvchat.errors import CapacityError
from kvchat.kv.layout import Codec
from kvchat.terminal.screen import wrap_rows

BANNER = """\
kvchat 0.1.0  test-model  cpu float32
context 512 tokens  chat format: chatml
pool 1.3 MiB, kv-cache native: 1,024 tokens
not saved: chats end with this process  /help lists the commands
"""


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _chat(script, **options) -> str:
    """The transcript below the banner."""
    transcript, _, code = play(script, **options)
    assert code == 0
    assert transcript.startswith(BANNER.strip("\n")), transcript
    return transcript[len(BANNER) :]


def test_a_chat():
    async def script(person):
        await person.says("hello", "Hi there!\nHow are you?\n")
        await person.says("fine", "Good.")

    assert _chat(script) == "> hello\nHi there!\nHow are you?\n\n> fine\nGood."


def test_an_unfinished_line_is_shown_as_it_grows():
    async def script(person):
        person.engine.replies.append("a line without a break that grows")
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        for words in ("a line", "a line without", "a line without a break"):
            said = len(person.repl.session.messages[-1].content)
            person.engine.step(len(words) - said)
            await person.sees(f"\n{words}\n>")
        await person.sees("1 working")

    assert _chat(script) == "> go\na line without a break"


def test_typing_goes_on_while_a_reply_streams():
    async def script(person):
        person.engine.replies.append("one\ntwo\nthree\nfour\n")
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        for letter in "typed":
            person.engine.step(3)
            await person.types(letter)
        await person.sees("> typed")
        await person.sees("three")

    _chat(script)


def test_switching_while_generating_keeps_both_going():
    async def script(person):
        person.engine.replies += ["first\nsecond\nthird", "other"]
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        person.engine.step(7)
        await person.sees("first")
        await person.types("/new side\r")
        await person.sees("--- 2 side")
        await person.types("hi\r")
        await person.waits_until(lambda: len(person.engine.requests) == 2, "request")
        person.engine.run()
        await person.sees("unread chat-1")
        await person.types("/switch chat\r")
        await person.sees("third")
        await person.sees_no("unread chat-1")

    assert _chat(script) == (
        "> go\n"
        "first\n"
        "> /new side\n"
        "--- 2 side -------------------------------------------------\n"
        "> hi\n"
        "other\n"
        "\n"
        "> /switch chat\n"
        "--- 1 chat-1 -----------------------------------------------\n"
        "> go\n"
        "first\n"
        "second\n"
        "third"
    )


def test_switching_back_streams_on():
    async def script(person):
        person.engine.replies.append("first\nsecond\nthird")
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        person.engine.step(9)
        await person.sees("first\nsec\n>")
        await person.types("/new\r")
        await person.sees("--- 2 chat-2")
        await person.types("\x1b1")
        await person.sees("--- 1 chat-1")
        await person.sees("> go\nfirst\nsec\n>")
        person.engine.run()
        await person.sees("first\nsecond\nthird\n\n>")

    _chat(script)


def test_a_fork_goes_on_from_the_last_finished_turn():
    async def script(person):
        await person.says("hello", "Hi!")
        person.engine.replies += ["a long story", "forked"]
        await person.types("tell\r")
        await person.sees("1 working")
        await person.types("/fork twin\r")
        await person.sees("--- 2 twin")
        await person.types("and you?\r")
        await person.sees("2 working")
        person.engine.run()
        await person.sees("forked\n\n>")
        assert [m.content for m in person.repl.library.sessions[0].messages] == [
            "hello",
            "Hi!",
            "tell",
            "a long story",
        ]

    assert _chat(script) == (
        "> hello\nHi!\n\n> tell\n> /fork twin\n"
        "--- 2 twin -------------------------------------------------\n"
        "> hello\nHi!\n\n> and you?\nforked"
    )


def test_undo_and_redo():
    async def script(person):
        await person.says("one", "first")
        await person.says("two", "second")
        await person.types("/undo\r")
        await person.sees("/redo brings back")
        await person.types("/redo\r")
        await person.sees("> /redo\n---")
        await person.types("/undo 3\r")
        await person.sees("took back 2 turns")

    assert _chat(script) == (
        "> one\nfirst\n\n> two\nsecond\n\n> /undo\ntook back 1 turn; /redo brings back\n"
        "--- 1 chat-1 -----------------------------------------------\n"
        "> one\nfirst\n\n> /redo\n"
        "--- 1 chat-1 -----------------------------------------------\n"
        "> two\nsecond\n\n> /undo 3\ntook back 2 turns; /redo brings back\n"
        "--- 1 chat-1 -----------------------------------------------"
    )


def test_regen_and_edit_ask_again():
    async def script(person):
        await person.says("one", "first")
        await person.says("/regen", "second")
        await person.types("/edit\r")
        await person.sees("editing the last turn")
        await person.says(" and a half", "third")
        await person.says("/edit two", "fourth")
        assert [m.content for m in person.repl.session.messages] == ["two", "fourth"]
        await person.says("three", "fifth")
        await person.says("/edit 3", "sixth")
        await person.types("/tree\r")
        await person.sees("> /tree\n")

    assert _chat(script) == (
        "> one\nfirst\n\n> /regen\n> one\nsecond\n\n> /edit\n> one and a half\nthird\n\n"
        "> /edit two\n> two\nfourth\n\n> three\nfifth\n\n> /edit 3\n> 3\nsixth\n\n"
        "> /tree\n- one\n- one\n- one and a half\n> two\n  - three\n  > 3"
    )


def test_ctrl_c_stops_the_reply_and_keeps_it():
    async def script(person):
        person.engine.replies.append("a reply that is too long")
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        person.engine.step(len("a reply"))
        await person.sees("a reply\n>")
        await person.types("\x03")
        await person.sees("[stopped]")
        assert person.repl.session.messages[-1].content == "a reply"
        await person.types("\x03")
        await person.sees("nothing to stop; Ctrl-D leaves")

    assert _chat(script) == "> go\na reply\n[stopped]"


def test_ctrl_c_clears_the_input_line():
    async def script(person):
        await person.types("typed")
        await person.sees("> typed")
        await person.types("\x03")
        await person.sees_no("> typed")

    assert _chat(script) == ""


def test_an_unknown_command_names_the_nearest():
    async def script(person):
        await person.types("/swich 2\r")
        await person.sees("/switch")
        await person.types("/usr/bin/env\r")
        await person.sees("/help")
        await person.says("//usr is a folder", "Yes.")

    assert _chat(script) == (
        "> /swich 2\nerror: unknown command /swich; did you mean /switch?\n"
        "> /usr/bin/env\nerror: unknown command /usr/bin/env; /help lists them all\n"
        "> /usr is a folder\nYes."
    )


@pytest.mark.parametrize(
    "line", ["/clear screen", "/redo 2", "/exit now", "/stop al", "/show promt", "/think maybe"]
)
def test_an_argument_that_means_nothing_does_nothing(line):
    async def script(person):
        await person.says("hello", "Hi!")
        await person.types(line + "\r")
        await person.sees(f"> {line}\nerror: {line.split()[0]}")
        assert len(person.repl.session.messages) == 2

    _chat(script)


def test_a_full_context_is_said_before_anything_is_cut():
    async def script(person):
        await person.says("hello", "x" * 200)
        await person.sees("context full")
        await person.types("y" * 60 + "\r")
        await person.sees("error:")

    transcript = _chat(script, max_model_len=100)

    shown = transcript.replace("\n", "")
    assert "[context full: 100 of 100 tokens; /undo turns" in shown.replace(
        "context", "[context", 1
    )
    assert "error: the conversation would have" in shown


def test_a_turn_that_does_not_fit_goes_back_into_the_input():
    async def script(person):
        buffer = person.repl.screen.buffer
        await person.types("y" * 60 + "\r")
        await person.sees("error: the conversation would have")
        await person.types("!")
        await person.waits_until(lambda: buffer.text.endswith("!"), "typing")
        assert buffer.text == "y" * 60 + "!"
        await person.types("\x15//" + "y" * 60 + "\r")
        await person.waits_until(lambda: buffer.text.startswith("//y"), "the slash")

    play(script, max_model_len=50)


def test_a_queued_turn_is_parted_from_the_reply_before_whenever_it_begins():
    async def script(person):
        person.engine.replies += ["first", "second"]
        await person.types("one\r")
        await person.types("two\r")
        await person.sees("queued 1")
        library = person.repl.library
        person.engine.run()
        library.pump()  # the first reply ends and the second begins before anything is painted
        person.engine.run()
        person.repl._refresh()
        await person.sees("second")

    assert _chat(script) == "> one\nfirst\n\n> two\nsecond"


def test_an_empty_reply_is_said_to_be_one():
    async def script(person):
        await person.says("hello", "")

    assert _chat(script) == "> hello\n[empty reply]"


def test_enter_while_streaming_queues_and_ctrl_c_drops_the_queue_first():
    async def script(person):
        person.engine.replies += ["first", "second"]
        await person.types("one\r")
        await person.types("two\r")
        await person.sees("queued 1")
        person.engine.run()
        await person.sees("first\n\n> two\n")
        await person.types("three\r")
        await person.sees("queued 1")
        await person.types("\x03")
        await person.sees("queued turn dropped")
        assert person.repl.screen.buffer.text == "three"
        person.engine.run()
        await person.sees("second")

    assert _chat(script) == "> one\nfirst\n\n> two\nsecond"


@pytest.mark.parametrize("newline", ["\n", "\x1b\r", "\\\r"])
def test_a_turn_of_several_lines(newline):
    async def script(person):
        await person.says(f"one{newline}two", "Both.")
        assert person.repl.session.messages[0].content == "one\ntwo"

    assert _chat(script) == "> one\n  two\nBoth."


def test_a_paste_is_kept_whole_and_never_sent_by_itself():
    async def script(person):
        await person.types("\x1b[200~one\r\ntwo\x1b[31m\x07\rthree\n\x1b[201~")
        await person.sees("[pasted 3 lines]")
        assert not person.engine.requests
        assert person.repl.screen.buffer.text == "one\ntwo[31m\nthree\n"
        await person.says("!", "Three lines.")
        assert person.repl.session.messages[0].content == "one\ntwo[31m\nthree\n!"

    assert _chat(script) == "> one\n  two[31m\n  three\n  !\nThree lines."


def test_bracketed_paste_stays_on_while_lines_are_printed():
    async def script(person):
        await person.says("go", "\n".join(f"line {i}" for i in range(50)))
        await person.sees("line 49")
        person.shown = person.terminal.raw

    _, person, _ = play(script)

    assert person.shown.count("\x1b[?2004h") == 1
    assert "\x1b[?2004l" not in person.shown


def test_ctrl_d_with_work_in_hand_asks_once():
    async def script(person):
        person.engine.replies.append("never finished")
        await person.types("one\r")
        await person.types("two\r")
        await person.sees("queued 1")
        await person.types("\x04")
        await person.sees("2 replies unfinished; Ctrl-D again leaves")
        await person.types("\x04")
        await asyncio.sleep(3600)

    assert _chat(script) == "> one\n2 replies unfinished; Ctrl-D again leaves"


def test_what_a_model_says_cannot_drive_the_terminal():
    async def script(person):
        await person.says("go", "\x1b]0;owned\x07\x1b[2J\u202eabc\x9b31m done\n")
        person.engine.replies.append("\x1b[2Jtail")
        await person.types("more\r")
        await person.waits_until(lambda: len(person.engine.requests) == 2, "request")
        person.engine.step(7)
        await person.sees("\\x1b[2Jtai")

    assert _chat(script) == (
        "> go\n\\x1b]0;owned\\x07\\x1b[2J\\u202eabc\\x9b31m done\n\n> more\n\\x1b[2Jtai"
    )


def test_a_tall_unfinished_line_leaves_room_for_the_input():
    async def script(person):
        person.engine.replies.append("word " * 300)
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        person.engine.step(1500)
        await person.types("still typing")
        await person.sees("> still typing")
        await person.sees("working")
        person.engine.run()
        await person.waits_until(lambda: not person.repl.library.is_working, "end")
        await person.repl_is_painted()

    transcript = _chat(script, columns=70, rows=12, max_model_len=4000)

    assert transcript.replace("\n", "").count("word") == 300


def test_any_size_of_terminal_is_painted():
    async def script(person):
        person.engine.replies.append("words and words\n" * 2000)
        await person.types("go\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        for i in range(200):
            person.terminal.resize(1 + i * 37 % 500, 1 + i * 61 % 200)
            person.engine.step(16)
            person.repl.screen.app._on_resize()
            person.repl._refresh()
        person.terminal.resize(80, 24)
        person.repl.screen.app._on_resize()
        await person.sees("1 working")
        assert "error" not in person.transcript

    play(script, max_model_len=100_000)


def test_reasoning_is_dim_and_the_recompute_it_costs_is_shown():
    async def script(person):
        await person.says("is it?", "<think>\nhm\nwell\n</think>\n\nYes.")
        person.engine.num_cached_tokens = 16
        await person.says("sure?", "<think>\n\n</think>\n\nSure.")
        await person.types("/think off\r")
        await person.sees("think off")
        await person.types("/copy\r")
        await person.sees("copied 5 characters")
        person.shown = person.terminal.raw

    transcript, person, _ = play(script, template=QWEN3)

    assert transcript[len(BANNER) :].startswith("> is it?\nhm\nwell\n\nYes.\n\n> sure?\nSure.\n[")
    assert "tokens of history recomputed]" in transcript
    assert "\x1b[2mwell\x1b[0m\n" in person.shown


def test_no_colour_means_no_colour():
    async def script(person):
        await person.says("hello", "Hi!")
        await person.types("/pool\r")
        await person.sees("a cell is")

    _, person, _ = play(script, use_color=False)

    assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9;]*m", person.terminal.raw)


def test_tables_and_the_pool():
    async def script(person):
        await person.says("hello", "Hi!")
        for command in ("/sessions", "/kv", "/pool"):
            await person.types(command + "\r")
            await person.sees(f"> {command}")

    assert _chat(script).split("> /sessions\n")[1] == (
        "   #  session  state  tokens  begins with\n"
        ">  1  chat-1              28  hello\n"
        "> /kv\n"
        "session  tokens  in pool  blocks      bytes\n"
        "chat-1       28      100       7  140.0 KiB\n"
        "> /pool\n"
        "AAAAAAAAAA******========........................................\n"
        "* shared 6  = cached 8  . free 40  A chat-1 10\n"
        "a cell is 1 x 20.0 KiB, 16 tokens a block\n"
        "pressure    2 evictions, 0 idle chats dropped, 0 preemptions"
    )


def _compressing_facts():
    policy = KVPolicy("auto", 128, 64, (1, 4), 2)
    scheduler = replace(FACTS.scheduler, kv=policy)
    return replace(FACTS, scheduler=scheduler, lowest=Codec.INT8)


def _half_compressed():
    """356 tokens: 4 INT8 blocks of 64 and 7 native ones; blocks of 20,480 bytes and 5,120 of side
    pieces."""
    shares = {
        Codec.NATIVE: CodecShare(100, 7, 7 * 20_480),
        Codec.INT8: CodecShare(256, 4, 4 * 25_600),
    }
    history = (
        Compressed(12.2, 64, 192, Codec.NATIVE, Codec.INT8),
        Compressed(75.0, 192, 320, Codec.NATIVE, Codec.INT8),
    )
    return SessionKV(356, 11, 11 * 25_600, shares, history)


def test_a_half_compressed_session_is_told_once_and_shown():
    async def script(person):
        engine = person.engine
        await person.says("hello", "Hi!")
        engine.held[1] = _half_compressed()
        await person.says("more", "Yes.")
        await person.sees("[older tokens are now INT8; /kv shows which]")
        await person.says("again", "No.")
        engine.codecs = [*[Codec.NATIVE] * 8, *[Codec.INT8] * 4, *[Codec.NATIVE] * 53]
        engine.compressed = {(Codec.NATIVE, Codec.INT8): 4}
        for command in ("/sessions", "/kv", "/pool"):
            await person.types(command + "\r")
            await person.sees(f"> {command}")
        await person.sees("pressure")

    transcript, _, code = play(script, columns=80, rows=60, facts=_compressing_facts())

    assert code == 0
    assert transcript.count("older tokens") == 1
    assert "\npool 1.6 MiB, kv-cache auto: 992 tokens native, about 3,248 as INT8\n" in transcript
    assert transcript.split("> /sessions\n")[1] == (
        "   #  session  state  tokens  compressed  begins with\n"
        ">  1  chat-1              86    72% INT8  hello\n"
        "> /kv\n"
        "session  tokens  in pool  native  INT8  blocks      bytes  effective\n"
        "chat-1       86      356     100   256      11  275.0 KiB      1.62x\n"
        "\n"
        "chat-1: kv-cache auto, the first 64 tokens and at least the last 128 stay native\n"
        "stored as              tokens  blocks      bytes  block ratio\n"
        "native                    100       7  140.0 KiB        1.00x\n"
        "INT8                      256       4  100.0 KiB        3.20x\n"
        "side arrays, not used                   35.0 KiB\n"
        "    12 s  positions 64-191  native -> INT8\n"
        "1:15 min  positions 192-319  native -> INT8\n"
        "> /pool\n"
        "A A A A A A A A8A8A8*8* * * * * = = = = = = = = . . . . . . . . . . . . . . . .\n"
        ". . . . . . . . . . . . . . . . . . . . . . . .\n"
        "* shared 6  = cached 8  . free 40  A chat-1 10\n"
        "a cell is 1 x 25.0 KiB, 16 tokens a block, 8: 64 as INT8\n"
        "codec   blocks  for tokens      bytes  block ratio  pool ratio\n"
        "native      12         192  240.0 KiB        1.00x       0.80x\n"
        "INT8         4         256  100.0 KiB        3.20x       3.20x\n"
        "effective ratio 1.40x: 560.0 KiB as native, 400.0 KiB reserved\n"
        "compressed  4 spans native -> INT8 (12 blocks freed)\n"
        "pressure    2 evictions, 0 idle chats dropped, 0 preemptions"
    )


def test_a_fork_is_not_told_again_what_its_parent_was():
    async def script(person):
        person.engine.held[1] = person.engine.held[2] = _half_compressed()
        await person.says("hello", "Hi!")
        await person.types("/fork twin\r")
        await person.sees("--- 2 twin")
        await person.says("and you?", "Too.")

    transcript, _, _ = play(script, rows=60)

    assert transcript.count("older tokens are now INT8") == 1


def test_pinning_is_shown_and_given_up():
    async def script(person):
        await person.says("hello", "Hi!")
        await person.types("/pin ch\t")
        await person.waits_until(lambda: person.repl.screen.buffer.text == "/pin chat-1", "name")
        await person.types("\r/sessions\r/kv\r/unpin\r/sessions\r")
        await person.sees("unpinned chat-1\n> /sessions")
        await person.types("/unpin nobody\r")
        await person.sees('no session is called "nobody"')

    transcript, person, _ = play(script, facts=_compressing_facts(), rows=60)

    pins = [call for call in person.engine.calls if call[0] == "set_pinned"]
    assert pins == [("set_pinned", 1, True), ("set_pinned", 1, False)]
    assert "> /pin chat-1\npinned chat-1; /unpin lets it go\n" in transcript
    assert re.findall(r">  1  chat-1 +(\w*) +28", transcript) == ["pinned", ""]
    assert "chat-1: pinned, no more of it is compressed" in transcript


def test_a_pin_that_the_pool_cannot_hold_is_refused_and_not_shown():
    def refuse(session_id, is_pinned):
        raise CapacityError("of a pinned one the pool holds 100 tokens; raise --kv-mem")

    async def script(person):
        person.engine.set_pinned = refuse
        await person.types("/pin\r/sessions\r")
        await person.sees("error: of a pinned one the pool holds 100 tokens; raise --kv-mem")
        await person.sees(">  1  chat-1           ")

    assert "pinned chat-1" not in _chat(script)


def test_the_audit_is_shown_when_the_engine_answers_and_nobody_waits_for_it():
    entries = (
        Entry("payload", "native, held", 2, 40_960),
        Entry("payload", "free", 62, 1_269_760),
        Entry("side arrays", "scales and zeros of INT8", 3, 768),
    )
    ledger = Ledger(entries, {"payload": 1_310_720, "side arrays": 768}, (), 1 << 28)

    async def script(person):
        await person.types("/kv --a\t\r")
        await person.sees("> /kv --audit")
        await person.says("hello", "Hi!")
        assert "adds up" not in person.transcript
        person.engine.answer.set_result(ledger)
        await person.sees("in memory 256.0 MiB")

    assert _chat(script, columns=80).endswith(
        "part         what                      blocks      bytes\n"
        "payload      native, held                   2     40,960\n"
        "payload      free                          62  1,269,760\n"
        "side arrays  scales and zeros of INT8       3        768\n"
        "all          1.3 MiB                           1,311,488\n"
        "adds up: the tensors have 1,310,720 of payload and 768 of side arrays;\n"
        "the blocks that the chats' tables name are those that the map says are held\n"
        "in memory 256.0 MiB: of the above what was touched, Python, libraries"
    )


def test_waiting_for_compression_is_said_while_it_lasts():
    async def script(person):
        person.engine.replies.append("done")
        await person.types("hello\r")
        await person.waits_until(lambda: person.engine.requests, "request")
        person.engine.requests[0].wait_reason = "waiting for memory, compressing (0 ahead)"
        await person.sees("\nwaiting for memory, compressing (0 ahead)\n>")
        person.engine.run()
        await person.sees("done\n\n>")

    assert _chat(script) == "> hello\ndone"


def test_options_are_shown_as_set_reads_them():
    async def script(person):
        await person.types('/set stop ["a", "b"]\r')
        await person.types("/show\r")
        await person.sees("think = (not set)")

    shown = _chat(script).split("> /show\n")[1].splitlines()

    assert {'stop = ["a", "b"]', "n = (not set)", "ignore_eos = off"} <= set(shown)


def test_settings():
    async def script(person):
        for line, answer in (
            ("/set temp 0.5", "temp = 0.5"),
            ("/set temp hot", 'error: temp cannot be "hot"'),
            ("/show", "seed = 7"),
            ("/system Be brief.", "system: Be brief."),
            ("/rename talk", "talk  "),
            ("/think on", "error: this model's template"),
            ("/show prompt", "0 ids"),
        ):
            await person.types(line + "\r")
            await person.sees(answer)
        await person.says("hello", "Hi!")
        assert person.engine.requests[-1].sampling.temperature == 0.5

    assert "temp = 0.5\n" in _chat(script)


def test_show_prompt_gives_text_and_ids():
    async def script(person):
        await person.says("hello", "Hi!")
        await person.types("/show prompt\r")
        await person.sees("ids:")

    text = _chat(script).split("> /show prompt\n")[1]

    assert text.startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>"
    )
    assert text.split(" ids: ")[0].endswith("\n28")


def test_all_and_fan_ask_many_chats():
    async def script(person):
        await person.types("/new\r")
        await person.sees("--- 2")
        await person.types("/all hello\r")
        await person.sees("2 working")
        person.engine.run()
        await person.sees("ok\n\n>")
        await person.types("/fan 3 temp=0,0.5,1 seed=5 Tell me\r")
        await person.sees("asked chat-2.1, chat-2.2, chat-2.3")
        assert [r.sampling.temperature for r in person.engine.requests[-3:]] == [0, 0.5, 1]
        assert [r.seed for r in person.engine.requests[-3:]] == [5, 5, 5]
        person.engine.run()
        await person.sees("unread chat-1, chat-2.1, chat-2.2...")
        for line, error in (
            ("/fan 3 temp=0,1 no", "error: temp has 2 values for 3 chats"),
            ("/fan 2 temp=1", "error: nothing to send"),
            ("/fan 65 hello", 'error: "65" is not a number from 1 to 64'),
        ):
            await person.types(line + "\r")
            await person.sees(error)
        assert len(person.engine.requests) == 5

    _chat(script)


def test_read_puts_a_file_before_the_next_turn(state):
    (state / "notes.txt").write_text("alpha\nbeta\n")
    (state / "bad.bin").write_bytes(b"ok\xff")
    os.mkfifo(state / "fifo")

    async def script(person):
        await person.types("/read notes.txt\r")
        await person.sees("2 lines of notes.txt go before your next turn")
        await person.types("/read bad.bin\r")
        await person.sees("bad.bin is not UTF-8 text: byte 0xff at offset 2")
        await person.types("/read none.txt\r")
        await person.sees("No such file")
        await person.types("/read fifo\r")
        await person.sees("fifo: not a file")
        await person.types("/read ~nobody-has-this-name/x\r")
        await person.sees("error: ~nobody-has-this-name/x: Could not determine home")
        await person.says("sum up", "Letters.")
        assert person.repl.session.messages[0].content == "alpha\nbeta\nsum up"

    _chat(script)


def test_export_and_copy(state):
    async def script(person):
        await person.says("hello", "Hi!")
        await person.types("/export chat.md\r")
        await person.sees("wrote chat.md")
        await person.types("/export chat.md\r")
        await person.sees("chat.md: File exists")
        await person.types("/export chat.txt\r")
        await person.sees("must end in .md or .jsonl")
        await person.types("/copy\r")
        await person.sees("copied 3 characters")
        await person.types("/copy 2\r")
        await person.sees("replies in this chat: 1")

    _, person, _ = play(script)

    assert (
        state / "chat.md"
    ).read_text() == "# chat-1\n\n## User\n\nhello\n\n## Assistant\n\nHi!\n"
    assert f"\x1b]52;c;{base64.b64encode(b'Hi!').decode()}\x07" in person.terminal.raw


def test_every_command_is_in_help_and_answers():
    async def script(person):
        from kvchat.terminal.commands import COMMANDS

        await person.types("/help\r")
        await person.sees("Enter sends")
        for command in COMMANDS.commands:
            if command.name != "/exit":
                assert command.name in person.transcript
                await person.types(f"{command.name}\r")
                await person.waits_until(lambda: not person.repl.screen.buffer.text, "command")
        await person.types("/stats\r")
        await person.sees("mean decode batch 2.00")
        assert "internal error" not in person.transcript
        await person.types("/quit\r")
        await asyncio.sleep(3600)

    play(script, rows=200)


def test_completion_of_commands_sessions_and_files(state):
    (state / "notes.txt").write_text("x")

    async def script(person):
        await person.types("/sys\t")
        await person.waits_until(lambda: person.repl.screen.buffer.text == "/system", "command")
        await person.types("\x15/switch c\t")
        await person.waits_until(lambda: person.repl.screen.buffer.text == "/switch chat-1", "name")
        await person.types("\x15/read no\t")
        await person.waits_until(
            lambda: person.repl.screen.buffer.text == "/read notes.txt", "file"
        )
        await person.types("\x15/set te\t")
        await person.waits_until(lambda: person.repl.screen.buffer.text == "/set temp", "option")

    _chat(script)


def test_history_is_kept_for_its_owner_only(state):
    os.umask(0)

    async def first(person):
        await person.says("remember me", "Yes.")

    async def second(person):
        await person.types("\x1b[A")
        await person.sees("> remember me")

    play(first)
    play(second)

    path = paths.state_dir() / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["file for folder", "fifo", "link"])
def test_a_history_that_cannot_be_kept_is_one_warning(state, kind):
    if kind == "file for folder":
        (state / "state").write_text("")
    else:
        paths.state_dir().mkdir(parents=True)
        path = paths.state_dir() / "history"
        os.mkfifo(path) if kind == "fifo" else path.symlink_to(state / "elsewhere")

    async def script(person):
        await person.says("hello", "Hi!")

    transcript, _, _ = play(script)

    assert "warning: input history is not kept" in transcript


def test_an_action_that_fails_is_one_line_and_the_chat_goes_on():
    async def script(person):
        person.engine.stats = lambda: 1 / 0
        await person.types("/stats\r")
        await person.sees("internal error (ZeroDivisionError: division by zero)")
        del person.engine.stats
        await person.says("hello", "Hi!")

    transcript, _, _ = play(script)

    assert "Traceback" not in transcript


def test_an_engine_error_is_one_line():
    async def script(person):
        await person.types("hello\r")
        await person.sees("1 working")
        person.engine.fail("the step failed; send again")
        await person.sees("the step failed; send again")
        await person.says("hello", "Hi!")

    _chat(script)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_with_the_shell_s_code(number, code):
    async def script(person):
        person.engine.replies.append("unfinished")
        await person.types("hello\r")
        await person.sees("1 working")
        os.kill(os.getpid(), number)
        await asyncio.sleep(3600)

    _, person, left_with = play(script)

    assert left_with == code
    assert person.terminal.raw.rstrip().endswith(("\x1b[?2004l", "\x1b[?25h"))


def test_wrapped_rows_fill_the_width():
    assert wrap_rows("", 3) == [""]
    assert wrap_rows("abcdefg", 3) == ["abc", "def", "g"]
    assert wrap_rows("a汉字b", 3) == ["a汉", "字b"]
    assert wrap_rows("汉", 1) == ["汉"]
