"""Which of the modes of the KV cache a run gets: what was asked, and what the model stands. No
torch. What is not as it was asked comes with a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from kvchat.config import KV_RUNGS, KVPolicy, KVSpec
from kvchat.errors import UsageError
from kvchat.kv.layout import BlockLayout, Codec

DEFAULT_MODE = "auto"
RESERVED_BLOCKS = 2  # for compression and copy-on-write: one each, at the same time


@dataclass(frozen=True)
class KVMode:
    """What was decided. The warnings are sentences to show."""

    policy: KVPolicy
    warnings: tuple[str, ...] = ()

    @property
    def lowest(self) -> Codec:
        """The codec that a block may come to."""
        return Codec(len(self.policy.span_blocks) - 1)


def choose_kv_mode(
    asked: str | None, window: int, sink: int, spec: KVSpec, allowed: Codec, reason: str = ""
) -> KVMode:
    """`asked` None is the default. `allowed` is the lowest codec that auto and auto4 may use, and
    `reason` says why.

    Raises UsageError when a mode was asked for that this model's head_dim does not allow.
    """
    mode, warnings = asked or DEFAULT_MODE, []
    if mode not in KV_RUNGS:
        raise UsageError(f"--kv-cache {mode}: choose {', '.join(KV_RUNGS)}")
    if mode != "native" and (sentence := _cannot_compress(spec)):
        if asked is not None:
            raise UsageError(sentence)
        warnings.append(f"the KV cache stays native: {sentence}")
        mode = "native"
    if mode == "auto4" and allowed == Codec.INT8:
        warnings.append(f"auto4 stops at INT8: {reason}; --force goes on to INT4")
        mode = "auto"
    if mode in ("auto", "auto4") and allowed < Codec.INT8:
        warnings.append(f"the KV cache stays native: {reason}; --force compresses it")
        mode = "native"
    return KVMode(_policy(mode, window, sink, spec), tuple(warnings))


def _cannot_compress(spec: KVSpec) -> str:
    """Why not, in a sentence; empty when it can."""
    try:
        BlockLayout(spec, Codec.INT4)
    except UsageError as error:
        return str(error)
    return ""


def _policy(mode: str, window: int, sink: int, spec: KVSpec) -> KVPolicy:
    rungs = KV_RUNGS[mode]
    if not rungs:
        return KVPolicy()
    layout = BlockLayout(spec, Codec(rungs[-1][1]))
    return KVPolicy(mode, window, sink, layout.span_blocks, RESERVED_BLOCKS)
