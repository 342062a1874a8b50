"""Opens a model for chatting: source -> tokenizer and template -> engine -> library of sessions."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvchat.chat.library import ChatDefaults, Library
from kvchat.chat.template import load_chat_format
from kvchat.chat.tokenizer import load_tokenizer
from kvchat.config import SamplingParams
from kvchat.engine.build import EngineFacts, EngineOptions, Progress, build_engine
from kvchat.engine.engine import Engine
from kvchat.model.families import parse_config
from kvchat.model.source import resolve

# No repeat that DRY penalises reaches over one of these; the list is llama.cpp's.
_DRY_BREAKERS = ("\n", ":", '"', "*")


@dataclass(frozen=True)
class RunOptions:
    """What the command line chose; `sampling` holds only what was set, by SamplingParams name."""

    model: str
    engine: EngineOptions = field(default_factory=EngineOptions)
    chat_format: str | None = None
    sampling: dict[str, object] = field(default_factory=dict)
    system: str | None = None
    seed: int | None = None
    think: bool | None = None


@dataclass(frozen=True)
class Runtime:
    """Everything a front end needs. `close` ends the worker; nothing is kept on disk."""

    library: Library
    engine: Engine
    facts: EngineFacts
    model_name: str
    chat_format: str
    warnings: tuple[str, ...]

    def close(self) -> None:
        """Stop the engine's worker thread; running replies end where they are."""
        self.engine.close()


def open_runtime(options: RunOptions, progress: Progress) -> Runtime:
    """Load the model that `options` names and start its engine.

    Raises KvchatError for anything a person can mend.
    """
    source = resolve(options.model, progress)
    config = parse_config(source)
    tokenizer = load_tokenizer(source, config.vocab_size)
    chat_format = load_chat_format(source, tokenizer, options.chat_format)
    if options.think is not None:
        chat_format.require_think_switch()
    routed: list[Library] = []
    # The last id alone: some tokenizers put a space first, and some drop a line break altogether.
    breakers = frozenset(i for text in _DRY_BREAKERS for i in tokenizer.encode(text)[-1:])
    engine, facts = build_engine(
        source,
        config,
        options.engine,
        progress,
        lambda events: routed[0].on_events(events),
        breakers,
    )
    defaults = ChatDefaults(
        sampling=SamplingParams(**{**chat_format.sampling_defaults, **options.sampling}),  # type: ignore[arg-type]
        system=options.system,
        seed=options.seed,
        max_model_len=facts.scheduler.max_request_tokens,
        think=options.think,
    )
    routed.append(Library(engine, tokenizer, chat_format, defaults))
    engine.start()
    return Runtime(
        routed[0],
        engine,
        facts,
        source.name,
        chat_format.name,
        (*tokenizer.warnings, *facts.warnings),
    )
