"""Text to token ids as the shipped tokenizer does it: one piece table, role markers, loss weights
per token."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece as spm

from .facts import VALUE
from .talk import Turn

VOCAB_SIZE = 4096
BOS, END, SYSTEM, USER, ASSISTANT = "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
ROLE_MARKERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

# Loss weights, stored as bytes in sixteenths.
WEIGHT_UNIT = 16
NO_LOSS, USER_LOSS, ASSISTANT_LOSS, VALUE_LOSS = 0, 4, 16, 64

_MAX_CACHED_WORDS = 100_000


def train_tokenizer(texts: Iterable[str], path: Path) -> None:
    """Byte pairs over `texts`. No dummy prefix: a message encodes the same wherever it stands."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=False,
        user_defined_symbols=["\n"],
        control_symbols=[SYSTEM, USER, ASSISTANT],
        bos_piece=BOS,
        eos_piece=END,
        pad_id=-1,
        num_threads=2,
        max_sentence_length=20_000,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Encoder:
    """Encodes by word, with a cache: pieces never cross a space, so the ids are those of the whole
    text."""

    def __init__(self, model: Path) -> None:
        self.processor = spm.SentencePieceProcessor(model_file=str(model))
        self.bos, self.end = self.processor.bos_id(), self.processor.eos_id()
        self.markers = {
            role: self.processor.piece_to_id(marker) for role, marker in ROLE_MARKERS.items()
        }
        self._words: dict[str, list[int]] = {}

    def word(self, word: str) -> list[int]:
        ids = self._words.get(word)
        if ids is None:
            if len(self._words) > _MAX_CACHED_WORDS:
                self._words.clear()
            ids = self._words[word] = self.processor.encode(word)
        return ids

    def text(self, text: str) -> list[int]:
        first, *rest = text.split(" ")
        ids = list(self.word(first)) if first else []
        for word in rest:
            ids += self.word(" " + word)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class Row:
    """Token ids and loss weights of one sequence under construction."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.ids: list[int] = []
        self.weights = bytearray()
        self.value_end = 0  # where the last marked value ended

    def __len__(self) -> int:
        return len(self.ids)

    def begin(self) -> None:
        self._add([self.encoder.bos], NO_LOSS)

    def add(self, turn: Turn) -> None:
        """Role marker, content, end. The end is learned for the assistant alone."""
        is_assistant = turn.role == "assistant"
        plain = ASSISTANT_LOSS if is_assistant else USER_LOSS if turn.role == "user" else NO_LOSS
        value = (VALUE_LOSS if turn.is_answer else ASSISTANT_LOSS) if is_assistant else NO_LOSS
        self._add([self.encoder.markers[turn.role]], NO_LOSS)
        space = ""
        for word in turn.text.split(" "):
            if VALUE in word:
                self._add(self.encoder.processor.encode(space + word.replace(VALUE, "")), value)
                self.value_end = len(self.ids)
            else:
                self._add(self.encoder.word(space + word), plain)
            space = " "
        self._add([self.encoder.end], plain)

    def ask_for_reply(self) -> None:
        """The marker after which the assistant speaks."""
        self._add([self.encoder.markers["assistant"]], NO_LOSS)

    def add_encoded(self, ids: np.ndarray, weights: np.ndarray | None) -> None:
        """Turns encoded before; without weights they are context that is not learned."""
        self.ids += ids.tolist()
        self.weights += weights.tobytes() if weights is not None else bytes(len(ids))

    def arrays(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut to `length`, or filled with turn ends that carry no loss."""
        ids = np.full(length, self.encoder.end, np.uint16)
        weights = np.zeros(length, np.uint8)
        count = min(length, len(self.ids))
        ids[:count] = self.ids[:count]
        weights[:count] = np.frombuffer(self.weights, np.uint8, count)
        return ids, weights

    def _add(self, ids: list[int], weight: int) -> None:
        self.ids += ids
        self.weights += bytes((weight,)) * len(ids)
