"""Imports go down the layers only, and the parts meant to be torch-free are."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvchat"
# Higher number, higher layer; a module imports its own layer or a lower one.
LAYERS = {
    "cli": 9,
    "terminal": 8,
    "bench": 8,
    "chat": 7,
    "engine": 6,
    "model": 5,
    "attention": 4,
    "kv": 3,
    "config": 1,
    "errors": 1,
    "paths": 1,
}
TORCH_FREE = (
    "kvchat.bench.plan_report",
    "kvchat.cli",
    "kvchat.kv.block_pool",
    "kvchat.kv.layout",
    "kvchat.engine.scheduler",
    "kvchat.engine.engine",
    "kvchat.chat.library",
    "kvchat.chat.runtime",
    "kvchat.chat.template",
    "kvchat.chat.tokenizer",
    "kvchat.terminal.repl",
    "kvchat.terminal.views",
)


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "package"


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.startswith("kvchat.")]


def _upward(path: Path, module: str) -> list[str]:
    here = _layer(module)
    wrong = []
    for line, name in _imports(path):
        there = _layer(name)
        if there not in LAYERS:  # kvchat.__version__
            continue
        is_sideways = LAYERS[there] == LAYERS[here] and there != here and LAYERS[here] > 1
        if LAYERS[there] > LAYERS[here] or is_sideways:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_no_import_goes_up_the_layers():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if _layer(module) in LAYERS:
            wrong += _upward(path, module)

    assert wrong == []


def test_every_module_belongs_to_a_layer():
    names = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}

    assert names - {"__pycache__", "__init__", "__main__"} == set(LAYERS)


def test_the_layer_check_can_fail(tmp_path):
    path = PACKAGE / "kv" / "block_pool.py"
    bad = tmp_path / "block_pool.py"
    bad.write_text(path.read_text() + "\nfrom kvchat.engine.request import Request\n")

    found = [name for _, name in _imports(bad) if LAYERS[_layer(name)] > LAYERS["kv"]]

    assert found == ["kvchat.engine.request.Request"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_free_modules_stay_torch_free(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'numba', 'cupy') if m in sys.modules])"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


def test_setup_cfg_names_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    in_tree = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")
    }

    assert named == in_tree | {"kvchat.models", "kvchat.kernels_cu"}
    assert (ROOT / "models").is_dir()
    assert (ROOT / "kernels_cu").is_dir()
