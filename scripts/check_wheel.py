"""Builds the wheel, installs it in a clean environment, and chats one line from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout; its output, or an end with everything it printed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENV, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"check_wheel: {command[0]} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Fails unless the installed wheel knows its version and answers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
        wheel = next(folder.glob("kvchat-*.whl"))
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        python, kvchat = folder / "venv/bin/python", folder / "venv/bin/kvchat"
        constraints = ROOT / "constraints.txt"
        torch = next(x for x in constraints.read_text().splitlines() if x.startswith("torch=="))
        run(python, "-m", "pip", "install", "-q", torch, cwd=folder)
        run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=folder)
        print(f"wheel: {wheel.name}, {run(kvchat, '--version', cwd=folder).strip()}")
        reply = run(kvchat, "run", "-p", "Hello!", "--temp", "0", cwd=folder)
        if not reply.strip():
            sys.exit("check_wheel: the chat answered nothing")
        print(f"wheel: a chat from another folder answers {reply.strip()!r}")


if __name__ == "__main__":
    main()
