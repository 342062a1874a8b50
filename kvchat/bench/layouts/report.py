"""What `kvchat bench layouts` prints and draws."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvchat.bench.layouts import WORD_BYTES
from kvchat.bench.layouts.compare import Comparison, LayoutOptions, Progress, compare_layouts
from kvchat.bench.layouts.replay import Replay
from kvchat.bench.plot import check_plot, save
from kvchat.bench.trace import Mix
from kvchat.kv.planner import available_memory, format_size, parse_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FOOTER = """\
admitted: the first prompt could be placed. cut: ended because it, or a chat that came before it,
could not grow. with room: refused or cut although as many bytes were free in total. waste: token
slots held that hold nothing, over time. moved: bytes copied to grow (paged, int8 and int4: read to
compress), for each token placed. live, peak: tokens of chats, on average and at most, over what the
bytes hold natively. attended: slots that attention goes over for each token that it is after."""

# One family one colour; what is ours is blue.
_COLORS = ("#e6862f", "#b34d12", "#a9a9a9", "#6b6b6b", "#8d5fb0", "#1f5fbf", "#17a2a2", "#39a845")
_FATES = (("finished", "#39a845"), ("cut short", "#e6862f"), ("refused", "#c8c8c8"))


def answer(flags: dict[str, Any], progress: Progress) -> str:
    """What the command's flags ask for, drawn and as text. Raises KvchatError."""
    output, plot, kv_mem = flags.pop("output"), flags.pop("plot"), flags.pop("kv_mem")
    if plot is not None:
        check_plot(plot)
    mix = Mix(num_chats=flags.pop("chats"), chats_a_second=flags.pop("rate"))
    num_bytes = parse_size(kv_mem, available_memory())
    flags["block_size"] = int(flags["block_size"])
    comparison = compare_layouts(LayoutOptions(num_bytes=num_bytes, mix=mix, **flags), progress)
    if plot is not None:
        draw(comparison, plot)
    formats = {"md": format_markdown, "json": format_json, "csv": format_csv}
    return formats[output](comparison)


def format_markdown(comparison: Comparison) -> str:
    """Set-up, one table, and what its columns mean."""
    lines = [
        _setup(comparison),
        "",
        "| layout | admitted | refused | cut | with room | finished | tokens | waste | moved | live"
        " | peak | attended |",
        "|---|" + "---:|" * 11,
    ]
    for found in comparison.replays:
        cells = (
            found.name,
            found.num_admitted,
            found.num_refused,
            found.num_cut,
            found.num_refused_with_room + found.num_cut_with_room,
            found.num_finished,
            f"{found.num_tokens:,}",
            f"{found.waste:.1%}",
            format_size(_moved_a_token(comparison, found)),
            f"{found.mean_live / comparison.num_words:.0%}",
            f"{found.peak_live / comparison.num_words:.0%}",
            f"{found.scanned:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    num_verified = sum(found.num_verified for found in comparison.replays)
    checked = f"All {num_verified:,} tokens stored were read back as their chats left, unharmed."
    return "\n".join([*lines, "", checked, _FOOTER])


def format_csv(comparison: Comparison) -> str:
    """One row a layout; bytes are those of the shape."""
    out = io.StringIO()
    rows = [_fields(comparison, found) for found in comparison.replays]
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def format_json(comparison: Comparison) -> str:
    """The same rows with the samples over time, and the set-up."""
    options = asdict(comparison.options)
    paths = {name: str(options[name]) for name in ("trace", "record") if options[name]}
    rows = [
        _fields(comparison, found) | {"samples": [asdict(sample) for sample in found.samples]}
        for found in comparison.replays
    ]
    setup = {**options, **paths, "bytes_a_token": comparison.spec.bytes_per_token}
    setup |= {"num_chats": len(comparison.chats), "seconds": comparison.seconds}
    return json.dumps({"setup": setup, "layouts": rows}, indent=2)


def draw(comparison: Comparison, path: Path) -> None:
    """Two pictures in one file: tokens over time, and what became of the chats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    over_time, fates = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_tokens(over_time, comparison)
    _draw_fates(fates, comparison)
    figure.suptitle(_setup(comparison), fontsize=9, color="#555555")
    save(figure, path)


def _setup(comparison: Comparison) -> str:
    options = comparison.options
    source = f"seed {options.seed}" if options.trace is None else options.trace.name
    return (
        f"{len(comparison.chats)} chats in {comparison.seconds:.0f} s ({source}),"
        f" {format_size(options.num_bytes)} of KV: {comparison.num_words:,} tokens of"
        f" {options.shape}, {comparison.spec.dtype}; a chat has at most {options.max_tokens:,}"
    )


def _moved_a_token(comparison: Comparison, found: Replay) -> float:
    """Bytes of the shape."""
    words = found.num_copied / WORD_BYTES
    return words * comparison.spec.bytes_per_token / max(1, found.num_tokens)


def _fields(comparison: Comparison, found: Replay) -> dict[str, object]:
    counts = (
        *("num_admitted", "num_refused", "num_refused_with_room", "num_cut"),
        *("num_cut_with_room", "num_finished", "num_tokens", "num_verified"),
    )
    return {
        "layout": found.name,
        **{name: getattr(found, name) for name in counts},
        "waste": found.waste,
        "bytes_moved": found.num_copied // WORD_BYTES * comparison.spec.bytes_per_token,
        "mean_live_tokens": found.mean_live,
        "peak_live_tokens": found.peak_live,
        "num_words": comparison.num_words,
        "attended": found.scanned,
    }


def _draw_tokens(axes: Axes, comparison: Comparison) -> None:
    def curve(found: Replay) -> tuple[list[float], list[float]]:
        samples = found.samples
        return [s.at_s for s in samples], [s.num_live / 1000 for s in samples]

    wanted = curve(comparison.demand)
    axes.fill_between(*wanted, color="#f0f0f0", label="wanted, were there no limit")
    for found, color in zip(comparison.replays, _COLORS, strict=True):
        width = 2.2 if found.name.startswith("paged") else 1.3
        axes.plot(*curve(found), color=color, linewidth=width, label=found.name)
    axes.axhline(comparison.num_words / 1000, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(
        "what the bytes hold natively",
        (0, comparison.num_words / 1000),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
    )
    axes.set(xlabel="seconds", ylabel="tokens of chats in memory, thousands", ylim=0)
    axes.margins(x=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_fates(axes: Axes, comparison: Comparison) -> None:
    names = [found.name for found in comparison.replays][::-1]
    left = [0] * len(names)
    for (fate, color), field in zip(
        _FATES, ("num_finished", "num_cut", "num_refused"), strict=True
    ):
        counts = [getattr(found, field) for found in comparison.replays][::-1]
        bars = axes.barh(names, counts, left=left, color=color, label=fate)
        axes.bar_label(bars, [str(n) if n > 4 else "" for n in counts], label_type="center")
        left = [a + b for a, b in zip(left, counts, strict=True)]
    for row, found in enumerate(comparison.replays[::-1]):
        axes.text(len(comparison.chats) * 1.01, row, f"waste {found.waste:.1%}", va="center")
    axes.set(xlabel="chats (others were still going on)", xlim=(0, len(comparison.chats)))
    axes.legend(fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
