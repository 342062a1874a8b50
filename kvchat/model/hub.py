"""Fetching a model from a hub into huggingface_hub's cache: only the files that kvchat reads.

Endpoint, token, cache folder and offline mode are huggingface_hub's, from its own environment
variables (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). Knows no tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.errors import ModelError, UsageError, quoted

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_INDEX = "model.safetensors.index.json"


def download(repo_id: str, progress: Callable[[str, int, int], None]) -> Path:
    """The local folder with the newest version of `repo_id`, fetched where it is not yet cached.

    Without a connection, or offline, what is in the cache is taken. Raises UsageError without
    huggingface_hub, ModelError when the hub does not have or does not give the model.
    """
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise UsageError(
            f"no folder {quoted(repo_id)} here; to fetch it from a hub: pip install 'kvchat[hub]'"
        ) from None
    # Its HTTP library changed thrice (requests, httpx, httpx2): they are told by their base.
    failures: tuple[type[Exception], ...] = (
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
        OSError,
        RuntimeError,
        ValueError,
    )
    endpoint = constants.ENDPOINT
    # Its retries would be told on stderr past our sanitiser; the last failure is told here.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        try:
            info = HfApi().model_info(repo_id, files_metadata=True, timeout=10)
        except (GatedRepoError, RepositoryNotFoundError):
            raise
        except failures as error:
            return _cached(repo_id, error)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return _fetch(repo_id, _wanted(repo_id, sizes), progress)
    except GatedRepoError:
        raise ModelError(
            f"{repo_id} is gated: accept its terms at {endpoint}/{repo_id}, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{endpoint} has no model {quoted(repo_id)}; if it is private, `hf auth login` first"
        ) from None
    except failures as error:
        raise ModelError(
            f"fetching {quoted(repo_id)} failed ({_first_line(error)}); try again, it goes on "
            "from what is there"
        ) from None


def cached_folder(repo_id: str) -> Path | None:
    """The folder a former run left in the cache, None when there is none. No network."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(repo_id, "config.json")
    except HFValidationError:  # no hub id at all
        return None
    return Path(found).parent if isinstance(found, str) else None


def _cached(repo_id: str, error: Exception) -> Path:
    from huggingface_hub import constants

    folder = cached_folder(repo_id)
    if folder is not None:
        return folder
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{quoted(repo_id)} is not in the cache and HF_HUB_OFFLINE is set; unset it to download"
        )
    raise ModelError(
        f"{quoted(repo_id)} is not in the cache and {constants.ENDPOINT} cannot be reached "
        f"({_first_line(error)})"
    )


def _wanted(repo_id: str, sizes: dict[str, int]) -> dict[str, int]:
    """Of a repository's files those to fetch; weights twice over (other formats) are left out."""
    weights = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    elif _INDEX in sizes:
        weights = [_INDEX, *(name for name in weights if name.startswith("model-"))]
    if not weights:
        others = [name for name in sizes if name.endswith((".bin", ".pth", ".pt", ".gguf"))]
        has = f"; it has {quoted(others[0], 60)}, which kvchat does not read" if others else ""
        raise ModelError(f"{quoted(repo_id)} has no safetensors weights{has}")
    texts = [name for name in _TEXT_FILES if name in sizes]
    return {name: sizes[name] for name in texts + weights}


def _fetch(repo_id: str, sizes: dict[str, int], progress: Callable[[str, int, int], None]) -> Path:
    from huggingface_hub import hf_hub_download

    total, done, folder = sum(sizes.values()), 0, Path()
    for name, size in sizes.items():
        start, what = done, f"downloading {name}"

        def report(num_bytes: int, what: str = what, start: int = start, size: int = size) -> None:
            progress(what, start + min(num_bytes, size), total)

        folder = Path(hf_hub_download(repo_id, name, tqdm_class=_meter(report))).parent
        done += size
        progress(what, done, total)
    return folder


def _meter(report: Callable[[int], None]) -> type[tqdm]:
    """A progress bar class that draws nothing and reports the bytes of one file so far."""
    from huggingface_hub import utils

    class Meter(utils.tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.num_bytes = int(self.n)

        def update(self, n: float | None = 1) -> None:
            self.num_bytes += int(n or 0)
            report(self.num_bytes)

    return Meter


def _first_line(error: Exception) -> str:
    return quoted((str(error) or type(error).__name__).splitlines()[0], 120)
