"""`kvchat probe`: which texts, which settings, what is said about them, and what is remembered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvchat.attention.rope import build_rope
from kvchat.bench.needles import make_needles
from kvchat.bench.probe import (
    MIN_SHARE,
    Arm,
    Probed,
    Score,
    Setting,
    replies,
    sample_texts,
    score_texts,
)
from kvchat.chat.messages import Message
from kvchat.chat.prompt import encode_piece
from kvchat.chat.template import ChatFormat, load_chat_format
from kvchat.chat.tokenizer import Tokenizer, load_tokenizer
from kvchat.config import KVSpec, ModelConfig
from kvchat.engine.device import choose_device, device_memory
from kvchat.engine.gate import GateResult, decisive, remember
from kvchat.errors import CapacityError, UsageError, quoted
from kvchat.kv.codecs import CODEC_FINGERPRINT
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import available_memory, format_size
from kvchat.model.families import parse_config
from kvchat.model.source import ModelSource, Progress, resolve
from kvchat.model.weights import choose_dtype, load_decoder

NUM_NEEDLES = 20
_NEEDLE_TOKENS = 1000
_NEEDLES_AT_ONCE = 4  # chats: what their pool takes stays small
_MAX_ANSWER = 32
_MIN_TOKENS = 256
_SEED = 1


@dataclass(frozen=True)
class ProbeOptions:
    """What a person chose."""

    model: str
    text: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 16
    sink: int = 64
    window: int = 128
    num_texts: int = 8
    num_tokens: int = 1024  # of a text; at most the model's context


@dataclass(frozen=True)
class ProbeReport:
    """The figures and where they come from."""

    model: str
    dtype: str
    block_size: int
    text: str  # what was scored
    num_texts: int
    num_tokens: int
    scores: list[Score]
    native_needles: tuple[int, int] | None
    gates: list[GateResult]
    remembered: str  # where, or why not


def default_settings(sink: int, window: int) -> list[Setting]:
    """The rows of the table; the first three decide what the ladder may use."""
    return [
        Setting((Codec.INT8,), sink, window),
        Setting((Codec.INT4,), sink, window),
        Setting((Codec.INT8, Codec.INT4), sink, window),
        Setting((Codec.INT8,)),
        Setting((Codec.INT4,)),
    ]


def run_probe(options: ProbeOptions, progress: Progress) -> ProbeReport:
    """Measure one model and remember what it stands. Raises KvchatError for what can be mended."""
    source = resolve(options.model, progress)
    config = parse_config(source)
    tokenizer = load_tokenizer(source, config.vocab_size)
    chat_format = load_chat_format(source, tokenizer, None)
    device = choose_device(options.device, options.dtype).device
    dtype = choose_dtype(options.dtype, source, config, device, available_memory())
    spec = KVSpec(
        config.num_layers, config.num_kv_heads, config.head_dim, options.block_size, dtype
    )
    num_tokens = min(options.num_tokens, config.max_position)
    settings = default_settings(options.sink, options.window)
    _check_memory(spec, settings, options.num_texts * num_tokens, device)
    texts = _read_texts(options, tokenizer, chat_format, num_tokens) if options.text else []
    decoder = load_decoder(
        source, config, dtype, device, lambda done, total: progress("loading", done, total)
    )
    backend = "cpu" if device == "cpu" else "reference"
    probed = Probed(decoder, spec, build_rope(config, config.max_position, device), backend)
    if not texts:
        texts = sample_texts(
            probed,
            _first_id(tokenizer),
            options.num_texts,
            num_tokens,
            _SEED,
            lambda done: progress("writing the text", done, num_tokens),
        )
    with torch.inference_mode():
        scores = score_texts(
            probed, settings, texts, lambda done: progress("scoring", done, num_tokens)
        )
        progress("scoring", 1, 1)
        found = _find_needles(probed, config, chat_format, tokenizer, settings, progress)
    for score, needles in zip(scores, found[1:], strict=False):
        score.needles = needles
    gates = _gates(scores)
    shown = f"{options.text}" if options.text else f"written by the model (seed {_SEED})"
    return ProbeReport(
        source.name,
        dtype,
        options.block_size,
        shown,
        len(texts),
        num_tokens,
        scores,
        found[0] if found else None,
        gates,
        _remember(source, gates),
    )


def _check_memory(spec: KVSpec, settings: list[Setting], num_tokens: int, device: str) -> None:
    """All pools live at the same time."""
    num_blocks = num_tokens // spec.block_size + 1
    layouts = [BlockLayout(spec, setting.lowest) for setting in [Setting(()), *settings]]
    needed = sum(num_blocks * layout.bytes_per_block for layout in layouts)
    available = device_memory(device)
    if needed > available // 2:
        fitting = num_tokens * available // 2 // needed
        raise CapacityError(
            f"the probe's pools need {format_size(needed)} and {format_size(available)} are"
            f" available; lower --texts or --tokens, to {fitting} tokens in all"
        )


def _first_id(tokenizer: Tokenizer) -> int:
    return tokenizer.bos.token_id if tokenizer.bos else tokenizer.encode("\n")[0]


def _read_texts(
    options: ProbeOptions, tokenizer: Tokenizer, chat_format: ChatFormat, num_tokens: int
) -> list[list[int]]:
    """Equal pieces of the file's tokens, evenly spaced. Of a .jsonl file the first chats are taken,
    one a line: {"messages": [{"role": ..., "content": ...}, ...]}."""
    assert options.text is not None
    try:
        raw = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{quoted(str(options.text))} cannot be read: {error}") from None
    if options.text.suffix == ".jsonl":
        ids = []
        for chat in _chats(raw, str(options.text)):
            ids += _prompt(chat_format, tokenizer, chat)
            if len(ids) >= options.num_texts * num_tokens:
                break
    else:
        ids = tokenizer.encode(raw)
    bos = [tokenizer.bos.token_id] if tokenizer.bos else []
    length = num_tokens - len(bos)
    num_texts = min(options.num_texts, len(ids) // length)
    if num_texts == 0:
        if len(ids) < _MIN_TOKENS:
            raise UsageError(
                f"{quoted(str(options.text))} has {len(ids)} tokens; give at least {_MIN_TOKENS}"
            )
        num_texts, length = 1, len(ids)
    gap = (len(ids) - length) // max(1, num_texts - 1)
    return [bos + ids[i * gap : i * gap + length] for i in range(num_texts)]


def _chats(raw: str, name: str) -> Iterator[list[Message]]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["messages"]
            yield [Message(str(m["role"]), str(m["content"])) for m in found]
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'{quoted(name)} line {number} is no chat; expected {{"messages": [{{"role": ...,'
                ' "content": ...}, ...]}'
            ) from None


def _prompt(chat_format: ChatFormat, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    pieces = chat_format.pieces(messages)
    return [i for piece in pieces for i in encode_piece(tokenizer, piece).ids]


def _find_needles(
    probed: Probed,
    config: ModelConfig,
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    settings: list[Setting],
    progress: Progress,
) -> list[tuple[int, int]]:
    """(found, asked) natively and under the settings that decide; empty without a chat format."""
    if chat_format.is_plain:
        return []
    length = min(_NEEDLE_TOKENS, config.max_position - 4 * _MAX_ANSWER)

    def measure(messages: list[Message]) -> int:
        return len(_prompt(chat_format, tokenizer, messages))

    needles = make_needles(NUM_NEEDLES, length, measure)
    prompts = [_prompt(chat_format, tokenizer, needle.messages) for needle in needles]
    longest = max(map(len, prompts)) + _MAX_ANSWER
    if longest > config.max_position:
        return []
    tried = [Setting(()), *settings[:3]]
    found = []
    for number, setting in enumerate(tried):
        num_found = 0
        for start in range(0, len(needles), _NEEDLES_AT_ONCE):
            progress("needles", number * len(needles) + start, len(tried) * len(needles))
            some = slice(start, start + _NEEDLES_AT_ONCE)
            arm = Arm(probed, setting, len(prompts[some]), longest)
            made = replies(arm, prompts[some], _MAX_ANSWER, chat_format.stop_token_ids)
            num_found += sum(
                needle.value in tokenizer.decode(ids)
                for needle, ids in zip(needles[some], made, strict=True)
            )
        found.append((num_found, len(needles)))
    progress("needles", 1, 1)
    return found


def _gates(scores: list[Score]) -> list[GateResult]:
    """For each codec, and for each choice of what is kept native: the worse of the ways there. A
    row in which too little was compressed to tell is left out."""
    ways: dict[tuple[Codec, int, int], list[Score]] = {}
    for score in scores:
        if score.is_telling:
            setting = score.setting
            ways.setdefault((setting.lowest, setting.sink, setting.window), []).append(score)
    return [
        GateResult(codec, _worst_kl(rows), min(row.agreement for row in rows), sink, window)
        for (codec, sink, window), rows in ways.items()
    ]


def _worst_kl(rows: list[Score]) -> float:
    return max((row.kl_mean for row in rows), key=lambda x: math.inf if math.isnan(x) else x)


def _remember(source: ModelSource, gates: list[GateResult]) -> str:
    try:
        return f"remembered in {remember(source.fingerprint + CODEC_FINGERPRINT, gates)}"
    except OSError as error:
        return f"not remembered: {error}"


def _verdicts(report: ProbeReport) -> list[str]:
    """What the rows that decide say of each codec, and what follows."""
    kept = report.scores[0].setting
    found = [decisive(report.gates, c, kept.sink, kept.window) for c in (Codec.INT8, Codec.INT4)]
    lines = [gate.sentence() for gate in found if gate is not None]
    passed = [gate.codec.label for gate in found if gate is not None and gate.passes]
    used = " and ".join(passed) or "no codec"
    return [*lines, f"auto and auto4 use {used} for this model ({report.remembered})."]


def report_lines(report: ProbeReport) -> list[str]:
    """The table and its legend, as markdown."""
    num_scored = report.scores[0].num_scored
    lines = [
        f"{report.model}, {report.dtype}, blocks of {report.block_size}; {num_scored} tokens scored"
        f" (second half of {report.num_texts} x {report.num_tokens}), text: {report.text}",
        "",
        "| KV | sinks | window | compressed | NLL | change | KL mean | KL p99 | same top"
        " | needles |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| native | | | | {report.scores[0].native_nll:.4f} | | | | |"
        f" {_needles(report.native_needles)} |",
    ]
    for score in report.scores:
        setting = score.setting
        mark = "" if score.is_telling else "*"
        lines.append(
            f"| {setting.name} | {setting.sink} | {setting.window}"
            f" | {score.share_compressed:.0%}{mark} | {score.nll:.4f} | {score.delta_nll:+.4f}"
            f" | {score.kl_mean:.5f} | {score.kl_p99:.5f} | {score.agreement:.2%}"
            f" | {_needles(score.needles)} |"
        )
    lines += ["", "compressed: mean share of the context read. NLL, KL: nats a token."]
    if not all(score.is_telling for score in report.scores):
        lines.append(f"*: less than {MIN_SHARE:.0%} compressed, so the row flatters the codec.")
    return lines + _verdicts(report)


def _needles(found: tuple[int, int] | None) -> str:
    return f"{found[0]}/{found[1]}" if found else "-"


def report_json(report: ProbeReport) -> str:
    """Everything, for programs."""
    made = asdict(report)
    for row, score in zip(made["scores"], report.scores, strict=True):
        row["setting"]["name"] = score.setting.name
        row["setting"]["rungs"] = [rung.name.lower() for rung in score.setting.rungs]
        row |= {"delta_nll": score.delta_nll, "is_telling": score.is_telling}
    for row, gate in zip(made["gates"], report.gates, strict=True):
        row |= {"codec": gate.codec.name.lower(), "passes": gate.passes}
    return json.dumps(made, indent=2)
