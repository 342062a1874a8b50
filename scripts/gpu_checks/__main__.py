"""python -m gpu_checks: runs the parts one after another, then prints one table."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_checks.parts import ROOT, Figure, Part, all_parts

LIMIT_S = 465  # of everything
_LEAST_S = 10  # no part is started with less
_SHOWN_LINES = 25  # of a part that failed
_GRACE_S = 5  # between Ctrl-C and the end
_STOPPED = -1  # in place of an exit status


def main() -> int:
    """0 when nothing that must pass has failed."""
    parts = all_parts()
    flags = _parse([part.name for part in parts])
    folder = Path(flags.out or tempfile.mkdtemp(prefix="gpu_check_"))
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + flags.limit
    figures: list[Figure] = []
    has_failed = False
    for part in parts:
        if flags.only and part.name not in flags.only.split(","):
            continue
        print(f"gpu_check: {part.name}", flush=True)
        found, is_good = _check(part, folder, end)
        figures += found
        has_failed |= part.must_pass and not is_good
        (folder / "table.md").write_text(_table(figures))
    print(f"\ndetails in {folder}\n\n{_table(figures)}")
    return int(has_failed)


def _parse(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--only", metavar="PART[,PART]", help=f"of {', '.join(names)}")
    parser.add_argument("--out", help="a folder for the details")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for everything")
    flags = parser.parse_args()
    unknown = set(flags.only.split(",") if flags.only else ()) - set(names)
    if unknown:
        parser.error(f"no part called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return flags


def _check(part: Part, folder: Path, end: float) -> tuple[list[Figure], bool]:
    """The part's rows, and whether it ran to a good end."""
    left_s = end - time.monotonic()
    if left_s < _LEAST_S:
        return [Figure(part.name, "not run: no time left", "", False)], False
    started = time.monotonic()
    log_path = folder / f"{part.log_name}.log"
    with log_path.open("ab") as log:
        log.write(f"# {part.name}: {' '.join(part.command)}\n".encode())
        log.flush()
        before = log.tell()
        status = _run(part.command, log.fileno(), min(part.limit_s, left_s))
    text = log_path.read_bytes()[before:].decode(errors="replace")
    found = part.read(text)
    is_good = status == 0 and all(figure.is_met is not False for figure in found)
    seconds = time.monotonic() - started
    if status:
        ended = f"stopped after {seconds:.0f} s" if status == _STOPPED else f"ended with {status}"
        found.append(Figure(part.name, ended, "", False))
        print("\n".join(text.splitlines()[-_SHOWN_LINES:]), flush=True)
    print(f"gpu_check: {part.name} took {seconds:.0f} s", flush=True)
    return found, is_good


def _run(command: list[str], output: int, limit_s: float) -> int:
    """The exit status, or _STOPPED when it took too long and was ended with all it had started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return _STOPPED
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """As Ctrl-C does, so that it tells how far it came; what is left then is killed."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _table(figures: list[Figure]) -> str:
    """Markdown."""
    marks = {True: "yes", False: "NO", None: ""}
    rows = [("part", "result", "gate", "met"), ("---", "---", "---", "---")]
    rows += [(x.part, x.result, x.gate, marks[x.is_met]) for x in figures]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
