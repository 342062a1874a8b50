"""`--plot`: results as pictures. Every picture has a white background of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.errors import UsageError, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvchat.bench.capacity import Capacity
    from kvchat.bench.sessions import BenchResult, ModeResult

_COLORS = ("#6b6b6b", "#17a2a2", "#1f5fbf", "#39a845", "#e6862f")
_GIB = 2**30


def check_plot(path: Path) -> None:
    """Before anything is measured: UsageError when the picture could not be drawn."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {quoted(str(path))}: name a .png or .svg file")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {quoted(str(path))}: there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'kvchat[plot]'"
        )


def save(figure: Figure, path: Path) -> None:
    """Write the picture; the same results give the same bytes. Raises UsageError."""
    from matplotlib import rc_context

    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvchat"}):
            figure.savefig(path, dpi=110, metadata=metadata)
    except OSError as error:
        raise UsageError(f"--plot {quoted(str(path))}: {error.strerror}") from None


def draw(result: BenchResult, path: Path) -> None:
    """Two panels: blocks held over time, and speeds by mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_held(left, result)
    _draw_speeds(right, result.modes)
    model = result.model
    figure.suptitle(f"{len(result.scripts)} sessions, {model.name}, {model.spec.dtype}")
    save(figure, path)


def draw_capacity(capacities: Sequence[Capacity], path: Path) -> None:
    """Bytes held against turns served, a line for each mode, up to where somebody had to give way;
    `capacities` are of one length of chat, native first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(capacities, key=lambda c: c.num_turns)
    native = capacities[0].held[-1]
    _draw_demand(axes, longest, native.num_bytes / native.num_tokens)
    colors = zip(capacities, (_COLORS[0], *_COLORS[2:]), strict=False)
    for found, color in reversed([*colors]):  # they meet; the shortest is to be on top
        _draw_mode(axes, found, len(found.held) / len(capacities[0].held), color)
    pool_gib = longest.pool_bytes / _GIB
    axes.axhline(pool_gib, color="#b34d12", linewidth=1, linestyle="--")
    _note(axes, "the pool", (longest.num_turns, pool_gib), (0, 4), "right", "#b34d12")
    title = f"Eight chats take turns in {pool_gib:.0f} GiB of KV (llama3-8b, bfloat16)"
    axes.set(xlabel="turns served before anybody gives way", ylabel="GiB held", title=title)
    axes.set(xlim=(0, longest.num_turns * 1.05), ylim=0)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _draw_demand(axes: Axes, longest: Capacity, bytes_a_token: float) -> None:
    """What the chats would take if all of it were native."""
    gib = [held.num_tokens * bytes_a_token / _GIB for held in longest.held]
    axes.plot(range(1, len(gib) + 1), gib, color="#a9a9a9", linewidth=1.3, linestyle=":")
    middle = len(gib) * 2 // 3
    text = "the same tokens, all native"
    _note(axes, text, (middle, gib[middle]), (-8, 0), "right", "#6b6b6b")


def _draw_mode(axes: Axes, found: Capacity, ratio: float, color: str) -> None:
    gib = [held.num_bytes / _GIB for held in found.held]
    axes.plot(range(1, len(gib) + 1), gib, color=color, linewidth=2)
    axes.plot(len(gib), gib[-1], "o", color=color)
    text = f"{found.mode}\n{len(gib)} turns\n{ratio:.2f}x"
    _note(axes, text, (len(gib), gib[-1]), (0, -12), "center", color)


def _note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], align: str, color: str
) -> None:
    """Words at a place, shifted by points; below it when shifted down."""
    vertical = "top" if offset[1] < 0 else "bottom"
    axes.annotate(
        text, at, offset, textcoords="offset points", ha=align, va=vertical, color=color, fontsize=9
    )


def _draw_held(axes: Axes, result: BenchResult) -> None:
    for mode, color in zip(result.modes, _COLORS, strict=False):
        seconds, blocks = zip(*mode.held, strict=True)
        axes.plot(seconds, blocks, label=mode.mode, color=color)
    limit = result.modes[0].setup.config.num_blocks - 1
    axes.axhline(limit, color="#b34d12", linewidth=1, linestyle="--", label="the pool")
    axes.axhline(
        result.num_needed, color="#b34d12", linewidth=1, linestyle=":", label="native needs"
    )
    axes.set(xlabel="seconds", ylabel="blocks held", ylim=(0, None), title="Memory")
    axes.legend(fontsize=8)


def _draw_speeds(axes: Axes, modes: list[ModeResult]) -> None:
    for i, (mode, color) in enumerate(zip(modes, _COLORS, strict=False)):
        assert mode.speed is not None, f"{mode.mode} was not measured"
        for x, value in enumerate((mode.speed.tokens_a_second, mode.speed.session_median)):
            bar = axes.bar(x + i / (len(modes) + 1), value, 1 / (len(modes) + 1.5), color=color)
            axes.bar_label(bar, fmt="%.0f", fontsize=8)
    ticks = [x + (len(modes) - 1) / 2 / (len(modes) + 1) for x in range(2)]
    axes.set_xticks(ticks, ["over all", "a session"])
    axes.set(ylabel="tok/s", title="Generated tokens a second")
