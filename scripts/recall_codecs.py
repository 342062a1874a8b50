"""Recall of stated facts with compressed KV: the shipped model's own test items, answered through
kvchat's pool natively, as INT8 and as INT4, item by item the same.

    python scripts/train_demo_model.py corpus          # once: the held-out dialogues
    python scripts/recall_codecs.py --items 1000

Prints a markdown table. On a GPU the reference backend reads the pool (torch, all codecs).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from demo_model.recall import Item, is_right, make_items
from demo_model.tokens import Encoder

from kvchat.attention.rope import build_rope
from kvchat.bench.probe import Arm, Probed, Setting, replies
from kvchat.config import KVSpec
from kvchat.kv.layout import Codec
from kvchat.model.families import parse_config
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

ROOT = Path(__file__).resolve().parent.parent
DISTANCES = (1_000, 2_000, 3_000)
SETTINGS = {
    "native": Setting(()),
    "int8": Setting((Codec.INT8,), 64, 128),
    "int4": Setting((Codec.INT4,), 64, 128),
    "int8 -> int4": Setting((Codec.INT8, Codec.INT4), 64, 128),
}
MAX_ANSWER = 48


def _probed(model: Path, device: str) -> Probed:
    source = resolve(str(model))
    config = parse_config(source)
    decoder = load_decoder(source, config, "bfloat16" if device == "cuda" else "float32", device)
    dtype = str(decoder.embedding.dtype).removeprefix("torch.")
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, dtype)
    backend = "reference" if device == "cuda" else "cpu"
    return Probed(decoder, spec, build_rope(config, config.max_position, device), backend)


def _batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    ordered = sorted(items, key=lambda item: len(item.prompt))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _answers(
    probed: Probed, encoder: Encoder, setting: Setting, items: list[Item], size: int
) -> dict[int, bool]:
    """By the item's id: whether its reply holds the value."""
    right = {}
    for batch in _batches(items, size):
        longest = max(len(item.prompt) for item in batch) + MAX_ANSWER
        arm = Arm(probed, setting, len(batch), longest)
        prompts = [item.prompt for item in batch]
        made = replies(arm, prompts, MAX_ANSWER, frozenset({encoder.end}))
        for item, ids in zip(batch, made, strict=True):
            right[id(item)] = is_right(item.value, encoder.decode(ids))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "sprout")
    parser.add_argument(
        "--held-out", type=Path, default=ROOT / "build" / "demo_model" / "held_out.npz"
    )
    parser.add_argument("--items", type=int, default=1000, help="per distance")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--together", type=int, default=32, help="chats at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that write items")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = args.model / "tokenizer.model"
    items = make_items(tokenizer, args.held_out, args.items, args.workers)
    encoder, probed = Encoder(tokenizer), _probed(args.model, device)
    print(
        f"{device}, {probed.spec.dtype}, {probed.backend} backend, sinks 64, window 128, greedy\n"
    )
    print("| distance | items | KV | right | against native | lost | won | seconds |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|", flush=True)
    for distance in args.distances:
        native: dict[int, bool] = {}
        for name in args.settings:
            started = time.perf_counter()
            right = _answers(probed, encoder, SETTINGS[name], items[distance], args.together)
            native = native or right
            lost = sum(native[i] and not right[i] for i in right)
            won = sum(right[i] and not native[i] for i in right)
            share = sum(right.values()) / len(right)
            change = 100 * (won - lost) / len(right)
            seconds = time.perf_counter() - started
            print(
                f"| {distance} | {len(right)} | {name} | {share:.1%} | {change:+.1f} points"
                f" | {lost} | {won} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
