"""The export beside transformers: same ids from the tokenizer, same logits from the weights. Needs
transformers, and protobuf for its tokenizer."""

from pathlib import Path

import torch

from .export import CHAT_TEMPLATE, load_exported
from .llama import rotary_tables
from .tokens import Encoder

_TEXT = "My sister's name is Velmora. The door code is 4172.\nWhat is my sister's name?"


def largest_difference(folder: Path, length: int) -> float:
    """Largest difference of a logit between the plain model and transformers', in float32 on random
    ids."""
    from transformers import LlamaForCausalLM

    ours = load_exported(folder, torch.device("cpu"), torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(
        6, ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        return float(
            (ours(ids, rotary_tables(ours.config, length, ids.device)) - theirs(ids).logits)
            .abs()
            .max()
        )


def has_same_ids(folder: Path) -> bool:
    """Whether transformers' tokenizer gives our ids for a rendered chat."""
    from transformers import AutoTokenizer

    encoder = Encoder(folder / "tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": _TEXT}], add_generation_prompt=True
    )
    theirs = list(theirs["input_ids"] if hasattr(theirs, "keys") else theirs)
    return theirs == [
        encoder.bos,
        encoder.markers["user"],
        *encoder.text(_TEXT),
        encoder.end,
        encoder.markers["assistant"],
    ]
