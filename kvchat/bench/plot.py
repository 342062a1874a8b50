"""`--plot`: what the pools held over one repetition, and the speeds, as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.bench.sessions import BenchResult, ModeResult
from kvchat.errors import UsageError, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#6b6b6b", "#17a2a2", "#1f5fbf", "#39a845", "#e6862f")


def check_plot(path: Path) -> None:
    """Before anything is measured: UsageError when the picture could not be drawn."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {quoted(str(path))}: name a .png or .svg file")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'kvchat[plot]'")


def draw(result: BenchResult, path: Path) -> None:
    """Two panels: blocks held over time, and speeds by mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_held(left, result)
    _draw_speeds(right, result.modes)
    model = result.model
    figure.suptitle(f"{len(result.scripts)} sessions, {model.name}, {model.spec.dtype}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"--plot {quoted(str(path))} cannot be written: {error}") from None


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
