"""Where things lie: packaged data, the user's cache, and the one call that makes bytes durable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# macOS only: fdatasync is missing there and fsync leaves the drive's own cache unwritten.
_F_FULLFSYNC = 51


def data_dir(name: str) -> Path:
    """The folder of packaged data called `name` (models, kernels_cu).

    Beside the package in a checkout, inside it in a wheel; read by path, never imported.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def shipped_model() -> Path | None:
    """The folder of the model that ships with kvchat, or None where this build carries none."""
    found = sorted(data_dir("models").glob("*/model.safetensors"))
    return found[0].parent if found else None


def cache_dir() -> Path:
    """The user's cache folder for kvchat (compiled kernels); not created here."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvchat"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvchat"


def state_dir() -> Path:
    """The user's folder for what kvchat remembers (input history); not created here."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "kvchat"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvchat"


def sync(fd: int) -> None:
    """Return when the file's bytes are on disk: fdatasync, or F_FULLFSYNC without it."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
        return
    import fcntl

    fcntl.fcntl(fd, _F_FULLFSYNC)
