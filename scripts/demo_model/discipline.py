"""Turn discipline: sampled conversations, and whether each reply ends by itself, in time, without
role markers."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch

from .corpus import Dialogue
from .decoding import Sampling, Talkers
from .facts import VALUE, ask, draw_fact, state
from .llama import Llama
from .phrases_file import pick
from .talk import filler
from .tokens import Encoder

NUM_CONVERSATIONS, NUM_TURNS, MAX_REPLY = 200, 8, 400
DEFAULT_SAMPLING = Sampling(temperature=0.6, top_p=0.9)


@dataclass(frozen=True)
class Reply:
    said: str
    text: str
    num_tokens: int
    ended: bool
    has_marker: bool


def user_turns(held_out: list[Dialogue], seed: int) -> list[list[str]]:
    """What the users say: half from held-out persona chats, half requests, facts with unseen names,
    and questions."""
    rng = Random(seed)
    chats = [
        [t.text for t in d.turns if t.role == "user"] for d in held_out if d.source == "persona"
    ]
    chats = [chat for chat in chats if len(chat) >= NUM_TURNS]
    real = [chat[:NUM_TURNS] for chat in rng.sample(chats, NUM_CONVERSATIONS // 2)]
    return real + [_made_up(rng) for _ in range(NUM_CONVERSATIONS - len(real))]


def _made_up(rng: Random) -> list[str]:
    fact = draw_fact(rng, held_out=True)
    lines = [pick(["Hello!", "Hi", "Good morning."], rng), state(fact, rng).replace(VALUE, "")]
    lines += [filler(rng)[0].text for _ in range(NUM_TURNS - 3)]
    return [*lines, ask(fact, rng)]


def converse(
    model: Llama, encoder: Encoder, users: list[list[str]], sampling: Sampling
) -> Iterator[list[Reply]]:
    """One list of replies per round, in the order of `users`; all conversations have as many
    turns."""
    length = min(model.config.max_position_embeddings, 8 + len(users[0]) * (MAX_REPLY + 100))
    talkers = Talkers(model, len(users), length, encoder.end)
    forbidden = {encoder.bos, *encoder.markers.values(), encoder.processor.unk_id()}
    for turn in range(len(users[0])):
        prompts = [_prompt(encoder, user[turn], is_first=turn == 0) for user in users]
        ids = talkers.reply(
            talkers.read(prompts),
            MAX_REPLY + 1,
            Sampling(sampling.temperature, sampling.top_p, sampling.seed + turn),
        )
        yield [
            _reply(encoder, user[turn], row, forbidden)
            for user, row in zip(users, ids, strict=True)
        ]


def _prompt(encoder: Encoder, said: str, is_first: bool) -> list[int]:
    ids = [
        encoder.markers["user"],
        *encoder.text(" ".join(said.split())),
        encoder.end,
        encoder.markers["assistant"],
    ]
    return [encoder.bos, *ids] if is_first else ids


def _reply(encoder: Encoder, said: str, ids: list[int], forbidden: set[int]) -> Reply:
    text = encoder.decode(ids)
    ended = ids[-1] == encoder.end
    return Reply(said, text, len(ids) - ended, ended, bool(forbidden & set(ids)) or "<|" in text)


def discipline_figures(
    model: Llama, encoder: Encoder, users: list[list[str]], sampling: Sampling
) -> dict[str, float]:
    torch.manual_seed(sampling.seed)
    replies = [reply for replies in converse(model, encoder, users, sampling) for reply in replies]
    return {
        "replies": len(replies),
        "ended": sum(reply.ended for reply in replies) / len(replies),
        "over_400": sum(reply.num_tokens > MAX_REPLY for reply in replies),
        "longest": max(reply.num_tokens for reply in replies),
        "mean_tokens": sum(reply.num_tokens for reply in replies) / len(replies),
        "with_markers": sum(reply.has_marker for reply in replies),
    }
