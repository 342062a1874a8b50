"""The flags of `kvchat bench`. Only click is imported here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvchat.config import DTYPE_BYTES
from kvchat.model.sizes import WEIGHTS

Decorated = Callable[..., None]
_PATH = click.Path(path_type=Path)

_OPTIONS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("-m", "--model"), {"help": "Default: the model that ships with kvchat."}),
    (("--shape",), {"help": "Random weights of a well-known shape: stories15m, llama3-8b, ..."}),
    (("--dtype",), {"type": click.Choice(["auto", *DTYPE_BYTES]), "default": "auto"}),
    (("--weights",), {"type": click.Choice(WEIGHTS), "default": "auto", "help": "int8: on a GPU."}),
    (
        ("--device",),
        {"default": "auto", "show_default": True, "help": "auto, cpu, cuda or cuda:N."},
    ),
    (("--no-graphs",), {"is_flag": True, "help": "On a GPU: capture no CUDA graphs."}),
    (("--sessions",), {"type": click.IntRange(1, 4096), "default": 8, "show_default": True}),
    (("--turns",), {"type": click.IntRange(1, 1000), "default": 3, "show_default": True}),
    (("--prompt",), {"default": "64-192", "show_default": True, "help": "Tokens of a turn."}),
    (("--gen",), {"default": "8-16", "show_default": True, "help": "Tokens of a reply."}),
    (("--shared-prefix",), {"type": click.IntRange(0), "default": 128, "show_default": True}),
    (("-d", "--depth"), {"default": "0", "help": "Tokens of each chat before the clock starts."}),
    (
        ("--kv-cache",),
        {"default": "native,int8,auto", "show_default": True, "help": "Modes, one a column."},
    ),
    (("--block",), {"type": click.Choice(["16", "32"]), "default": "16", "help": "Tokens."}),
    (("--kv-mem",), {"help": "Memory of each pool. Default: 60 % of what native needs."}),
    (("--arrival",), {"default": "closed", "help": "closed, or poisson:R chats a second."}),
    (("--trace",), {"type": _PATH, "help": "Lengths and times of this file (docs/traces.md)."}),
    (("--sweep",), {"help": "sessions=1,2,4,8,16: one row each."}),
    (("-r", "--reps"), {"type": click.IntRange(1, 1000), "default": 5, "show_default": True}),
    (("--warmup",), {"type": click.IntRange(0, 100), "default": 1, "show_default": True}),
    (("--seed",), {"type": int, "default": 0, "show_default": True}),
    (
        ("--ignore-eos/--stop-at-eos",),
        {"default": True, "help": "Lengths as drawn, or as the model ends them."},
    ),
    (("--goodput",), {"help": "ttft:500,itl:50: replies a second within these milliseconds."}),
    (("--verify",), {"is_flag": True, "help": "Also: the same tokens, batched, forked, hit."}),
    (("--quality",), {"is_flag": True, "help": "Also: the table of kvchat probe."}),
    (("--detail",), {"is_flag": True, "help": "Everything that was measured."}),
    (("-p", "--pp"), {"help": "Read prompts of N,N,... tokens, as llama-bench does."}),
    (("-n", "--tg"), {"help": "Write replies of N,N,... tokens, as llama-bench does."}),
    (
        ("-o", "--output"),
        {"type": click.Choice(["text", "md", "json", "jsonl", "csv"]), "default": "text"},
    ),
    (
        ("--profile",),
        {"type": _PATH, "help": "Write a trace there, tell where a step's time went."},
    ),
    (("--plot",), {"type": _PATH, "help": "Draw it there: FILE.png or FILE.svg."}),
)


def bench_flags(command: Decorated) -> Decorated:
    """Give the command all flags of the main benchmark."""
    for names, kind in reversed(_OPTIONS):
        command = click.option(*names, **kind)(command)
    return command


def refuse_before_subcommand(context: click.Context) -> None:
    """The flags are the main benchmark's: before the name of another one they would be lost."""
    for name in context.params:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"{flag} stands before {context.invoked_subcommand}; write it after", context
            )
