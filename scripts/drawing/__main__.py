"""The pictures in docs/, each from a run of the program. Without names: all of them.

repl: a screenshot of three chats at work. The shipped model answers on a pseudo-terminal.
memory: `kvchat bench capacity --plot`, the real pool and scheduler; no model, as what is held does
not depend on which tokens they are (a minute). layouts: `kvchat bench layouts --plot`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from drawing.repl import draw_repl

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def _plotted_by(name: str) -> Callable[[Path], None]:
    def draw(path: Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "kvchat", "bench", name, "--plot", str(path)], check=True
        )

    return draw


PICTURES = {"repl": draw_repl, "memory": _plotted_by("capacity"), "layouts": _plotted_by("layouts")}


def main(arguments: list[str] | None = None) -> None:
    """Draw what is named into the folder."""
    parser = argparse.ArgumentParser(prog="scripts/pictures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=" or ".join(PICTURES))
    parser.add_argument("--folder", type=Path, default=DOCS, help="instead of docs")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(PICTURES):
        parser.error(f"no picture {', '.join(sorted(unknown))}: choose {', '.join(PICTURES)}")
    for name in options.names or PICTURES:
        path = options.folder / f"{name}.svg"
        PICTURES[name](path)
        print(path)


if __name__ == "__main__":
    main()
