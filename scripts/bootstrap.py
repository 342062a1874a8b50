"""Makes .venv and installs what kvchat needs, once. Standard library only; run by scripts/run.

The choice of torch is made and printed before anything is downloaded. A stamp file holds what was
installed, so that the next start does not call pip at all.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PIP = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")]


def cuda_driver() -> int | None:
    """The CUDA major version the NVIDIA driver supports, or None where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return None
    shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    found = re.search(r"CUDA Version:\s*(\d+)", shown)
    return int(found.group(1)) if found else None


def choose() -> tuple[str, str, str | None]:
    """(what is installed and how much is downloaded, extras, torch index or None)."""
    extras = "hub,test" if os.environ.get("KVCHAT_SETUP") == "test" else "hub"
    index = os.environ.get("KVCHAT_TORCH_INDEX", "")
    cuda = cuda_driver()
    if sys.platform == "darwin":
        return "macOS: torch for this machine, about 200 MB in all", extras, None
    if cuda is None:
        return "no NVIDIA driver: torch for CPUs, about 350 MB in all", extras, index
    if cuda >= 13:
        text = f"NVIDIA driver for CUDA {cuda}: torch and CuPy for CUDA 13, about 2.7 GB in all"
        return text, f"{extras},cuda13", None
    text = f"NVIDIA driver for CUDA {cuda}: torch and CuPy for CUDA 12, about 3 GB in all"
    return text, f"{extras},cuda12", re.sub(r"/cpu$", "/cu126", index)


def is_reachable(index: str) -> bool:
    """Whether the wheel index answers; an unreachable one is replaced by pip's configured index."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=10):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def pinned_torch() -> str:
    """The torch requirement of constraints.txt: unpinned, pip would take the largest build."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def make_venv() -> None:
    """A fresh .venv, or one clear line where Python came without the venv module."""
    if (VENV / "bin" / "python").exists():
        return
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(f"python{version} has no working venv; install it: apt install python{version}-venv")


def fail(message: str) -> None:
    """One line to the terminal, then out."""
    print(f"scripts/run: {message}", file=sys.stderr)
    sys.exit(2)


def requirements(extras: str) -> list[str]:
    """What setup.cfg asks for, with these extras (comma-separated)."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"]]
    texts += [config["options.extras_require"][extra] for extra in extras.split(",")]
    return [line for text in texts for line in text.splitlines() if line]


def link_checkout() -> None:
    """Let the environment's Python find kvchat in this checkout, as it is edited."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    python = str(VENV / "bin" / "python")
    folder = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    (Path(folder.stdout.strip()) / "kvchat-checkout.pth").write_text(f"{ROOT}\n")


def write_command() -> None:
    """.venv/bin/kvchat, which runs this checkout from any folder."""
    path = VENV / "bin" / "kvchat"
    python = shlex.quote(str(VENV / "bin" / "python"))
    path.write_text(f'#!/bin/sh\nexec {python} -P -m kvchat "$@"\n')
    path.chmod(0o755)


def install(text: str, extras: str, index: str | None) -> None:
    """torch first and pinned, then the rest; pip shows its progress."""
    print(f"kvchat: first start, installing into .venv ({text})", file=sys.stderr)
    torch = [*PIP, pinned_torch()]
    if index and is_reachable(index):
        torch += ["--index-url", index]
    elif index:
        print(f"kvchat: {index} does not answer, using pip's own index", file=sys.stderr)
    for command in (torch, [*PIP, *CONSTRAINTS, *requirements(extras)]):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            fail("pip could not install what is missing; see its lines above, then start again")


def main() -> None:
    """Install unless the stamp says that exactly this is there already."""
    stamp = VENV / "kvchat-stamp"
    inputs = (ROOT / "setup.cfg").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    # ROOT: what .venv holds names it, and a checkout may be moved.
    digest = hashlib.sha256(inputs + f"{sys.version} {ROOT}".encode()).hexdigest()
    installed = stamp.read_text().split() if stamp.exists() else []
    wanted = "test" if os.environ.get("KVCHAT_SETUP") == "test" else "run"
    if installed[:1] == [digest] and wanted in installed[1:]:
        return
    make_venv()
    install(*choose())
    link_checkout()
    write_command()
    stamp.write_text(f"{digest} run {wanted}\n")


if __name__ == "__main__":
    main()
