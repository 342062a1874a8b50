"""The model in kvchat itself: the card's conversations, and recall items answered through the paged
pool and through transformers, both in float32 and greedily. Needs transformers for the latter."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from kvchat.chat.runtime import RunOptions, open_runtime
from kvchat.config import SamplingParams
from kvchat.engine.build import EngineOptions, build_engine
from kvchat.engine.request import Event, Request
from kvchat.model.families import parse_config
from kvchat.model.source import resolve

from .recall import Item, is_right, make_items
from .tokens import Encoder

MAX_ANSWER = 48
NUM_TOGETHER = 8  # chats that share the pool at any time

Answers = list[list[int]]
_DENIAL = re.compile(r"not told me|not know that|you told me that\.|have mentioned that yet", re.I)


def _silent(what: str, done: int, total: int) -> None:
    """No progress bar."""


def transcripts(folder: Path, turns: Path, seeds: Iterable[int]) -> str:
    """The fixed user turns in kvchat at its default settings, one conversation per seed."""
    out: list[str] = []
    for seed, user in zip(seeds, json.loads(turns.read_text(encoding="utf-8")), strict=True):
        runtime = open_runtime(RunOptions(str(folder), seed=seed), _silent)
        library = runtime.library
        out.append(f"\n### Seed {seed}\n")
        for text in user:
            library.current.send(text)
            while library.is_working:
                library.pump(1.0)
            out += [f"**You:** {text}  ", f"**Sprout:** {library.current.messages[-1].content}  "]
        runtime.close()
    return "\n".join(out)


def short_chats(folder: Path, chats: Path) -> str:
    """Hand-made chats at temperature 0, the last reply judged: it must hold all that was expected,
    or, where that is nothing, say that it was not told. Lists what went wrong."""
    out: list[str] = []
    runtime = open_runtime(RunOptions(str(folder), sampling={"temperature": 0.0}), _silent)
    library = runtime.library
    judged = json.loads(chats.read_text(encoding="utf-8"))
    num_right = num_denied = 0
    for chat in judged:
        for text in chat["turns"]:
            library.current.send(text)
            while library.is_working:
                library.pump(1.0)
        reply = library.current.messages[-1].content
        is_denial = _DENIAL.search(reply) is not None
        expected = chat["expected"]
        is_good = all(is_right(value, reply) for value in expected) if expected else is_denial
        num_right += is_good
        num_denied += is_denial and bool(expected)
        if not is_good:
            out.append(f"{' / '.join(chat['turns'])} -> {reply}")
        library.new()
    runtime.close()
    out.append(f"{len(judged)} chats, {num_right} right, {num_denied} deny what was told")
    return "\n".join(out)


def answers_through_pool(folder: Path, prompts: list[list[int]], end: int) -> Answers:
    """Greedy replies from kvchat's engine, NUM_TOGETHER prompts at a time; the end id left out.

    Prompts are token ids, so that neither tokenizer nor template takes part.
    """
    source = resolve(str(folder), _silent)
    config = parse_config(source)
    options = EngineOptions(dtype="float32", kv_mem="512MiB")
    answers: dict[int, list[int]] = {}
    running: set[int] = set()

    def listen(events: list[Event]) -> None:
        for event in events:
            answers[event.request_id] += [i for i in event.token_ids if i != end]
            if event.finish_reason is not None:
                assert event.finish_reason in ("stop", "length"), event.error
                running.discard(event.request_id)

    engine, _ = build_engine(source, config, options, _silent, listen, frozenset())
    sampling = SamplingParams(
        temperature=0.0, max_tokens=MAX_ANSWER, stop_token_ids=frozenset({end})
    )
    for number, prompt in enumerate(prompts):
        answers[number] = []
        running.add(number)
        engine.submit(Request(number, number, list(prompt), len(prompt), sampling))
        while len(running) == NUM_TOGETHER:
            engine.step()
    while engine.step():
        pass
    engine.close()
    return [answers[number] for number in range(len(prompts))]


def answers_through_transformers(folder: Path, prompts: list[list[int]], end: int) -> Answers:
    """Greedy replies from transformers, one prompt at a time; the end id left out."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=end,
            pad_token_id=end,
        )
        answers.append([i for i in made[0, len(prompt) :].tolist() if i != end])
    return answers


def compare_recall(model: Path, held_out: Path, count: int, num_workers: int) -> None:
    """Print a markdown table: recall by both ways, how many answers are equal, seconds of each."""
    tokenizer = model / "tokenizer.model"
    encoder = Encoder(tokenizer)
    items = make_items(tokenizer, held_out, count, num_workers)
    print(
        "| distance | items | kvchat | transformers | equal answers | kvchat s | transformers s |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for distance, made in items.items():
        prompts = [item.prompt for item in made]
        started = time.perf_counter()
        ours = answers_through_pool(model, prompts, encoder.end)
        middle = time.perf_counter()
        theirs = answers_through_transformers(model, prompts, encoder.end)
        ended = time.perf_counter()
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        shares = [_share(encoder, made, answers) for answers in (ours, theirs)]
        print(
            f"| {distance} | {len(made)} | {shares[0]:.3f} | {shares[1]:.3f} | {equal}"
            f" | {middle - started:.0f} | {ended - middle:.0f} |",
            flush=True,
        )


def _share(encoder: Encoder, items: list[Item], answers: Answers) -> float:
    right = [is_right(i.value, encoder.decode(a)) for i, a in zip(items, answers, strict=True)]
    return sum(right) / len(right)
