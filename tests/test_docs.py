"""What the documents show is what the program does."""

import doctest
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvchat.cli import run_cli
from kvchat.terminal.show import Show

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_example_of_the_block_manager_page_runs():
    path = ROOT / "docs" / "block-manager.md"

    failed, tried = doctest.testfile(str(path), module_relative=False, encoding="utf-8")

    assert failed == 0
    assert tried > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:kvchat|docs|scripts|kernels_cu|models|tests)/[\w./-]+)`", text)

    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]

    assert missing == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.svg")), ids=lambda p: p.name)
def test_a_picture_is_whole_and_shown(path):
    root = ElementTree.parse(path).getroot()

    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert f"](docs/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def printed_by(*arguments):
    """Lines of the command's answer."""
    out, err = io.StringIO(), io.StringIO()
    assert run_cli(list(arguments), Show(out, err)) == 0
    return out.getvalue().splitlines()


def test_the_layouts_of_the_readme_are_what_the_command_prints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    rows = [line for line in printed_by("bench", "layouts") if line.startswith("|")]

    assert len(rows) == 10
    assert "\n".join(rows) in text


def test_the_plan_of_the_readme_is_what_the_command_prints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## What fits") : text.index("The textbook's example, corrected")]
    command = re.search(r"`kvchat (plan --shape llama2-7b [^`]+)`", section).group(1)

    printed = printed_by(*command.split())

    shown = section[section.index("# llama2-7b:") :].splitlines()
    shown = [line for line in shown if line and line != "```"]
    assert len(shown) > 20
    assert [line for line in shown if line not in printed] == []
    for words in ("1.07 GB for K alone", "2.15 GB for K and V", "8 sessions 17.2 GB"):
        assert words in shown[0] + shown[1]
