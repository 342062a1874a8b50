"""Matrices as int8: what becomes int8, how large the error is, and what it costs a model."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_backend import DenseBackend
from test_loading import change_config, change_weights, load
from tiny_model import write_tiny_model

from kvchat.attention import AttentionBatch
from kvchat.bench import arms
from kvchat.bench.arms import _Random
from kvchat.bench.shapes import find_shape
from kvchat.engine.device import Choice
from kvchat.errors import CapacityError, ModelError
from kvchat.model.families import parse_config, tensor_shapes
from kvchat.model.linear import Quantised
from kvchat.model.sizes import is_quantised, weight_bytes
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

ROOT = Path(__file__).parent.parent
SPROUT = ROOT / "models" / "sprout"
sys.path.insert(0, str(ROOT / "scripts"))

from demo_model import corpus, generator, talk, tokens  # noqa: E402


@pytest.fixture
def model(tmp_path):
    """A model to spoil."""
    return write_tiny_model(tmp_path / "model")


def test_matrices_become_int8_and_nothing_else_does(model):
    change_config(model, tie_word_embeddings=False)
    name = "model.embed_tokens.weight"
    change_weights(model, lambda t: t.update({"lm_head.weight": t[name] * 0.5}))
    source = resolve(str(model))
    config, plain = parse_config(source), load(model)

    decoder = load_decoder(source, config, "bfloat16", weights="int8")

    for linear, kept in zip(decoder.linears(), plain.linears(), strict=True):
        assert linear.weight.dtype == torch.int8 and linear.scales.dtype == torch.float32
        assert linear.weight.shape == kept.weight.shape
        assert torch.equal(linear.weight.abs().amax(1), torch.full((len(linear.scales),), 127))
        error = (linear.weight * linear.scales[:, None] - kept.weight).abs().amax(1)
        assert (error <= 0.5001 * kept.weight.abs().amax(1) / 127).all()
    assert decoder.embedding.dtype == decoder.norm.dtype == torch.bfloat16
    assert torch.equal(decoder.embedding, plain.embedding.bfloat16())
    held = [decoder.embedding, decoder.norm]
    held += [norm for x in decoder.layers for norm in (x.attention_norm, x.mlp_norm)]
    num_bytes = sum(x.nbytes for x in held) + sum(x.num_bytes for x in decoder.linears())
    assert num_bytes == weight_bytes(config, "bfloat16", "int8")


def test_a_tied_output_matrix_stays_as_the_embedding_is(model):
    source = resolve(str(model))

    decoder = load_decoder(source, parse_config(source), "float16", weights="int8")

    assert decoder.lm_head.weight is decoder.embedding and decoder.lm_head.scales is None
    assert decoder.layers[0].qkv.weight.dtype == torch.int8


def test_int8_is_made_in_pieces_and_a_row_of_zeros_stays_zero(model, monkeypatch):
    def clear(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"][5] = 0

    change_weights(model, clear)
    source = resolve(str(model))
    config = parse_config(source)
    whole = load_decoder(source, config, "float16", weights="int8")
    monkeypatch.setattr("kvchat.model.weights._PIECE_VALUES", 300)

    pieces = load_decoder(source, config, "float16", weights="int8")

    for one, other in zip(whole.linears(), pieces.linears(), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.scales is None or torch.equal(one.scales, other.scales)
    down = whole.layers[0].down
    assert down.scales[5] == 0 and not down.weight[5].any() and down.weight[4].any()


def test_int8_weights_that_are_not_finite_are_refused(model):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = float("nan")

    change_weights(model, spoil)
    source = resolve(str(model))

    with pytest.raises(ModelError, match=r"v_proj\.weight\": 1 non-finite"):
        load_decoder(source, parse_config(source), "float16", weights="int8")


# --- what it costs


def held_out_text(num_tokens: int, seed: int) -> list[int]:
    """Chats as the shipped model was made for, written by the generator of its training text from
    a seed that no training had."""
    encoder = tokens.Encoder(SPROUT / "tokenizer.model")
    turns = tuple(talk.Turn(role, "Nice to meet you.") for role in ("user", "assistant") * 4)
    kinds = ("persona", "booking", "pair", "program")
    real = corpus.encode_dialogues(iter([corpus.Dialogue(kind, turns) for kind in kinds]), encoder)
    row = tokens.Row(encoder)
    generator.Generator(encoder, real, generator.Mix(), seed).conversation(row, num_tokens)
    return row.ids[:num_tokens]


def log_probs(decoder, token_ids) -> torch.Tensor:
    backend = DenseBackend(decoder.config, len(token_ids))
    backend.plan(AttentionBatch([len(token_ids)], [len(token_ids)], [[1]]))
    return decoder(torch.tensor(token_ids), backend).log_softmax(-1)


def widened(decoder):
    """The same model, its int8 matrices as the float32 values that they stand for."""
    for linear in decoder.linears():
        if linear.scales is not None:
            linear.weight = Quantised(linear.weight, linear.scales).wide(torch.float32)
            linear.scales = None
    return decoder


def test_the_shipped_model_stays_what_it_is():
    source = resolve(str(SPROUT))
    config = parse_config(source)
    native = load_decoder(source, config, "float32")
    int8 = widened(load_decoder(source, config, "float32", weights="int8"))
    kls, agreements = [], []
    for seed in (90_001, 90_002):
        text = held_out_text(1024, seed)
        right, found = log_probs(native, text), log_probs(int8, text)
        kls.append((right.exp() * (right - found)).sum(-1))
        agreements.append(right.argmax(-1) == found.argmax(-1))
    kl, agreement = torch.cat(kls), torch.cat(agreements).float().mean().item()

    print(f"KL mean {kl.mean():.5f}, p99 {kl.quantile(0.99):.5f}, top-1 {agreement:.4f}")
    assert 0 < kl.mean() < 0.0005 and kl.quantile(0.99) < 0.01
    assert agreement > 0.99


def test_random_weights_of_a_shape_are_int8_where_a_models_are():
    config = replace(find_shape("stories15m"), num_layers=1)
    shapes = tensor_shapes(config)

    made = {name: _Random(config, "float16", "cpu", "int8").fetch(name) for name in shapes}

    for name, tensor in made.items():
        assert isinstance(tensor, Quantised) == is_quantised(name), name
    assert sum(is_quantised(name) for name in shapes) >= 7
    parts = [part for x in made.values() for part in (x if isinstance(x, Quantised) else [x])]
    assert sum(part.nbytes for part in parts) == weight_bytes(config, "float16", "int8")


def test_a_shape_that_fits_as_int8_alone_says_so(monkeypatch):
    config = find_shape("llama3-8b")
    monkeypatch.setattr(arms, "choose_device", lambda *asked: Choice("cuda"))
    monkeypatch.setattr(arms, "device_memory", lambda device: 10 * 2**30)

    with pytest.raises(CapacityError, match=r"use --weights int8 \(8.0 GiB\)$"):
        arms.load_model(None, "llama3-8b", "auto", 16, lambda *at: None)
    assert weight_bytes(config, "bfloat16", "int8") < 10 * 2**30
    monkeypatch.setattr(arms, "device_memory", lambda device: 7 * 2**30)
    with pytest.raises(CapacityError, match=r"use a smaller model or shape$"):
        arms.load_model(None, "llama3-8b", "auto", 16, lambda *at: None)
