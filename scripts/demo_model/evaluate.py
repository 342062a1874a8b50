"""Every figure of the model card from an exported folder: perplexity, recall, turn discipline."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .corpus import Encoded, held_out_dialogues
from .discipline import DEFAULT_SAMPLING, discipline_figures, user_turns
from .export import load_exported
from .llama import Llama
from .perplexity import counted_text, domains, perplexities
from .recall import answer_items, is_right, make_items, recall_figures
from .tokens import Encoder

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Material:
    """What is measured, and on what. The dialogues are the encoded ones, made by `tokenizer`."""

    model: Path
    data: Path
    dialogues: Path
    held_out: Path
    seed: int
    num_items: int
    num_workers: int


def evaluate(material: Material) -> dict[str, Figures]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_exported(material.model, device, dtype)
    encoder = Encoder(material.model / "tokenizer.model")
    items = make_items(
        material.model / "tokenizer.model",
        material.held_out,
        material.num_items,
        material.num_workers,
    )
    users = user_turns(list(held_out_dialogues(material.data)), material.seed)
    figures: dict[str, Figures] = {
        "recall": recall_figures(model, encoder, items),
        "discipline": {"sampled": discipline_figures(model, encoder, users, DEFAULT_SAMPLING)},
        "perplexity": _perplexities(material, model, encoder),
    }
    show(figures)
    return figures


def _perplexities(material: Material, model: Llama, encoder: Encoder) -> Figures:
    texts = domains(material.data, encoder, Encoded.load(material.held_out), material.seed + 900)
    counted = counted_text(encoder, Encoded.load(material.dialogues), material.seed + 901)
    return perplexities(model, texts, counted)


def show(figures: dict[str, Figures]) -> None:
    """Markdown tables, as they stand in the card."""
    for title, rows in figures.items():
        columns = list(next(iter(rows.values())))
        print(f"\n| {title} | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for name, row in rows.items():
            print(
                f"| {name} | " + " | ".join(_number(row[column]) for column in columns) + " |",
                flush=True,
            )


def _number(value: float) -> str:
    if isinstance(value, int) or (value > 1 and value == int(value)):
        return str(int(value))
    return f"{value:.2f}" if value > 1.5 else f"{value:.4f}"


def wrong_answers(material: Material, limit: int) -> None:
    """Prints some recall items that went wrong, to see what kind they are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_exported(
        material.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    encoder = Encoder(material.model / "tokenizer.model")
    items = make_items(
        material.model / "tokenizer.model", material.held_out, 100, material.num_workers
    )
    wrong = [
        f"{item.distance} {item.kind} unseen={item.is_unseen} {item.value!r} <- {reply!r} "
        f"({_question(encoder, item.prompt)})"
        for made in items.values()
        for item, reply in answer_items(model, encoder, made)
        if not is_right(item.value, reply)
    ]
    print("\n".join(wrong[:limit]))


def _question(encoder: Encoder, prompt: list[int]) -> str:
    return encoder.decode(prompt[-40:]).replace("\n", " ")[-90:]
