"""The pictures of docs/: what a terminal shows is what is drawn, and a person is heard."""

import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pyte
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from drawing import __main__ as pictures  # noqa: E402
from drawing import repl, screenshot  # noqa: E402
from drawing.person import Person  # noqa: E402
from drawing.screenshot import INK, PAPER, FaintScreen, draw_screen, runs  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def shown(text, columns=20, rows=3):
    screen = FaintScreen(columns, rows)
    pyte.Stream(screen).feed(text)
    return screen


def texts(screen, title="a title"):
    """(text, attributes) of every run drawn, the title left out."""
    root = ElementTree.fromstring(draw_screen(screen, title))
    found = [(e.text, e.attrib) for e in root.iter(f"{SVG}text")]
    assert found[0][0] == title
    return found[1:]


def runs_of(screen, row_idx=0):
    return [*runs([screen.buffer[row_idx][x] for x in range(screen.columns)])]


def test_markup_in_what_is_shown_stays_text():
    hostile = "a<b>&\"'</text>"

    found = texts(shown(hostile), title='<svg> & "quotes"')

    assert [text for text, _ in found] == [hostile]


@pytest.mark.parametrize(
    ("codes", "ink", "paper", "is_bold"),
    [
        ("0", INK, PAPER, False),
        ("1", INK, PAPER, True),
        ("2", screenshot.COLORS["brightblack"], PAPER, False),
        ("33", screenshot.COLORS["brown"], PAPER, False),
        ("92", screenshot.COLORS["brightgreen"], PAPER, False),
        ("7", PAPER, INK, False),
        ("31;44", screenshot.COLORS["red"], screenshot.COLORS["blue"], False),
        ("38;2;1;2;255", "#0102ff", PAPER, False),
        ("38;5;2", "#00cd00", PAPER, False),
    ],
)
def test_a_cell_keeps_its_colours(codes, ink, paper, is_bold):
    (run,) = runs_of(shown(f"\x1b[{codes}mword\x1b[0m"))

    assert (run.text, run.column, run.num_cells) == ("word", 0, 4)
    assert (run.style.ink, run.style.paper, run.style.is_bold) == (ink, paper, is_bold)


def test_every_color_a_terminal_can_name_is_known():
    names = {*pyte.graphics.FG_ANSI.values(), *pyte.graphics.FG_AIXTERM.values()}

    assert names - {"default"} == set(screenshot.COLORS)


def test_wide_characters_take_two_cells_each_and_shift_nothing():
    found = runs_of(shown("a\u732b\u72acb \U0001f43a!"))

    assert [(run.text, run.column, run.num_cells) for run in found] == [
        ("a", 0, 1),
        ("\u732b", 1, 2),
        ("\u72ac", 3, 2),
        ("b", 5, 1),
        ("\U0001f43a", 7, 2),
        ("!", 9, 1),
    ]


def test_a_run_fills_exactly_its_cells():
    ((text, attributes),) = texts(shown("  four\x1b[1m \x1b[0m"))

    assert text == "four"
    assert float(attributes["x"]) == screenshot.MARGIN + 2 * screenshot.CELL_WIDTH
    assert float(attributes["textLength"]) == pytest.approx(4 * screenshot.CELL_WIDTH)


def test_blanks_are_drawn_where_they_have_a_colour():
    screen = shown("\x1b[41m  \x1b[0m  x")

    first, second = runs_of(screen)

    assert (first.text, first.style.paper) == ("  ", screenshot.COLORS["red"])
    assert (second.text, second.column) == ("x", 4)
    assert [text for text, _ in texts(screen)] == ["x"]
    assert f'fill="{screenshot.COLORS["red"]}"' in draw_screen(screen, "t")


def test_the_picture_has_a_ground_of_its_own_and_room_for_all_cells():
    root = ElementTree.fromstring(draw_screen(shown("x" * 20 + "\n" * 2), "t"))

    ground = root.find(f"{SVG}rect")
    assert ground.get("fill") == PAPER
    width, height = float(root.get("width")), float(root.get("height"))
    assert width == pytest.approx(20 * screenshot.CELL_WIDTH + 2 * screenshot.MARGIN)
    assert height >= screenshot.TITLE_HEIGHT + 3 * screenshot.CELL_HEIGHT


def test_a_hidden_cursor_is_not_drawn():
    seen, hidden = draw_screen(shown("> "), "t"), draw_screen(shown("> \x1b[?25l"), "t")

    assert screenshot.CURSOR in seen
    assert f'fill="{screenshot.CURSOR}"/>' not in hidden


def test_the_toolbar_says_how_many_chats_work():
    lines = ["> /pool", "pressure    0 evictions", "a" * 61, ">", "code  pool 9%  3 working", ""]

    assert repl._num_working(lines) == 3
    assert repl._is_telling(lines)
    assert not repl._is_telling([*lines[:4], "code  pool 9%  2 working"])
    assert not repl._is_telling([*lines[:2], "short", *lines[3:]])


def test_a_person_types_at_the_real_program(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = write_tiny_model(tmp_path / "tiny")

    with Person(("run", str(folder), "--kv-mem", "1MiB"), 60, 20, timeout_s=60) as person:
        person.waits_until(lambda lines: any(line.startswith("chat-1") for line in lines), "prompt")
        person.types("/rename fox")
        person.waits_until(lambda lines: any(x.startswith("fox ") for x in lines), "name", 0.1)
        with pytest.raises(TimeoutError, match=r"no end in:(.|\n)*fox"):
            person._timeout_s = 0.1
            person.waits_until(lambda lines: False, "end")


def test_a_picture_is_written_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(pictures, "PICTURES", {"a": drawn.append, "b": drawn.append})

    pictures.main(["b", "--folder", str(tmp_path)])
    pictures.main(["--folder", str(tmp_path)])

    assert drawn == [tmp_path / name for name in ("b.svg", "a.svg", "b.svg")]
    with pytest.raises(SystemExit):
        pictures.main(["c"])
    assert "no picture c: choose a, b" in capsys.readouterr().err


def test_plots_are_drawn_by_the_commands_that_people_have(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pictures, "subprocess", SimpleNamespace(run=lambda command, check: asked.append(command))
    )

    pictures.main(["memory", "layouts", "--folder", str(tmp_path)])

    assert [command[1:6] for command in asked] == [
        ["-m", "kvchat", "bench", "capacity", "--plot"],
        ["-m", "kvchat", "bench", "layouts", "--plot"],
    ]
