"""The probe: what it measures against numbers made another way, and what it says."""

import io
import json
import math

import numpy as np
import pytest
import torch
from tiny_model import write_tiny_model

from kvchat.attention.rope import build_rope
from kvchat.bench.needles import make_needles
from kvchat.bench.probe import Arm, Probed, Score, Setting, replies, sample_texts, score_texts
from kvchat.bench.probing import _gates, default_settings
from kvchat.cli import run_cli
from kvchat.config import KVSpec
from kvchat.engine.gate import decisive, recall
from kvchat.kv.codecs import CODEC_FINGERPRINT
from kvchat.kv.layout import Codec
from kvchat.model.families import parse_config
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder
from kvchat.terminal.show import Show

INT8, INT4 = Codec.INT8, Codec.INT4
NUM_TOKENS = 288


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def probed(folder):
    source = resolve(str(folder))
    config = parse_config(source)
    decoder = load_decoder(source, config, "float32")
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, "float32")
    return Probed(decoder, spec, build_rope(config, 512))


@pytest.fixture(scope="module")
def texts(probed):
    vocab_size = probed.decoder.config.vocab_size
    return torch.randint(0, vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


def quiet(done):
    pass


def test_a_native_row_equals_native_to_the_bit(probed, texts):
    (score,) = score_texts(probed, [Setting(())], texts.tolist(), quiet)

    assert (score.kl_mean, score.kl_p99, score.agreement, score.delta_nll) == (0, 0, 1, 0)
    assert score.share_compressed == 0
    assert not score.is_telling


def test_figures_equal_those_of_numpy_on_the_same_logits(probed, texts):
    setting = Setting((INT8,), 0, 64)
    (score,) = score_texts(probed, [setting], texts.tolist(), quiet)
    native, arm = (Arm(probed, s, 2, NUM_TOKENS) for s in (Setting(()), setting))
    rows = []
    for position in range(NUM_TOKENS - 1):
        ids = texts[:, position : position + 1].tolist()
        logits = [np.float64(a.feed(ids).numpy()) for a in (native, arm)]
        logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]
        if position >= NUM_TOKENS // 2:
            for row in range(2):
                p, q = logs[0][row], logs[1][row]
                target = int(texts[row, position + 1])
                kl = (np.exp(p) * (p - q)).sum()
                rows.append((kl, p.argmax() == q.argmax(), -q[target], -p[target]))
    kl, same, nll, native_nll = np.array(rows, float).T

    assert score.num_scored == len(rows)
    assert score.kl_mean == pytest.approx(kl.mean(), abs=1e-6)
    assert score.kl_p99 == pytest.approx(np.quantile(kl, 0.99), abs=1e-5)
    assert score.agreement == same.mean()
    assert score.nll == pytest.approx(nll.mean(), abs=1e-5)
    assert score.native_nll == pytest.approx(native_nll.mean(), abs=1e-5)
    assert score.kl_mean > 0, "nothing was compressed"


@pytest.mark.parametrize(
    ("setting", "num_compressed"),
    [
        (Setting((INT8,), 0, 0), 256),  # spans of 64 tokens: 4 of 288 tokens' 4.5
        (Setting((INT8,), 64, 64), 128),
        (Setting((INT8,), 1, 1), 192),  # outward: a sink of 1 protects a span
        (Setting((INT4,), 0, 0), 256),  # spans of 128
        (Setting((INT4,), 1, 0), 128),
        (Setting((INT8, INT4), 0, 40), 192),
    ],
)
def test_what_is_compressed_is_what_the_setting_says(probed, texts, setting, num_compressed):
    arm = Arm(probed, setting, 2, NUM_TOKENS)
    for position in range(NUM_TOKENS):
        arm.feed(texts[:, position : position + 1].tolist())

    assert arm.share_compressed() == num_compressed / NUM_TOKENS


def test_int4_costs_more_than_int8_and_both_cost_something(probed, texts):
    settings = [Setting((INT8,)), Setting((INT4,)), Setting((INT8, INT4))]
    int8, int4, chained = score_texts(probed, settings, texts.tolist(), quiet)

    assert 0 < int8.kl_mean < int4.kl_mean
    assert chained.kl_mean != int4.kl_mean
    assert int8.is_telling
    assert int8.share_compressed > int4.share_compressed > 0.5


def test_a_text_written_by_the_model_depends_on_the_seed_alone(probed):
    made = [sample_texts(probed, 1, 2, 40, seed, quiet) for seed in (1, 1, 2)]

    assert made[0] == made[1] != made[2]
    assert made[0][0] != made[0][1]
    assert all(len(text) == 40 and text[0] == 1 for text in made[0])


def test_replies_are_greedy_and_end_at_their_stop(probed, texts):
    prompts = [texts[0].tolist(), texts[1, :270].tolist()]
    room = NUM_TOKENS + 20
    made = replies(Arm(probed, Setting(()), 2, room), prompts, 5, frozenset())

    assert [len(ids) for ids in made] == [5, 5]
    for prompt, ids in zip(prompts, made, strict=True):
        logits = Arm(probed, Setting(()), 1, room).feed([prompt + ids[:4]])
        assert int(logits.argmax()) == ids[4]
    stop = next(i for i in range(1, 5) if made[0][i] not in made[0][:i])
    stop_ids = frozenset({made[0][stop]})
    stopped = replies(Arm(probed, Setting(()), 2, room), prompts, 5, stop_ids)
    assert stopped[0] == made[0][:stop]
    assert stopped[1] == made[1][: len(stopped[1])]


def test_needles_are_asked_for_late_and_stand_once():
    def measure(messages):
        return sum(4 + len(m.content.split()) for m in messages)

    needles = make_needles(8, 400, measure)

    assert needles == make_needles(8, 400, measure)
    for needle in needles:
        said = [m.content for m in needle.messages if m.role == "user"]
        assert sum(needle.value in text for text in said[:4]) == 1
        assert not any(needle.value in text for text in said[4:])
        assert said[-1].startswith("What is my")
        assert 340 < measure(needle.messages) <= 420
        roles = [m.role for m in needle.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_the_rows_asked_for_are_there():
    rows = [(s.name, s.sink, s.window) for s in default_settings(64, 128)]

    assert rows == [
        ("int8", 64, 128),
        ("int4", 64, 128),
        ("int8 -> int4", 64, 128),
        ("int8", 0, 0),
        ("int4", 0, 0),
    ]


@pytest.fixture
def probe(folder, monkeypatch, tmp_path):
    """Run the command on the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.setattr("kvchat.engine.gate.gate_path", lambda _: tmp_path / "gate.json")

    def command(*flags):
        out, err = io.StringIO(), io.StringIO()
        sizes = ["--texts", "2", "--tokens", "288", "--kv-sink", "0", "--kv-window", "16"]
        arguments = ["probe", str(folder), *sizes, *flags]
        return run_cli(arguments, Show(out, err)), out.getvalue(), err.getvalue()

    return command


def test_the_command_prints_a_table_and_remembers(probe, folder):
    code, out, err = probe()

    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "KV", "native", "int8", "int4", "int8 -> int4", "int8", "int4",
    ]  # fmt: skip
    assert "written by the model" in out
    assert "auto and auto4 use INT8" in out
    results = recall(resolve(str(folder)).fingerprint + CODEC_FINGERPRINT)
    int8, int4 = (decisive(results, codec, 0, 16) for codec in (INT8, INT4))
    assert int8.kl_mean < int4.kl_mean
    assert (int8.sink, int8.window) == (int4.sink, int4.window) == (0, 16)


def test_json_holds_the_same_figures(probe, folder):
    code, out, _ = probe("--json")

    made = json.loads(out)
    assert code == 0
    assert [(g["codec"], g["window"]) for g in made["gates"]] == [
        ("int8", 16), ("int4", 16), ("int8", 0), ("int4", 0),
    ]  # fmt: skip
    worst = max(row["kl_mean"] for row in made["scores"][1:3] if row["is_telling"])
    assert made["gates"][1]["kl_mean"] == worst
    assert all(math.isfinite(row["nll"]) for row in made["scores"])


def test_a_gate_needs_a_row_in_which_enough_was_compressed():
    def score(rungs, share, kl_mean, **places):
        return Score(Setting(rungs, **places), share, kl_mean=kl_mean, agreement=1.0)

    kept = {"sink": 64, "window": 128}
    rows = [
        score((INT8,), 0.6, 0.001, **kept),
        score((INT4,), 0.1, 0.002, **kept),
        score((INT8, INT4), 0.7, 0.003, **kept),
        score((INT8,), 0.9, 0.004),
        score((INT4,), 0.9, 0.005),
    ]

    def gates(*shares):
        for row, share in zip(rows, shares, strict=True):
            row.share_compressed = share
        return {(gate.codec, gate.window): gate.kl_mean for gate in _gates(rows)}

    bare = {(INT8, 0): 0.004, (INT4, 0): 0.005}
    assert gates(0.6, 0.1, 0.7, 0.9, 0.9) == {(INT8, 128): 0.001, (INT4, 128): 0.003, **bare}
    assert gates(0.6, 0.7, 0.1, 0.9, 0.9) == {(INT8, 128): 0.001, (INT4, 128): 0.002, **bare}
    assert gates(0.4, 0.1, 0.1, 0.9, 0.9) == bare
    assert gates(0.4, 0.1, 0.1, 0.4, 0.4) == {}
    rows[1].kl_mean = math.nan
    assert math.isnan(gates(0.6, 0.7, 0.7, 0.9, 0.9)[INT4, 128])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.txt", None, "cannot be read"),
        ("short.txt", "too short", "give at least 256"),
        ("bad.jsonl", '{"messages": 5}\n', "line 1 is no chat"),
        ("bad.jsonl", "what\n", "line 1 is no chat"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(probe, tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)

    code, out, err = probe("--text", str(path))

    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
