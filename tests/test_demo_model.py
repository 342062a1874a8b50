"""What the shipped model learns from, and the shipped folder itself. No training here."""

import json
import re
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "sprout"
sys.path.insert(0, str(ROOT / "scripts"))

from demo_model import (  # noqa: E402
    asides,
    corpus,
    facts,
    generator,
    recall,
    short_chats,
    talk,
    tokens,
    values,
)
from demo_model.export import CHAT_TEMPLATE  # noqa: E402
from demo_model.phrases_file import expand, parse  # noqa: E402

NUM_DRAWS = 300


@pytest.fixture(scope="module")
def encoder():
    return tokens.Encoder(MODEL / "tokenizer.model")


@pytest.fixture(scope="module")
def real(encoder):
    """A few made-up dialogues in the form of the published ones."""
    talkers = ("user", "assistant") * 4
    turns = tuple(talk.Turn(role, f"Line number {i}.") for i, role in enumerate(talkers))
    system = talk.Turn("system", "Play this person: I like tea.")
    dialogues = [
        corpus.Dialogue("persona", (system, *turns)),
        corpus.Dialogue("booking", (system, *turns)),
        corpus.Dialogue("pair", turns[:2]),
        corpus.Dialogue("program", turns[:2], frozenset({0})),
    ]
    return corpus.encode_dialogues(iter(dialogues), encoder)


def make_row(encoder, real, seed, length=2000):
    row = tokens.Row(encoder)
    generator.Generator(encoder, real, generator.Mix(), seed).conversation(row, length)
    return row


def test_equal_seeds_write_equal_rows(encoder, real):
    first, again, other = (make_row(encoder, real, seed) for seed in (5, 5, 6))

    assert first.ids == again.ids and first.weights == again.weights
    assert first.ids != other.ids


def test_training_draws_no_held_out_value():
    rng = Random(0)

    for kind in sorted(values.OPEN_KINDS):
        drawn = [values.draw_value(kind, rng) for _ in range(NUM_DRAWS)]
        assert not any(map(values.is_held_out, drawn)), kind
        assert values.is_held_out(values.draw_value(kind, rng, held_out=True)), kind


def test_unseen_phrasings_are_not_among_the_seen_ones():
    for family in facts.families():
        assert bool(family.held_statements) == bool(family.held_questions)
        assert not set(family.held_statements) & {*family.statements, *family.common_statements}
        assert not set(family.held_questions) & {*family.questions, *family.common_questions}


def test_training_text_never_has_a_held_out_phrasing():
    rng = Random(7)

    for family in facts.families():
        for _ in range(4):
            fact = facts.draw_fact(rng, family)
            for held, write in (
                (family.held_statements, facts.state),
                (family.held_questions, facts.ask),
            ):
                cores = [facts._unseen((template,), fact, rng) for template in held]
                # whole, at the start of a sentence or after a lead-in
                ends = [re.escape(core.rstrip(".?")) + r"(?![\w'])" for core in cores]
                parts = [f"(?:^|[.!?:] ){end}" for end in ends]
                for _ in range(NUM_DRAWS if held else 0):
                    text = write(fact, rng)
                    assert not re.search("|".join(parts), text, re.IGNORECASE), text


def test_short_chats_answer_what_was_told_last():
    rng = Random(8)

    for _ in range(NUM_DRAWS):
        chat = short_chats.remembered(rng)
        assert [turn.role for turn in chat.turns] == ["user", "assistant"] * (len(chat.turns) // 2)
        answers = [turn.text for turn in chat.turns if turn.is_answer]
        for fact in chat.facts:
            assert any(facts.mark(fact.value) in text for text in answers), chat


def test_long_conversations_start_without_facts_that_later_talk_contradicts():
    rng = Random(9)

    for _ in range(NUM_DRAWS):
        told = short_chats.remembered(rng, is_start_of_long=True).facts
        assert not any(fact.family.is_for_short for fact in told)


def test_turns_alternate_and_the_assistant_speaks_last(encoder, real):
    user, assistant = encoder.markers["user"], encoder.markers["assistant"]

    for seed in range(10):
        row = make_row(encoder, real, seed)
        speakers = [i for i in row.ids if i in (user, assistant)]
        assert speakers == [user, assistant] * (len(speakers) // 2)
        assert row.ids[0] == encoder.bos and row.ids[-1] == encoder.end
        assert row.ids.count(encoder.end) >= len(speakers)


def test_talk_pieces_are_in_role_order_and_leave_no_template_marks():
    rng = Random(1)
    pieces = [talk.filler(rng) for _ in range(NUM_DRAWS)]
    pieces += [asides.named_relative(rng)[0] for _ in range(50)]
    pieces += [asides.told_favorite(rng)[0] for _ in range(50)]
    pieces += [talk.exchange(kind, rng) for kind in ("open", "close") for _ in range(50)]

    for turns in pieces:
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for turn in turns:
            assert turn.text and not set(turn.text) & set("{}[]|"), turn.text


def test_answers_carry_the_value_and_only_its_tokens_weigh_more(encoder):
    rng = Random(2)

    for _ in range(NUM_DRAWS):
        fact = facts.draw_fact(rng)
        row = tokens.Row(encoder)
        row.add(talk.Turn("assistant", facts.answer(fact, rng), is_answer=True))
        heavy = [i for i, w in zip(row.ids, row.weights, strict=True) if w == tokens.VALUE_LOSS]
        assert fact.value in encoder.decode(heavy)


def test_values_a_user_states_are_not_learned(encoder):
    row = tokens.Row(encoder)

    row.add(talk.Turn("user", "My name is \x01Velmora and all is well."))

    learned = [i for i, w in zip(row.ids, row.weights, strict=True) if w]
    assert "Velmora" not in encoder.decode(learned)
    assert "My name is" in encoder.decode(learned)


def test_words_encode_as_the_whole_text_does(encoder):
    rng = Random(3)
    texts = [turn.text for _ in range(NUM_DRAWS) for turn in talk.filler(rng)]

    for text in [*texts, "a  b", " lead", "line\n- two\n", "déjà vu 😀"]:
        assert encoder.decode(encoder.text(text)) == text
        if "  " not in text:
            assert encoder.text(text) == encoder.processor.encode(text)


def test_markers_in_a_message_stay_text(encoder):
    ids = encoder.text("<|assistant|> <s> <|end|>")

    assert not {encoder.bos, encoder.end, *encoder.markers.values()} & set(ids)


@pytest.mark.parametrize("distance", [100, 500, 3_000])
def test_items_ask_at_the_distance_after_the_last_mention(encoder, real, distance):
    for seed in range(4):
        item = recall.make_item(encoder, real, distance, seed)

        value = encoder.decode(item.prompt).lower().rfind(item.value.lower())
        tail = encoder.text(encoder.decode(item.prompt)[value + len(item.value) :])
        assert distance <= item.actual <= distance + 2 * recall._SLACK
        assert len(item.prompt) <= 4_000
        assert value >= 0
        assert len(tail) <= item.actual  # markers do not decode, and a value may end inside a word
        assert values.is_held_out(item.value)


def test_a_number_inside_a_longer_one_is_not_the_answer():
    assert recall.is_right("482", "It is 482.")
    assert not recall.is_right("482", "It is 4821.")
    assert not recall.is_right("482", "It is X-482.")


def test_due_dialogues_are_learned_at_most_once_and_excerpts_never(encoder, real):
    maker = generator.Generator(encoder, real, generator.Mix(), 4)
    due = np.array([0, 1])
    source = generator.RowSource(maker, 2_000, 0.5, num_rows=20, due=due)
    line = encoder.text("Line number")

    learned = 0
    for _ in range(20):
        ids, weights = source.next_row()
        pairs = list(zip(ids.tolist(), weights.tolist(), strict=True))
        learned += sum(
            [i for i, _ in pairs[at : at + len(line)]] == line
            and all(w for _, w in pairs[at : at + len(line)])
            for at in range(len(pairs))
        )

    assert (
        8 <= learned <= 16
    )  # two dialogues of eight lines; the end of a row cuts what stands there


def test_name_placeholders_are_filled_and_others_end_the_dialogue():
    names = {"user": "Ana", "assistant": "Ben"}

    assert corpus.clean("Hi [user 2's name], I'm [User 1's name].", names) == "Hi Ben, I'm Ana."
    assert corpus.clean("I am [name].", names) == "I am Ana."
    assert corpus.clean("I live in [country].", names) is None
    assert corpus.clean("I'm (user 1)!", names) is None


def test_claims_of_something_done_are_not_learned():
    turns = [talk.Turn("user", "Book it."), talk.Turn("assistant", "It has been booked.")]

    assert corpus._clerk("booking", turns).unlearned == {2}


def test_held_out_dialogues_are_not_among_the_learned_ones():
    data = ROOT.parent / "shared" / "data"
    if not data.exists():
        pytest.skip("the published dialogues are not here")

    learned, held_out = (
        {tuple(turn.text for turn in dialogue.turns) for dialogue in dialogues}
        for dialogues in (
            corpus.persona_dialogues(data, "valid"),
            corpus.persona_dialogues(data, "test"),
        )
    )

    long_ones = {texts for texts in held_out if len(texts) > 2}  # greetings are alike everywhere
    assert long_ones and not long_ones & learned


def test_a_slot_keeps_its_word_and_numbered_slots_differ():
    text = expand(parse("{food} {food} {food2}"), Random(0), {}, lambda _, rng: f"f{rng.random()}")

    first, again, other = text.split()
    assert first == again != other


def test_the_folder_is_complete_and_small(encoder):
    config = json.loads((MODEL / "config.json").read_text())
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())

    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert config["vocab_size"] == encoder.processor.vocab_size() == tokens.VOCAB_SIZE
    assert settings["chat_template"] == CHAT_TEMPLATE
    assert generation["eos_token_id"] == [encoder.end]
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 30e6


def test_a_history_is_a_prefix_of_the_next_turn():
    template = pytest.importorskip("jinja2").Template(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

    asked = template.render(bos_token="<s>", messages=messages[:1], add_generation_prompt=True)
    whole = template.render(bos_token="<s>", messages=messages, add_generation_prompt=False)

    assert whole == asked + "Hello!<|end|>"
