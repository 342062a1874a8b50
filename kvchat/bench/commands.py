"""The commands that measure and plan: `kvchat bench`, `plan` and `probe`. Flags are here, work is
elsewhere: what a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import click

from kvchat import paths
from kvchat.bench.flags import bench_flags, refuse_before_subcommand
from kvchat.config import DTYPE_BYTES
from kvchat.errors import UsageError
from kvchat.model.sizes import WEIGHTS


class Show(Protocol):
    """Where answers and progress go: terminal/show's."""

    def answer(self, text: str, is_last: bool = False) -> None: ...

    def note(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int) -> None: ...


def shipped_model() -> str:
    """The folder of the model that ships with kvchat. Raises UsageError where there is none."""
    folder = paths.shipped_model()
    if folder is None:
        raise UsageError(
            "this build ships no model; name one: kvchat run PATH"
            " (a .safetensors file, a folder, a shard index or a hub id)"
        )
    return str(folder)


def _device(show: Show, asked: str, dtype: str, weights: str = "auto") -> str:
    """The device to measure on; a GPU that is there and cannot be used is told of."""
    from kvchat.engine.device import choose_device

    choice = choose_device(asked, dtype, weights)
    if choice.warning:
        show.note(f"warning: {choice.warning}")
    return choice.device


@click.command(short_help="Measure what compressed KV costs a model.")
@click.argument("model", required=False)
@click.option("--text", type=click.Path(path_type=Path), help="Plain text, or .jsonl of chats.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"
)
@click.option("--block-size", type=click.Choice(["16", "32"]), default="16", help="Tokens a block.")
@click.option("--kv-window", "window", type=click.IntRange(0), default=128, show_default=True)
@click.option("--kv-sink", "sink", type=click.IntRange(0), default=64, show_default=True)
@click.option("--texts", "num_texts", type=click.IntRange(1), default=8, show_default=True)
@click.option("--tokens", "num_tokens", type=click.IntRange(256), default=1024, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.pass_obj
def probe(show: Show, model: str | None, as_json: bool, **flags: Any) -> None:  # noqa: ANN401
    """Score a text through the pool, compressed and not, and remember which codecs MODEL stands.

    Without --text the model writes it. What fails is not used by --kv-cache auto and auto4.
    """
    from kvchat.bench.probing import ProbeOptions, report_json, report_lines, run_probe

    flags["block_size"] = int(flags["block_size"])
    flags["device"] = _device(show, flags["device"], flags["dtype"])
    report = run_probe(ProbeOptions(model or shipped_model(), **flags), show.progress)
    text = report_json(report) if as_json else "\n".join(report_lines(report))
    show.answer(text + "\n", is_last=True)


@click.group(no_args_is_help=False, invoke_without_command=True)
@bench_flags
@click.pass_context
def bench(context: click.Context, **flags: Any) -> None:  # noqa: ANN401
    """Measure kvchat on this machine: many sessions in one pool, each mode beside the others.

    With -p and -n: llama-bench's rows. Other benchmarks have names of their own.
    """
    if context.invoked_subcommand is not None:
        refuse_before_subcommand(context)
        return
    from kvchat.bench.command import answer
    from kvchat.engine.profile import profiling, unwatched

    model = None if flags["shape"] else flags["model"] or shipped_model()
    if flags["shape"] and flags["model"]:
        raise UsageError(f"a model and a shape: -m {flags['model']} and --shape {flags['shape']}")
    show: Show = context.obj
    flags["device"] = _device(show, flags["device"], flags["dtype"], flags["weights"])
    with profiling(flags["profile"], show.note) as profiler:
        text = answer(flags, model, show.progress, profiler.watch if profiler else unwatched)
        show.answer(text + "\n", is_last=True)


@bench.command()
@click.pass_obj
def scheduling(show: Show) -> None:
    """Microseconds of a scheduling step, with 8, 100 and 1,000 sessions."""
    from kvchat.bench.scheduling import format_scheduling, run_scheduling_bench

    show.answer(format_scheduling(run_scheduling_bench()) + "\n", is_last=True)


@bench.command("attention")
@click.pass_obj
def bench_attention(show: Show) -> None:
    """Microseconds of decode attention on this CPU, by codec."""
    from kvchat.bench.attention import format_attention, run_attention_bench

    show.answer(format_attention(run_attention_bench(show.progress)) + "\n", is_last=True)


@bench.command("kernels")
@click.pass_obj
def bench_kernels(show: Show) -> None:
    """Microseconds and TB/s of the CUDA kernels of decoding, beside torch's and FlashInfer's."""
    from kvchat.bench.kernels import format_kernels, run_kernel_bench

    show.answer(format_kernels(run_kernel_bench(show.progress)) + "\n", is_last=True)


@bench.command("decode")
@click.option("-m", "--model", help="Default: the model that ships with kvchat.")
@click.option("--shape", help="Random weights of a well-known shape: llama3-8b, ...")
@click.option("--dtype", type=click.Choice(["auto", *DTYPE_BYTES]), default="auto")
@click.option("--weights", type=click.Choice(WEIGHTS), default="auto", help="int8: on a GPU.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--no-graphs", is_flag=True, help="On a GPU: capture no CUDA graphs.")
@click.option("--block", type=click.Choice(["16", "32"]), default="16", help="Tokens.")
@click.option("--case", "cases", multiple=True, help="SESSIONSxTOKENS[:MODE], as 8x4096:int8.")
@click.option("-p", "--prompt", "prompts", multiple=True, type=click.IntRange(1, 1_000_000))
@click.option("--steps", "num_steps", type=click.IntRange(1, 10_000), default=64)
@click.option("-r", "--reps", type=click.IntRange(1, 1000), default=5, help="Of a prompt.")
@click.option("-o", "--output", type=click.Choice(["text", "jsonl"]), default="text")
@click.pass_obj
def bench_decode(show: Show, **flags: Any) -> None:  # noqa: ANN401
    """Tokens a second of many chats that all generate (--case), and of prompts alone (-p)."""
    from kvchat.bench.decode import DecodeFlags, lines

    if flags["shape"] and flags["model"]:
        raise UsageError(f"a model and a shape: -m {flags['model']} and --shape {flags['shape']}")
    model = None if flags["shape"] else flags["model"] or shipped_model()
    flags["device"] = _device(show, flags["device"], flags["dtype"], flags["weights"])
    for line in lines(DecodeFlags(**{**flags, "model": model}), show.progress):
        show.answer(line + "\n")


@bench.command("codecs")
@click.pass_obj
def bench_codecs(show: Show) -> None:
    """Error, bytes and speed of INT8 and INT4 KV, beside codecs of llama.cpp's kind."""
    from kvchat.bench.codecs import run_codec_bench

    show.answer(run_codec_bench() + "\n", is_last=True)


@bench.command()
@click.option("--shape", default="llama3-8b", show_default=True, help="Whose KV: bytes a token.")
@click.option("--kv-mem", default="4GiB", show_default=True, help="Bytes that each layout gets.")
@click.option("-c", "--ctx", "max_tokens", type=click.IntRange(16), default=4096, show_default=True)
@click.option("--chats", type=click.IntRange(1, 10_000), default=240, show_default=True)
@click.option("--rate", type=click.FloatRange(0.001, 1000), default=0.8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--trace", type=click.Path(path_type=Path), help="Chats of this file (docs/traces.md)."
)
@click.option("--record", type=click.Path(path_type=Path), help="Write the chats there.")
@click.option("--slots", "num_parts", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--chunk", "chunk_tokens", type=click.IntRange(1), default=256, help="Tokens a chunk."
)
@click.option("--block-size", type=click.Choice(["16", "32"]), default="16", help="Tokens a block.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw it there: FILE.png or FILE.svg."
)
@click.option("-o", "--output", type=click.Choice(["md", "json", "csv"]), default="md")
@click.pass_obj
def layouts(show: Show, **flags: Any) -> None:  # noqa: ANN401
    """The same chats kept in eight ways: contiguous, slots, cells, chunks, paged, compressed."""
    from kvchat.bench.layouts.report import answer

    show.answer(answer(flags, show.progress) + "\n", is_last=True)


@click.command(short_help="Say what fits, without loading anything.")
@click.argument("model", required=False)
@click.option("--shape", help="A well-known model instead: llama3-8b, qwen2.5-7b, ...")
@click.option("--sessions", type=click.IntRange(1, 4096), default=8, show_default=True)
@click.option("-c", "--ctx", "context", type=click.IntRange(16), help="Tokens of each session.")
@click.option("--mem", help="Memory for everything: 24GiB. Default: what this machine has free.")
@click.option("--kv-cache", type=click.Choice(["native", "int8", "int4"]), default="native")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"
)
@click.option("--weights", type=click.Choice(WEIGHTS), default="auto", help="int8: on a GPU.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--block-size", type=click.Choice(["16", "32"]), default="16", help="Tokens a block.")
@click.option("--mix", metavar="N,N,...", help="Tokens of chats, for paged against contiguous.")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md")
@click.pass_obj
def plan(show: Show, **flags: Any) -> None:  # noqa: ANN401
    """Say what fits where: from MODEL's config.json and safetensors header, or from --shape alone.

    No weights are read, no GPU is needed, nothing is downloaded.
    """
    from kvchat.bench.plan_report import PlanFlags, answer

    model = None if flags["shape"] else flags["model"] or shipped_model()
    if flags["shape"] and flags["model"]:
        raise UsageError(f"a model and a shape: {flags['model']} and --shape {flags['shape']}")
    show.answer(answer(PlanFlags(**{**flags, "model": model})) + "\n", is_last=True)


@bench.command()
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw it there: FILE.png or FILE.svg."
)
@click.pass_obj
def capacity(show: Show, plot: Path | None) -> None:
    """Turns of eight growing chats that one pool serves native, with auto and with auto4; and how
    many times the tokens of native blocks their bytes hold, counted on real tensors."""
    from kvchat.bench.capacity import PLOTTED_TOKENS, format_capacity, run_capacity_bench
    from kvchat.bench.plot import check_plot, draw_capacity
    from kvchat.bench.ratios import format_ratios, run_ratio_bench

    if plot is not None:
        check_plot(plot)
    found = run_capacity_bench()
    if plot is not None:
        draw_capacity([c for c in found if c.chat_tokens == PLOTTED_TOKENS], plot)
    show.answer(format_capacity(found) + "\n\n", is_last=False)
    show.answer(format_ratios(run_ratio_bench()) + "\n", is_last=True)
