"""Which codecs a model was measured to stand: the results of `kvchat probe`, by the fingerprint of
model and codecs.

They lie in the user's cache folder, one small JSON file per model. A file that is missing or makes
no sense means that the model was not probed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from kvchat import paths
from kvchat.kv.layout import Codec

MAX_KL_MEAN = 0.03
MIN_AGREEMENT = 0.95
_VERSION = 2  # of this file


@dataclass(frozen=True)
class GateResult:
    """What a codec cost this model: mean KL divergence from native in nats, and how often the most
    likely token stayed the same (0 to 1); the first `sink` and the last `window` tokens native."""

    codec: Codec
    kl_mean: float
    agreement: float
    sink: int = 0
    window: int = 0

    @property
    def passes(self) -> bool:
        """Good enough for the ladder to go down to this codec."""
        return self.kl_mean <= MAX_KL_MEAN and self.agreement >= MIN_AGREEMENT

    def sentence(self) -> str:
        """The result in words, limits included."""
        verdict = "passes" if self.passes else "fails"
        return (
            f"{self.codec.name} {verdict} the probe: KL {self.kl_mean:.4f} (at most {MAX_KL_MEAN}),"
            f" agreement {self.agreement:.1%} (at least {MIN_AGREEMENT:.0%})"
        )


def gate_path(fingerprint: bytes) -> Path:
    """Where a model's results are kept."""
    name = hashlib.sha256(fingerprint).hexdigest()[:32]
    return paths.cache_dir() / "probes" / f"{name}.json"


def remember(fingerprint: bytes, results: Iterable[GateResult]) -> Path:
    """Write the results down. Raises OSError where the cache folder cannot be written."""
    path = gate_path(fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"version": _VERSION, "results": [asdict(result) for result in results]}
    waiting = path.with_suffix(".tmp")
    waiting.write_text(json.dumps(made))
    waiting.replace(path)
    return path


def recall(fingerprint: bytes) -> list[GateResult]:
    """What was measured; empty for a model that was not probed."""
    try:
        found = json.loads(gate_path(fingerprint).read_text())
        if found["version"] != _VERSION:
            return []
        return [
            GateResult(
                Codec(r["codec"]),
                float(r["kl_mean"]),
                float(r["agreement"]),
                int(r["sink"]),
                int(r["window"]),
            )
            for r in found["results"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def decisive(
    results: Iterable[GateResult], codec: Codec, sink: int, window: int
) -> GateResult | None:
    """What says whether `codec` is good enough with these tokens kept native: of the results with
    no more of them kept the nearest. None: not measured."""
    telling = [r for r in results if r.codec == codec and r.sink <= sink and r.window <= window]
    return max(telling, key=lambda r: r.sink + r.window, default=None)
