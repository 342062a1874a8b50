"""Structure-aware mutants of a checkpoint: a KvchatError of one short line, or a true load."""

import json
import random
import struct
import time
import tracemalloc
from collections import Counter

import pytest
import safetensors.torch
import torch

from kvchat.attention.rope import build_rope
from kvchat.config import RopeScaling
from kvchat.errors import KvchatError, ModelError
from kvchat.model.families import parse_config, tensor_shapes
from kvchat.model.header import read_header
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

NUM_SEEDS = 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
HOSTILE_NAMES = ("", "../../etc/passwd", "a..b", "\x1b]52;c;eA==\x07", "\u202eevil", "x" * 300, "é")
DTYPES = ("F64", "F16", "I64", "BOOL", "F8_E4M3", "f32", "Q4_K", "", 7, None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[dict, bytes]:
    """(header, data) of a valid file."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    shapes = tensor_shapes(parse_config(resolve(str(folder))))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    raw = safetensors.torch.save(tensors)
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def pack(header: dict | str, data: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "replace")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def edited(change):
    """A mutant that changes one random tensor's entry: change(entry, header, rng)."""

    def mutate(header, data, rng):
        change(header[rng.choice(list(header))], header, rng)
        return pack(header, data)

    return mutate


def renamed(header, data, rng):
    header[rng.choice(HOSTILE_NAMES)] = header.pop(rng.choice(list(header)))
    return pack(header, data)


def doubled_key(header, data, rng):
    name = rng.choice(list(header))
    return pack(
        json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", data
    )


def flipped_bytes(header, data, rng):
    raw = bytearray(pack(header, data))
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw) - len(data))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def bomb(header, data, rng):
    """A header of very many entries, of one of three kinds, below the size limit."""
    kind = rng.choice(("tensor", "dict", "text"))
    many = {
        "tensor": ('"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', 150_000),
        "dict": ('"%d":{}', 1_500_000),
        "text": ('"aaaa%d":"b"', 1_000_000),
    }
    form, count = many[kind]
    return pack("{" + ",".join(form % i for i in range(count)) + "}", b"")


def set_shape(shape):
    return edited(lambda entry, header, rng: entry.update(shape=shape(entry["shape"], rng)))


def set_offsets(offsets):
    return edited(lambda e, header, rng: e.update(data_offsets=offsets(*e["data_offsets"], rng)))


MUTANTS = {
    "untouched": lambda header, data, rng: pack(header, data),
    "truncated anywhere": lambda h, d, rng: (r := pack(h, d))[: rng.randrange(len(r))],
    "data cut short": lambda h, d, rng: pack(h, d[: -rng.randint(1, 64)]),
    "data too long": lambda h, d, rng: pack(h, d + bytes(rng.randint(1, 64))),
    "header length": lambda h, d, rng: pack(h, d, rng.choice((0, 1, 7, 2**32, 2**63, 2**64 - 1))),
    "header length off by a few": lambda h, d, rng: pack(
        h, d, len(json.dumps(h)) + rng.randint(-9, 9)
    ),
    "leading blank": lambda h, d, rng: pack(rng.choice(" \n\t") + json.dumps(h), d),
    "duplicate key": doubled_key,
    "overlap": set_offsets(lambda b, e, rng: [b - 4, e - 4] if b else [0, e + 4]),
    "hole": set_offsets(lambda b, e, rng: [b + 4 * rng.randint(1, 4), e + 4 * rng.randint(1, 4)]),
    "reversed offsets": set_offsets(lambda b, e, rng: [e, b]),
    "negative offsets": set_offsets(lambda b, e, rng: [-rng.randint(1, 99), e]),
    "past the end": set_offsets(lambda b, e, rng: [b + 2**40, e + 2**40]),
    "offsets of another type": set_offsets(
        lambda b, e, rng: rng.choice(([b], [b, e, e], "0,4", [str(b), e], [float(b), e], None, {}))
    ),
    "huge dimension": set_shape(lambda s, rng: [rng.choice((2**31 + 1, 2**63, 10**40)), *s[1:]]),
    "product overflows": set_shape(lambda s, rng: [2**31] * rng.randint(2, 8)),
    "very many dimensions": set_shape(lambda s, rng: [1] * rng.choice((9, 1000, 200_000))),
    "negative dimension": set_shape(lambda s, rng: [-s[0], *s[1:]]),
    "shape of another type": set_shape(
        lambda s, rng: rng.choice((None, "16", [None], [1.5], [[16]], [True, 16], {}))
    ),
    "another shape": set_shape(lambda s, rng: [*s[:-1], 1, s[-1]]),
    "dtype": edited(lambda entry, header, rng: entry.update(dtype=rng.choice(DTYPES))),
    "missing field": edited(lambda entry, h, rng: entry.pop(rng.choice(list(entry)))),
    "extra field": edited(lambda entry, header, rng: entry.update(extra=1)),
    "hostile name": renamed,
    "missing tensor": lambda h, d, rng: pack({n: h[n] for n in list(h)[1:]}, d),
    "metadata": lambda h, d, rng: pack(
        {"__metadata__": rng.choice((7, [], {"a": 1}, {"\x1b[2J": "x"}, {"a": "b" * 10**5}))} | h, d
    ),
    "nesting": lambda h, d, rng: pack('{"a":' + "[" * rng.choice((5, 10**5)), d),
    "not utf-8": lambda h, d, rng: struct.pack("<Q", 4) + b'{"\xff"' + d,
    "zero bytes": lambda h, d, rng: bytes(rng.randrange(200)),
    "flipped header bits": flipped_bytes,
    "flipped data bits": lambda h, d, rng: pack(h, bytes(b ^ (rng.random() < 0.01) for b in d)),
    "git-LFS pointer": lambda h, d, rng: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
    ),
    "pickle": lambda h, d, rng: rng.choice((b"PK\x03\x04", b"\x80\x04\x95")) + rng.randbytes(99),
    "gguf": lambda h, d, rng: b"GGUF" + rng.randbytes(99),
    "noise": lambda h, d, rng: rng.randbytes(rng.randrange(300)),
}


def outcome(folder, raw: bytes) -> str:
    """ "refused", or "loaded" after the decoder's values were compared with the library's."""
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)  # an old mapping must not see the new bytes
    path.write_bytes(raw)
    try:
        source = resolve(str(folder))
        decoder = load_decoder(source, parse_config(source), "float32")
    except KvchatError as error:
        message = str(error)
        assert message.isprintable() and 0 < len(message) <= 300, message
        return "refused"
    wanted = safetensors.torch.load(raw)
    assert set(wanted) == set(tensor_shapes(decoder.config))
    layer = decoder.layers[0]
    parts = [wanted[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(decoder.embedding, wanted["model.embed_tokens.weight"].float())
    assert torch.equal(layer.gate_up.weight, torch.cat(parts).float())
    return "loaded"


@pytest.mark.parametrize("kind", MUTANTS)
def test_a_mutant_is_refused_in_one_line_or_truly_valid(checkpoint, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found: Counter[str] = Counter()

    for seed in range(NUM_SEEDS):
        header, data = json.loads(json.dumps(checkpoint[0])), checkpoint[1]
        rng = random.Random(f"{kind} {seed}")
        found[outcome(tmp_path, MUTANTS[kind](header, data, rng))] += 1

    always_loads = {"untouched"}
    may_load = {
        "metadata",
        "flipped data bits",
        "flipped header bits",
        "header length off by a few",
    }
    if kind in always_loads:
        assert found == {"loaded": NUM_SEEDS}
    elif kind not in may_load:
        assert found == {"refused": NUM_SEEDS}


@pytest.mark.parametrize("seed", range(3))
def test_a_header_bomb_is_refused_within_two_seconds_and_little_memory(seed, tmp_path):
    raw = bomb({}, b"", type("Choice", (), {"choice": lambda self, kinds: kinds[seed]})())
    assert len(raw) < 25_000_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)

    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ModelError, match="limit 100,000"):
        read_header(path)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert seconds < 2.0 and peak < 200e6


FULL_CONFIG = CONFIG | {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"],
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
VALUES = (None, -1, 0, 1, 7, 1.5, -1e308, float("nan"), float("inf"), 10**400, True, "x", "\x1b[2J")
VALUES += ("", [], {}, [None], [[1]], {"a": 1}, ["full_attention"], 2**31, 2**62)
RULES = ("linear", "llama3", "yarn", "dynamic", 7, None, [], "\u202e")


def test_a_mutated_config_is_refused_in_one_line_or_runs(checkpoint, tmp_path):
    raw, rng, found = pack(*checkpoint), random.Random(3), Counter()

    for _ in range(1000):
        config = FULL_CONFIG | {"model_type": rng.choice(("llama", "mistral", "qwen2", "qwen3"))}
        config["architectures"] = None
        if rng.random() < 0.5:
            rope = {"rope_type": rng.choice(RULES), "factor": rng.choice((*VALUES, 4.0))}
            rope[rng.choice(list(RopeScaling.__annotations__))] = rng.choice(VALUES)
            rope["original_max_position_embeddings"] = rng.choice((32, *VALUES))
            config["rope_scaling"] = rope
        for key in rng.sample(list(config), rng.randint(0, 2)):
            config[key] = rng.choice(VALUES)
        (tmp_path / "config.json").write_text(json.dumps(config))
        result = outcome(tmp_path, raw)
        found[result] += 1
        if result == "loaded":
            parsed = parse_config(resolve(str(tmp_path)))
            assert build_rope(parsed, 64).cos.isfinite().all(), config

    assert found["loaded"] > 50 and found["refused"] > 500, found
