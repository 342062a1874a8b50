"""Matrices as int8: what becomes int8, how large the error is, and what it costs a model."""

import pytest
import torch
from test_loading import change_config, change_weights, load
from tiny_model import write_tiny_model

from kvchat.errors import ModelError
from kvchat.model.families import parse_config
from kvchat.model.sizes import weight_bytes
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder


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
