"""The first start decides what to install before it downloads anything."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
INDEX = "https://index.example/whl/cpu"


@pytest.fixture
def bootstrap(monkeypatch):
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPTS / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("KVCHAT_TORCH_INDEX", INDEX)
    monkeypatch.delenv("KVCHAT_SETUP", raising=False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


@pytest.mark.parametrize(
    ("cuda", "extras", "index"),
    [
        (None, "hub", INDEX),
        (13, "hub,cuda13", None),
        (12, "hub,cuda12", "https://index.example/whl/cu126"),
    ],
)
def test_the_driver_decides_what_is_installed(bootstrap, monkeypatch, cuda, extras, index):
    monkeypatch.setattr(bootstrap, "cuda_driver", lambda: cuda)

    text, chosen, chosen_index = bootstrap.choose()

    assert (chosen, chosen_index) == (extras, index)
    assert "B in all" in text


def test_a_mac_takes_the_default_torch(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "platform", "darwin")
    monkeypatch.setattr(bootstrap, "cuda_driver", lambda: None)

    assert bootstrap.choose()[1:] == ("hub", None)


def test_the_driver_version_is_read_from_nvidia_smi(bootstrap, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho '| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: 13.0 |'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert bootstrap.cuda_driver() == 13


def test_an_index_that_does_not_answer_is_noticed(bootstrap):
    assert not bootstrap.is_reachable("http://127.0.0.1:9/whl/cpu")
    assert not bootstrap.is_reachable("not a url")


def test_torch_is_pinned(bootstrap):
    assert bootstrap.pinned_torch().startswith("torch==2.")


def test_all_that_setup_cfg_asks_for_is_installed(bootstrap):
    names = bootstrap.requirements("hub,cuda13")

    assert {"torch>=2.6", "huggingface_hub>=1.3", "cupy-cuda13x>=14"} <= set(names)
    assert not any(name.startswith(("pytest", "cupy-cuda12x")) for name in names)


def test_the_command_hands_its_arguments_on(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / "a folder's")
    python = bootstrap.VENV / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)

    bootstrap.write_command()

    command = [str(python.with_name("kvchat")), "run", "a b", "$c"]
    assert subprocess.check_output(command, text=True) == "-P|-m|kvchat|run|a b|$c|"
