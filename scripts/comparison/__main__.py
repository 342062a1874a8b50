"""`scripts/compare`: from the words of the command line to the table."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import textwrap
from pathlib import Path

from comparison.table import Shape, compare, markdown
from kvchat import __version__
from kvchat.errors import KvchatError, UsageError

NOTES = (
    "Reading prompts: from the submit to the last chat's first token; writing replies: from then on"
    " (kvchat writes for the first chats while it reads for the last). Over all: tokens of replies"
    " over the whole time. Ratios: kvchat over the other, median of pairs (least-most); one pair"
    " before is not counted, who is first alternates. Prompts are random ids, other ones in every"
    " pair; replies are greedy and of full length. transformers: generate, one batch, sdpa"
    " attention, dynamic cache. llama.cpp chooses no tokens."
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="scripts/compare",
        description="kvchat beside transformers, and llama.cpp where its binaries are named: the"
        " same weights, shapes and precision, in turns, as ratios.",
    )
    parser.add_argument("-m", "--model", help="a folder with config.json and safetensors")
    parser.add_argument(
        "--shape", help="random weights of a Llama that kvchat bench knows (default: stories42m)"
    )
    parser.add_argument("--save", type=Path, help="keep the random checkpoint in this folder")
    parser.add_argument("--sessions", default="1,8", help="chats at once (default: 1,8)")
    parser.add_argument("-p", "--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("-n", "--gen", type=int, default=32, help="tokens (default: 32)")
    parser.add_argument("-r", "--pairs", type=int, default=5, help="pairs (default: 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of all sides")
    parser.add_argument("-t", "--threads", type=int, help="CPU threads of all sides")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH")
    parser.add_argument("--llama-batched-bench", type=Path, metavar="PATH")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure and print; the exit code."""
    args = parse(arguments)
    if args.device == "cpu":  # kvchat's benchmark takes a GPU where it sees one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            print("\n".join(answer(args, Path(scratch))))
    except KvchatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def answer(args: argparse.Namespace, scratch: Path) -> list[str]:
    """The report's lines. Raises KvchatError."""
    import torch

    from comparison.hugging_face import Transformers
    from comparison.llama_cpp import LlamaCpp
    from comparison.ours import Kvchat
    from kvchat.bench.arms import load_model

    shapes = [Shape(number, args.prompt, args.gen) for number in _sessions(args)]
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    folder, name = _checkpoint(args, scratch, dtype)
    model = load_model(str(folder), None, dtype, 16, lambda label, done, total: None)
    if model.device != args.device:
        raise UsageError(f"--device {args.device}: kvchat runs on {model.device} here")
    num_threads = torch.get_num_threads()
    ours = Kvchat(model, shapes)
    theirs = Transformers(folder, dtype, args.device, model.vocab)
    llama = LlamaCpp(
        args.llama_bench, args.llama_batched_bench, args.gguf, dtype, args.device, num_threads
    )
    header = _header(args, name, dtype, num_threads)
    rows = compare(
        shapes,
        ours.run,
        lambda shape: {"transformers": theirs.run, **llama.programs(shape)},
        args.pairs,
        _tell,
    )
    same = _same(ours.replies, theirs.replies)
    return [header, "", *markdown(rows), "", *textwrap.wrap(f"{NOTES} {same}", 110)]


def _sessions(args: argparse.Namespace) -> list[int]:
    numbers = args.sessions.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise UsageError(f"--sessions {args.sessions}: write 1,8")
    if min(args.prompt, args.gen - 1, args.pairs) < 1:
        raise UsageError("-p and -r are at least 1, -n at least 2")
    return [int(number) for number in numbers]


def _checkpoint(args: argparse.Namespace, scratch: Path, dtype: str) -> tuple[Path, str]:
    """A folder that all sides read, and what to call it."""
    from comparison.hugging_face import is_installed, write_checkpoint
    from kvchat.bench.shapes import find_shape

    if args.model:
        folder = Path(args.model)
        if args.shape or not (folder / "config.json").is_file():
            raise UsageError(f"-m {args.model}: name one folder with a config.json, and no --shape")
        return folder, folder.resolve().name
    if not is_installed():
        raise UsageError("random weights are made by transformers: pip install 'kvchat[compare]'")
    shape = args.shape or "stories42m"
    folder = args.save or scratch
    write_checkpoint(find_shape(shape), folder, dtype)
    return folder, f"{shape} (random weights)"


def _header(args: argparse.Namespace, name: str, dtype: str, num_threads: int) -> str:
    import torch

    from kvchat.bench.detail import processor_name

    versions = [f"kvchat {__version__}", f"torch {torch.__version__}"]
    if "transformers" in sys.modules:
        versions.append(f"transformers {sys.modules['transformers'].__version__}")
    device = processor_name() if args.device == "cpu" else torch.cuda.get_device_name()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}, {name}, {dtype}, {args.device}: {device}, {num_threads} threads,"
        f" load {load}; {', '.join(versions)}"
    )


def _same(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """In how many tokens two sides' replies of the last pair agree, up to the first that differs
    in each; random weights have near ties, and after one of them all is different."""
    same = 0
    for mine, other in zip(ours, theirs, strict=bool(theirs)):
        differs = [a != b for a, b in zip(mine, other, strict=True)]
        same += differs.index(True) if True in differs else len(differs)
    total = sum(map(len, theirs))
    told = f"Replies of the last pair agree with transformers' in {same} of {total} tokens."
    return told if total else ""


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
