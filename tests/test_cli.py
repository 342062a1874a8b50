"""The command line: what goes in, what comes out on stdout and stderr, and the exit code."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from tiny_model import write_tiny_model

from kvchat import paths
from kvchat.cli import run_cli
from kvchat.terminal.show import Show

GREEDY = ("--temp", "0", "-n", "6", "--ignore-eos", "--kv-mem", "4MiB", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def kvchat(monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        out, err = io.StringIO(), io.StringIO()
        code = run_cli([str(argument) for argument in arguments], Show(out, err))
        return code, out.getvalue(), err.getvalue()

    return command


def _process(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvchat", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def _refused(answer, code: int, words: str) -> None:
    """One line on stderr with these words, nothing on stdout."""
    got_code, out, err = answer
    assert (got_code, out) == (code, ""), answer
    assert err.count("\n") == 1, err
    assert words in err, err
    assert "Traceback" not in err


def test_help_imports_nothing_heavy():
    script = (
        "import sys, kvchat.cli\n"
        "kvchat.cli.run_cli(['--help'], None)\n"
        "heavy = {'torch', 'numpy', 'prompt_toolkit', 'jinja2', 'numba', 'sentencepiece',"
        " 'tokenizers', 'safetensors', 'huggingface_hub', 'transformers'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert "run    Chat" in done.stdout
    assert done.stdout.endswith("HEAVY []\n")


def test_help_is_quick():
    import resource

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        before = spent()
        with _process("--help") as running:
            running.communicate()
        seconds.append(spent() - before)

    assert min(seconds) < 0.3


def test_version_and_help(kvchat, capsys):
    assert kvchat("--version")[0] == 0
    assert capsys.readouterr().out == "kvchat 0.1.0\n"
    assert kvchat("run", "--help")[0] == 0
    text = capsys.readouterr().out
    for flag in ("-m,", "-c,", "-n,", "--temp", "--top-k", "--min-p", "-s,", "-sys", "-p,", "-f,"):
        assert flag in text


def test_one_prompt_is_answered_on_stdout_alone(kvchat, model):
    code, out, err = kvchat("run", model, "-p", "hello there", *GREEDY)

    assert code == 0
    assert err == ""
    assert out.endswith("\n")
    assert out.strip()
    assert (code, out, err) == kvchat("run", "-m", model, "-p", "hello there", *GREEDY, "-s", -1)


def test_stdin_or_a_file_is_appended_to_the_prompt(kvchat, model, tmp_path):
    (tmp_path / "more.txt").write_text("there, how are\nyou today?")
    whole = kvchat("run", model, "-p", "hello\nthere, how are\nyou today?", *GREEDY)

    assert (
        kvchat("run", model, "-p", "hello", *GREEDY, stdin=b"there, how are\nyou today?") == whole
    )
    assert kvchat("run", model, "-p", "hello", "-f", tmp_path / "more.txt", *GREEDY) == whole
    assert whole != kvchat("run", model, "-p", "hello", *GREEDY)


def test_every_line_of_stdin_is_a_turn(kvchat, model, tmp_path):
    code, out, err = kvchat("run", model, *GREEDY, stdin=b"hello\r\n\nhow are you\nfine")

    assert (code, err) == (0, "")
    assert len(re.findall(r"[^\n]\n\n", out + "\n")) == 3
    (tmp_path / "turns.txt").write_text("hello\n\nhow are you\nfine\n")
    assert kvchat("run", model, *GREEDY, "-f", tmp_path / "turns.txt") == (code, out, err)
    first = kvchat("run", model, "-p", "hello", *GREEDY)[1]
    assert out.startswith(first)


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (("-p", ""), b"", 2, "the prompt is empty"),
        (("-p", "  "), b"\n", 2, "the prompt is empty"),
        ((), b"", 2, "stdin holds no text"),
        ((), b"\n  \n", 2, "stdin holds no text"),
        ((), b"caf\xe9\n", 2, "stdin is not UTF-8 text: byte 0xe9 at offset 3"),
        (("-p", "x"), b"\xff", 2, "stdin is not UTF-8 text: byte 0xff at offset 0"),
        ((), b"x" * 10_000_000, 4, "stdin: more than 4 MiB for one turn"),
        (("-p", "hello " * 2000), b"", 4, "context"),
        (("-f", "/nowhere/x"), b"", 2, "-f /nowhere/x: No such file or directory"),
        (("-p", "x", "--temp", "hot"), b"", 2, 'temp cannot be "hot"'),
        (("-p", "x", "--logit-bias", "5"), b"", 2, "--logit-bias 5: expected ID+BIAS"),
        (("-p", "x", "--device", "gpu"), b"", 2, "--device gpu: choose auto, cpu"),
        (("-p", "x", "--device", "cuda:1"), b"", 2, "CUDA_VISIBLE_DEVICES=0 shows 1"),
        (("-p", "x", "--device", "cpu", "--weights", "int8"), b"", 2, "int8 is for a GPU"),
        (("-p", "x", "-m", "other"), b"", 2, "two models"),
        (("-p", "x", "--chat-format", "nope"), b"", 2, "nope"),
        (("-p", "x", "--think"), b"", 2, "no switch for thinking"),
        (("-p", "x", "-s", "4294967296"), b"", 2, "seed must be 0 to 4294967295, or -1"),
        (("-p", "x", "-c", "3"), b"", 2, "3 is not in the range"),
        (("-p", "x", "--kv-mem", "lots"), b"", 2, "lots"),
        (("-p", "x", "--frob"), b"", 2, "--frob"),
        (("-p", "x", "extra"), b"", 2, "extra"),
    ],
)
def test_a_bad_request_is_one_line(kvchat, model, monkeypatch, arguments, stdin, code, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    _refused(kvchat("run", model, *arguments, stdin=stdin), code, words)


def _broken(model, tmp_path, breakage):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    breakage(broken)
    return broken


def _edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _unlink(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def _write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (_unlink("tokenizer.model"), "tokenizer"),
        (_unlink("config.json"), "config.json"),
        (_unlink("model.safetensors"), "safetensors"),
        (_edit_config(architectures=["MambaForCausalLM"], model_type="mamba"), "MambaForCausalLM"),
        (_edit_config(num_hidden_layers=-1), "num_hidden_layers"),
        (_edit_config(vocab_size=100), ""),
        (_truncate, "model.safetensors"),
        (_write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "LFS"),
        (_write("model.safetensors", b"\x80\x04\x95pickle" * 10), "model.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_model_is_one_line(kvchat, model, tmp_path, breakage, words):
    broken = _broken(model, tmp_path, breakage)

    _refused(kvchat("run", broken, "-p", "x"), 3, words)


def test_a_path_that_is_not_there_is_one_line(kvchat):
    _refused(kvchat("run", "/nowhere/\x1b[31mmodel", "-p", "x"), 2, "\\x1b[31mmodel")


def test_without_a_model_it_says_what_to_type(kvchat, monkeypatch):
    monkeypatch.setattr(paths, "shipped_model", lambda: None)

    _refused(kvchat("run"), 2, "this build ships no model; name one: kvchat run PATH")


def test_without_a_model_it_takes_the_shipped_one(kvchat, model, monkeypatch):
    monkeypatch.setattr(paths, "shipped_model", lambda: model)

    assert kvchat("run", "-p", "hello", *GREEDY)[0] == 0


def test_an_unforeseen_error_is_one_line(kvchat, monkeypatch):
    monkeypatch.setattr(paths, "shipped_model", lambda: 1 / 0)

    _refused(kvchat("run"), 1, "internal error (ZeroDivisionError: division by zero); --debug")
    with pytest.raises(ZeroDivisionError):
        kvchat("run", "--debug")


def test_a_closed_pipe_ends_it_silently(model):
    with _process("run", model, *GREEDY[:2], "-n", "400", "--ignore-eos") as running:
        running.stdin.write(b"one\ntwo\nthree\n" * 20)
        running.stdin.close()
        running.stdout.read(1)
        running.stdout.close()

        assert running.wait(timeout=60) == 141
        assert running.stderr.read() == b""


def test_replies_come_while_stdin_is_still_open(model):
    with _process("run", model, *GREEDY) as running:
        running.stdin.write(b"hello\n")
        running.stdin.flush()
        assert running.stdout.readline().strip()
        running.stdin.close()

        assert running.wait(timeout=60) == 0


@pytest.mark.parametrize("redirect", [">&-", "<&- 2>&-"])
def test_closed_streams_are_no_accident(model, redirect):
    command = f"exec {sys.executable} -m kvchat run {model} -p x -n 3 {redirect}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)

    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_it_with_the_shell_s_code(model, number, code):
    with _process("run", model, *GREEDY) as running:
        running.stdin.write(b"hello\n")
        running.stdin.flush()
        running.stdout.readline()
        running.send_signal(number)

        assert running.wait(timeout=10) == code
        assert b"Traceback" not in running.stderr.read()


def test_bench_scheduling_prints_a_table(kvchat):
    code, out, err = kvchat("bench", "scheduling")

    assert (code, err) == (0, "")
    assert out.startswith("|")
