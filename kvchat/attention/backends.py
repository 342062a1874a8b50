"""Backends by name; what a backend needs is imported when it is asked for."""

from __future__ import annotations

from kvchat.attention import AttentionBackend
from kvchat.attention.rope import RopeTable
from kvchat.config import ModelConfig
from kvchat.errors import UsageError
from kvchat.kv.cache import KVCache

BACKENDS = ("cpu", "reference")


def make_backend(
    name: str, config: ModelConfig, cache: KVCache, rope: RopeTable
) -> AttentionBackend:
    """The backend called `name`, over this pool. Its warm_up is the caller's to call."""
    if name == "reference":
        from kvchat.attention.reference import ReferenceBackend

        return ReferenceBackend(config, cache, rope)
    if name == "cpu":
        from kvchat.attention.cpu import CpuBackend

        return CpuBackend(config, cache, rope)
    raise UsageError(f"no attention backend called {name!r}; there are {', '.join(BACKENDS)}")
