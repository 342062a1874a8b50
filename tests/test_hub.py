"""Fetching from a hub: a local server speaks its file protocol; nothing leaves this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The library reads its environment when it is imported, so each case is a process of its own.
CHILD = """
import json, sys
from kvchat.errors import KvchatError
from kvchat.model.source import resolve
seen = []
try:
    source = resolve(sys.argv[1], lambda *at: seen.append(at))
    print(json.dumps([source.name, source.fingerprint.hex(), seen]))
except KvchatError as error:
    print(json.dumps([type(error).__name__, str(error), seen]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """GET /api/models/ID and HEAD or GET /ID/resolve/main/FILE, with ranges."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.reply(is_head=True)

    def do_GET(self):
        self.reply(is_head=False)

    def reply(self, is_head: bool) -> None:
        self.server.requests.append((self.command, self.path))
        if self.path.startswith("/api/models/"):
            repo_id = self.path.removeprefix("/api/models/").split("?")[0].split("/revision/")[0]
            return self.send_info(repo_id)
        org, name, _, _, file_name = self.path.strip("/").split("/", 4)
        files = self.server.repos.get(f"{org}/{name}", {})
        if org == "gated":
            return self.refuse(403, "GatedRepo")
        if file_name not in files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(files[file_name], is_head)

    def send_info(self, repo_id: str) -> None:
        files = self.server.repos.get(repo_id)
        if files is None:
            return self.refuse(404, "RepoNotFound")
        siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
        info = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings}
        info |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def send_file(self, body: bytes, is_head: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers |= {"Accept-Ranges": "bytes", "X-Linked-Size": str(len(body))}
        wanted = self.headers.get("Range")
        if is_head or not wanted:
            return self.send(200, headers, body, is_head)
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.send(206, headers, body[start:])

    def refuse(self, status: int, code: str) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def send(self, status: int, headers: dict, body: bytes, is_head: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    clutter = {"README.md": b"x", "consolidated.safetensors": b"x", "onnx/model.safetensors": b"x"}
    server.repos = {
        "org/tiny": files | clutter,
        "gated/tiny": files,
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
    }
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(target: str, home: Path, endpoint: str, **environment: str):
    """(name or error class, fingerprint or message, progress reports) of a child's resolve."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, target],
        env=variables | environment,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_a_model_is_fetched_once_then_found_offline(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"

    hub.requests.clear()
    name, fingerprint, seen = fetch("org/tiny", tmp_path, endpoint)
    fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET"}
    hub.requests.clear()
    again = fetch("org/tiny", tmp_path, endpoint)
    fetched_again = [
        path for method, path in hub.requests if "/api/" not in path and method == "GET"
    ]
    hub.requests.clear()
    offline = fetch("org/tiny", tmp_path, endpoint, HF_HUB_OFFLINE="1")

    assert name == "org/tiny" and again[:2] == offline[:2] == [name, fingerprint]
    texts = {"config.json", "tokenizer.model", "tokenizer_config.json"}
    assert fetched - {"tiny", "tiny?blobs=true"} == texts | {"model.safetensors"}
    total = sum(len(hub.repos["org/tiny"][f]) for f in texts | {"model.safetensors"})
    assert seen[-1] == ["downloading model.safetensors", total, total]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert fetched_again == [] and hub.requests == []


def test_without_a_connection_the_cache_is_taken(hub, tmp_path):
    name, fingerprint, _ = fetch("org/tiny", tmp_path, f"http://127.0.0.1:{hub.server_port}")

    found = fetch("org/tiny", tmp_path, "http://127.0.0.1:9")

    assert found == [name, fingerprint, []]


@pytest.mark.parametrize(
    ("target", "port", "environment", "wanted"),
    [
        (
            "org/absent",
            None,
            {},
            "has no model org/absent; if it is private, `hf auth login` first",
        ),
        ("gated/tiny", None, {}, "gated/tiny is gated: accept its terms at"),
        ("org/pickled", None, {}, "has no safetensors weights; it has pytorch_model.bin"),
        (
            "org/tiny",
            9,
            {},
            "org/tiny is not in the cache and http://127.0.0.1:9 cannot be reached",
        ),
        ("org/tiny", None, {"HF_HUB_OFFLINE": "1"}, "not in the cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_refusal_is_one_line(hub, tmp_path, target, port, environment, wanted):
    kind, message, seen = fetch(
        target, tmp_path, f"http://127.0.0.1:{port or hub.server_port}", **environment
    )

    assert kind == "ModelError" and wanted in message and seen == []
    assert "\n" not in message and len(message) <= 300


def test_without_the_library_the_extra_is_named(monkeypatch):
    from kvchat.errors import UsageError
    from kvchat.model.source import resolve

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(UsageError, match=r"pip install 'kvchat\[hub\]'"):
        resolve("org/tiny")
