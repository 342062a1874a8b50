"""Folders are the user's own, packaged data is found, and sync reaches the disk on any system."""

import fcntl
import os
from pathlib import Path

import pytest

from kvchat import paths


def test_the_shipped_model_is_found_in_the_checkout():
    folder = paths.shipped_model()

    assert folder is not None
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(os.listdir(folder))


def test_data_inside_the_package_comes_before_that_beside_it(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "kvchat")
    assert paths.data_dir("models") == tmp_path / "models"

    (tmp_path / "kvchat" / "models").mkdir(parents=True)

    assert paths.data_dir("models") == tmp_path / "kvchat" / "models"
    assert paths.shipped_model() is None


@pytest.mark.parametrize(
    ("platform", "cache", "state"),
    [
        ("linux", ".cache/kvchat", ".local/state/kvchat"),
        ("darwin", "Library/Caches/kvchat", "Library/Application Support/kvchat"),
    ],
)
def test_each_system_has_its_own_folders(monkeypatch, tmp_path, platform, cache, state):
    monkeypatch.setattr(paths.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)

    assert (paths.cache_dir(), paths.state_dir()) == (tmp_path / cache, tmp_path / state)


def test_xdg_folders_are_honoured(monkeypatch, tmp_path):
    monkeypatch.setattr(paths.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))

    assert paths.cache_dir() == tmp_path / "c" / "kvchat"
    assert paths.state_dir() == tmp_path / "s" / "kvchat"


def test_sync_uses_fdatasync_or_else_a_full_fsync(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append(("fdatasync", fd)), raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: calls.append((command, fd)))

    paths.sync(7)
    monkeypatch.delattr(os, "fdatasync")
    paths.sync(8)

    assert calls == [("fdatasync", 7), (51, 8)]
