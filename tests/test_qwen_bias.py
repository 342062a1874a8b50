"""A tiny Qwen2 with key biases as large as the real one's: auto4 does not silently ruin it.

Qwen2.5-7B's key biases have a norm of about 605 in the first layer, 921 in the last, and 22 in the
median one (llama.cpp #21385); 4-bit keys of the usual kinds make noise of its replies.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import train_tokenizer

from kvchat.attention.rope import build_rope
from kvchat.bench.probe import Probed, score_texts
from kvchat.bench.probing import _gates, default_settings
from kvchat.config import KVSpec
from kvchat.engine import gate
from kvchat.engine.build import EngineOptions, build_engine
from kvchat.kv import codecs
from kvchat.kv.layout import Codec
from kvchat.model.families import parse_config, tensor_shapes
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 3, 4, 64  # as many KV heads as the real one has
BIASED_LAYER, LARGE_NORM, MEDIAN_NORM = 0, 600.0, 22.0
NUM_TEXTS, NUM_TOKENS = 2, 288
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 340,
    "hidden_size": NUM_HEADS * HEAD_DIM,
    "intermediate_size": 192,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# The pairs of channels of a head that hold the large bias, of 32: RoPE hardly turns the last ones
# within a block; the third turns once in 15 tokens.
PAIRS = {"none": (), "slow": (25, 27, 28, 31), "fast": (3, 25, 28, 31)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def key_bias(layer_idx, pairs, generator):
    """float32 [NUM_HEADS * HEAD_DIM]: noise, and in one layer a few huge pairs of channels."""
    bias = torch.randn(NUM_HEADS, HEAD_DIM, generator=generator)
    norm = MEDIAN_NORM
    if layer_idx == BIASED_LAYER and pairs:
        norm = LARGE_NORM
        channels = [*pairs, *(pair + HEAD_DIM // 2 for pair in pairs)]
        bias[:, channels] *= 1000
    bias = bias.flatten()
    return bias * norm / bias.norm()


@pytest.fixture(scope="module", params=PAIRS)
def model(request, tmp_path_factory):
    """(which pairs, folder) of the checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.model").write_bytes(train_tokenizer())
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")  # a source needs one
    shapes = tensor_shapes(parse_config(resolve(str(folder))))
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        elif name.endswith("k_proj.bias"):
            tensors[name] = key_bias(int(name.split(".")[2]), PAIRS[request.param], generator)
        elif name.endswith("o_proj.weight"):
            # little of what a layer adds is attention's: without large biases it stands INT4
            tensors[name] = 0.012 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        elif name == "lm_head.weight":
            tensors[name] = 4 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        else:
            tensors[name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return request.param, folder


def measure(folder):
    """The gates' results, measured through the pool on random text."""
    source = resolve(str(folder))
    config = parse_config(source)
    decoder = load_decoder(source, config, "float32")
    spec = KVSpec(NUM_LAYERS, NUM_HEADS, HEAD_DIM, 16, "float32")
    probed = Probed(decoder, spec, build_rope(config, 512))
    generator = torch.Generator().manual_seed(4)
    texts = torch.randint(0, 340, (NUM_TEXTS, NUM_TOKENS), generator=generator).tolist()
    settings = default_settings(sink=0, window=16)[:3]
    with torch.inference_mode():
        scores = score_texts(probed, settings, texts, lambda done: None)
    return {result.codec: result for result in _gates(scores)}


def build(folder, **options):
    source = resolve(str(folder))
    made = EngineOptions(kv_cache="auto4", kv_mem="16MiB", dtype="float32", **options)
    return build_engine(
        source, parse_config(source), made, lambda *_: None, lambda _: None, frozenset()
    )[1]


def collapsing(encode):
    """`encode` whose INT4 keys have been 4 bits of a rotated token before: the bias is spread."""

    def encode_worse(codec, k, v, layout):
        if codec == Codec.INT4:
            rotated = codecs.rotate(k)
            steps = rotated.abs().amax(-1, keepdim=True) / 7
            k = codecs.unrotate((rotated / steps).round() * steps)
        return encode(codec, k, v, layout)

    return encode_worse


def test_the_biases_are_as_large_as_the_real_ones(model):
    pairs, folder = model
    source = resolve(str(folder))
    decoder = load_decoder(source, parse_config(source), "float32")
    size = NUM_HEADS * HEAD_DIM
    norms = sorted(float(layer.qkv.bias[size : 2 * size].norm()) for layer in decoder.layers)

    assert norms[1] == pytest.approx(22, rel=1e-4)
    assert norms[-1] == pytest.approx(22 if pairs == "none" else 600, rel=1e-4)


def test_auto4_goes_as_far_as_the_model_stands_and_says_so(model, tmp_path, monkeypatch, capsys):
    pairs, folder = model
    monkeypatch.setattr(gate, "gate_path", lambda _: tmp_path / "gate.json")
    results = measure(folder)
    with capsys.disabled():
        print(f" {pairs}: " + "; ".join(result.sentence() for result in results.values()))
    unprobed = build(folder)
    gate.remember(resolve(str(folder)).fingerprint, results.values())

    facts = build(folder)

    assert unprobed.scheduler.kv.mode == "auto"
    stands = [codec for codec in (Codec.INT8, Codec.INT4) if results[codec].passes]
    assert facts.lowest == max(stands, default=Codec.NATIVE)
    assert build(folder, force=True).lowest == Codec.INT4
    failed = [results[codec] for codec in (Codec.INT8, Codec.INT4) if codec not in stands]
    assert bool(failed) == bool(facts.warnings)
    assert not failed or failed[0].sentence() in " ".join(facts.warnings)
    # What was measured here, so that a codec that gets worse shows.
    assert Codec.INT8 in stands
    assert (Codec.INT4 in stands) == (pairs != "fast")


@pytest.mark.parametrize("model", ["slow"], indirect=True)  # where INT4 passes
def test_a_codec_that_collapses_is_refused(model, tmp_path, monkeypatch, capsys):
    _, folder = model
    monkeypatch.setattr(gate, "gate_path", lambda _: tmp_path / "gate.json")
    monkeypatch.setattr(codecs, "encode", collapsing(codecs.encode))

    results = measure(folder)

    with capsys.disabled():
        print(f" collapsing: {results[Codec.INT4].sentence()}")
    assert results[Codec.INT8].passes and not results[Codec.INT4].passes
    gate.remember(resolve(str(folder)).fingerprint, results.values())
    facts = build(folder)
    assert facts.lowest == Codec.INT8
    assert "INT4 fails the probe" in " ".join(facts.warnings)
