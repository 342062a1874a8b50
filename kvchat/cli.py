"""The command `kvchat`: parse, build, call. A KvchatError becomes one line and an exit code."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from kvchat import __version__
from kvchat.bench.commands import bench, plan, probe, shipped_model
from kvchat.chat.options import OPTIONS, read_seed, set_sampling
from kvchat.config import KV_RUNGS, SamplingParams
from kvchat.errors import KvchatError, UsageError
from kvchat.model.sizes import WEIGHTS
from kvchat.terminal.show import Show

if TYPE_CHECKING:
    from kvchat.chat.runtime import RunOptions, Runtime
    from kvchat.engine.profile import Profiler

# Exit codes as a shell counts them: 128 + the signal's number.
EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE = 128 + signal.SIGPIPE

# Flags of options that llama.cpp spells otherwise than our /set does.
SHORT_FLAGS = {"n": ("-n", "--predict"), "typical_p": ("--typical-p", "--typical")}

Decorated = Callable[..., None]


def _sampling_options(command: Decorated) -> Decorated:
    """One flag for each option of a session; the texts are parsed as /set parses them."""
    for name, option in reversed(OPTIONS.items()):
        flags = SHORT_FLAGS.get(name, (f"--{name.replace('_', '-')}",))
        if name == "ignore_eos":
            kind: dict[str, Any] = {"is_flag": True, "flag_value": "on"}
        else:
            kind = {"multiple": name == "stop", "metavar": "TEXT" if name == "stop" else "N"}
        command = click.option(*flags, name, help=option.hint, **kind)(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kvchat", message="%(prog)s %(version)s")
def cli() -> None:
    """Many chats in one paged KV pool, in the terminal."""


@cli.command(short_help="Chat, or answer -p or the lines of stdin.")
@click.argument("model_arg", metavar="[MODEL]", required=False)
@click.option("-m", "--model", help="MODEL, as in llama.cpp.")
@click.option("-p", "--prompt", help="Answer this and exit; stdin or -f is appended.")
@click.option("-f", "--file", help="Read this instead of stdin.")
@click.option("-sys", "--system-prompt", "system", help="The system message.")
@click.option("-c", "--ctx-size", "context", type=click.IntRange(16), help="Context in tokens.")
@_sampling_options
@click.option("--logit-bias", multiple=True, metavar="ID(+|-)BIAS", help="As in 15043+1.5.")
@click.option("-s", "--seed", help="Default: random for every chat.")
@click.option("--chat-format", help="llama2, llama3, chatml, mistral, zephyr or plain.")
@click.option("--think/--no-think", default=None, help="For models that can.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"
)
@click.option(
    "--weights", type=click.Choice(WEIGHTS), default="auto", help="int8: half of 16 bits, on a GPU."
)
@click.option("--block-size", type=click.Choice(["16", "32"]), default="16", help="Tokens a block.")
@click.option("--kv-mem", help="Memory of the KV pool: 2GiB or 70%.")
@click.option(
    "--kv-cache",
    type=click.Choice([*KV_RUNGS]),
    help="Compress the KV cache: never, when memory runs short (auto, the default: to INT8; auto4:"
    " to INT4), or always.",
)
@click.option("--kv-window", type=click.IntRange(0), default=128, help="Last tokens kept native.")
@click.option("--kv-sink", type=click.IntRange(0), default=64, help="First tokens kept native.")
@click.option("--host-mem", help="Main memory for idle chats of a GPU: 8GiB or 50%.")
@click.option("--force", is_flag=True, help="Use codecs that have not passed kvchat probe.")
@click.option(
    "-b", "--batch", type=click.IntRange(1), help="Tokens a step: 512, on a GPU up to 2048."
)
@click.option("-np", "--parallel", type=click.IntRange(1), help="Chats a step: up to 256.")
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--no-graphs", is_flag=True, help="On a GPU: launch every kernel, capture no graphs.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Write a trace there; tell at the end where a step's time went.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and logs.")
@click.pass_obj
def run(show: Show, **flags: Any) -> None:  # noqa: ANN401
    """Chat with MODEL: a .safetensors file, a folder, a shard index or a hub id. Without MODEL,
    with the one that ships with kvchat.

    On a terminal this is a chat with many sessions. With -p it answers once; else every line of
    stdin is a turn, and stdout gets the replies alone.
    """
    from kvchat.engine.profile import profiling

    options = _run_options(flags)
    is_batch = flags["prompt"] is not None or flags["file"] is not None
    has_screen = sys.stdin.isatty() and sys.stdout.isatty() and _term() != "dumb"
    with profiling(flags["profile"], show.note) as profiler:
        if not has_screen or is_batch:
            _answer(show, options, flags, profiler)
            return
        code = _chat(show, options, profiler)
    os._exit(code)  # whatever long step the engine is in


for command in (bench, plan, probe):
    cli.add_command(command)


def _answer(
    show: Show, options: RunOptions, flags: dict[str, Any], profiler: Profiler | None
) -> None:
    """Turns from -p, -f or stdin; replies on stdout."""
    from kvchat.chat.runtime import open_runtime
    from kvchat.terminal.pipe import answer_turns, read_turns

    prompt, file = flags["prompt"], flags["file"]
    has_input = not sys.stdin.isatty() or (prompt is None and file is None)
    turns = read_turns(prompt, file, sys.stdin.buffer if has_input else None)
    runtime = open_runtime(options, show.progress)
    for warning in runtime.warnings:
        show.note(f"warning: {warning}")
    if profiler:
        _watch(profiler, runtime)
        profiler.time(show, "answer", "drawing")
    try:
        answer_turns(show, runtime.library, turns)
    finally:
        if not isinstance(sys.exception(), KeyboardInterrupt):
            runtime.close()


def _chat(show: Show, options: RunOptions, profiler: Profiler | None) -> int:
    """The interactive chat; its exit code."""
    from kvchat.chat.runtime import open_runtime
    from kvchat.terminal.typeahead import keep_keys

    with keep_keys(sys.stdin.fileno()):
        runtime = open_runtime(options, show.progress)
        return _talk(runtime, show.use_color, profiler)


def _talk(runtime: Runtime, use_color: bool, profiler: Profiler | None) -> int:
    from kvchat.terminal.repl import Repl
    from kvchat.terminal.screen import Terminal

    repl = Repl(runtime, Terminal(sys.stdout, lambda: os.get_terminal_size(1), use_color))
    if profiler:
        _watch(profiler, runtime)
        profiler.time(repl.show, "lines", "drawing")
        profiler.time(repl.screen.app.renderer, "render", "drawing")
    return repl.run()


def _watch(profiler: Profiler, runtime: Runtime) -> None:
    """The engine's parts, and what becomes of its events on the way to the terminal."""
    from kvchat.engine.profile import HAND_OVER

    profiler.watch(runtime.engine)
    profiler.time(runtime.library, "on_events", HAND_OVER)
    profiler.time(runtime.library, "apply", "events to text")


def _run_options(flags: dict[str, Any]) -> RunOptions:
    from kvchat.chat.runtime import RunOptions
    from kvchat.engine.build import EngineOptions

    if flags["model_arg"] and flags["model"]:
        raise UsageError(f"two models: {flags['model_arg']} and -m {flags['model']}; name one")
    engine = EngineOptions(
        device=flags["device"],
        dtype=flags["dtype"],
        weights=flags["weights"],
        context=flags["context"],
        kv_mem=flags["kv_mem"],
        kv_cache=flags["kv_cache"],
        kv_window=flags["kv_window"],
        kv_sink=flags["kv_sink"],
        host_mem=flags["host_mem"],
        force=flags["force"],
        block_size=int(flags["block_size"]),
        max_num_batched_tokens=flags["batch"],
        max_num_seqs=flags["parallel"],
        threads=flags["threads"],
        use_graphs=not flags["no_graphs"],
    )
    return RunOptions(
        model=flags["model_arg"] or flags["model"] or shipped_model(),
        engine=engine,
        chat_format=flags["chat_format"],
        sampling=dict(_sampling(flags)),
        system=flags["system"],
        seed=None if flags["seed"] in (None, "-1") else read_seed(flags["seed"]),
        think=flags["think"],
    )


def _sampling(flags: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """What was chosen, by SamplingParams name."""
    for name, option in OPTIONS.items():
        texts = flags[name] if name == "stop" else filter(None, [flags[name]])
        values = [getattr(set_sampling(SamplingParams(), name, t), option.field) for t in texts]
        if values:
            yield option.field, sum(values, ()) if name == "stop" else values[0]
    if flags["logit_bias"]:
        yield "logit_bias", tuple(map(_parse_bias, flags["logit_bias"]))


def _parse_bias(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"(\d+)([+-](?:\d+(?:\.\d+)?|inf))", text)
    if not found:
        raise UsageError(f"--logit-bias {text}: expected ID+BIAS or ID-BIAS, as in 15043+1.5")
    return int(found[1]), float(found[2])


def _term() -> str:
    return os.environ.get("TERM", "dumb")


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def run_cli(arguments: list[str], show: Show) -> int:
    """Do what the arguments say; the exit code. Whatever goes wrong is one line on stderr."""
    try:
        # not cli.main(): it turns a closed pipe into exit code 1
        with cli.make_context("kvchat", arguments or ["--help"], obj=show) as context:
            cli.invoke(context)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "kvchat"
        show.error(f"{error.format_message().rstrip('.')}; see {path} --help")
        return error.exit_code
    except KvchatError as error:
        if "--debug" in arguments:
            raise
        show.error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        show.progress("", 1, 1)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_PIPE
    except Exception as error:
        if "--debug" in arguments:
            raise
        show.error(f"internal error ({type(error).__name__}: {error}); --debug shows where")
        return EXIT_INTERNAL
    return 0


def main() -> None:
    """The console script: streams, signals, and an exit code that a shell understands."""
    # Read when torch starts: its idle threads would spin against those of the attention kernels.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, _exit_on_signal)
    if "--debug" in sys.argv:
        logging.basicConfig(level=logging.INFO)
    else:
        logging.getLogger().addHandler(logging.NullHandler())
    logging.captureWarnings(True)  # libraries' warnings are logs: nobody can act on them here
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    is_live = sys.stderr.isatty() and _term() != "dumb"
    use_color = is_live and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    code = run_cli(sys.argv[1:], Show(sys.stdout, sys.stderr, use_color, is_live))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_PIPE
    if code > 128:
        os._exit(code)  # at once and silently: the engine may be in the middle of a long step
    sys.exit(code)
