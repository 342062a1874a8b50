"""Every family against transformers: tiny random checkpoints, ragged batches, greedy replies."""

import json
import logging
from dataclasses import dataclass

import pytest
import torch
from dense_backend import DenseBackend

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import make_backend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, ModelConfig
from kvchat.kv.cache import KVCache
from kvchat.model.decoder import Decoder
from kvchat.model.families import parse_config
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

transformers = pytest.importorskip("transformers")

LENS = (1, 16, 17, 33)
NUM_GREEDY = 64
BACKENDS = ("dense", "reference", "cpu")
BLOCK_SIZE = 16
BLOCKS_EACH = 7  # 33 + 64 tokens
# A reply is compared until transformers' two best logits are closer than this: rounding decides.
TIE_GAP = 1e-3
TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # wide enough that attention and logits are far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = [[(7 * i * i + 31 * n) % 160 for i in range(n)] for n in LENS]
# Blocks of the sequences interleaved and out of order.
TABLES = [[1 + i + len(LENS) * (3 * b % BLOCKS_EACH) for b in range(BLOCKS_EACH)] for i in range(4)]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-all-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0} | LLAMA3},
    ),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
            }
        },
    ),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": True,
        },
    ),
    "smollm2": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def make_model(case: str):
    """A transformers model in float32 whose every tensor is noise, biases and norms included."""
    name, changes = CASES[case]
    settings = TINY | changes
    if name == "Qwen2":  # its config class has no head_dim
        settings = {key: value for key, value in settings.items() if key != "head_dim"}
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if "norm" in parameter_name else 0.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """One saved checkpoint: kvchat's decoder, and what transformers says for PROMPTS."""

    decoder: Decoder
    logits: list[torch.Tensor]  # per prompt [len, vocab]
    replies: list[tuple[list[int], int]]  # per prompt 64 greedy ids, how many before a near-tie


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory) -> Case:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    shards = {"max_shard_size": "100KB"} if request.param == "llama" else {}
    model.save_pretrained(folder, **shards)
    assert (folder / "model.safetensors.index.json").exists() == bool(shards)
    source = resolve(str(folder))
    with torch.no_grad():
        return Case(
            decoder=load_decoder(source, parse_config(source), "float32"),
            logits=[model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS],
            replies=[greedy_transformers(model, prompt) for prompt in PROMPTS],
        )


def greedy_transformers(model, prompt: list[int]) -> tuple[list[int], int]:
    """(64 greedy ids, how many come before the first near-tie)."""
    ids, past, new, num_certain = [], None, prompt, NUM_GREEDY
    for position in range(NUM_GREEDY):
        out = model(torch.tensor([new]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        best, second = out.logits[0, -1].topk(2).values.tolist()
        if best - second < TIE_GAP:
            num_certain = min(num_certain, position)
        new = [int(out.logits[0, -1].argmax())]
        ids += new
    return ids, num_certain


def reloaded(folder):
    """The checkpoint as transformers reads it in float32; model.float() would keep rounded RoPE."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(backend: str, config: ModelConfig):
    """An attention backend by name; a pool's unwritten slots are NaN."""
    if backend == "dense":
        return DenseBackend(config)
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "float32")
    cache = KVCache(spec, 1 + len(PROMPTS) * BLOCKS_EACH)
    cache.blocks[1:] = float("nan")
    return make_backend(backend, config, cache, build_rope(config, BLOCKS_EACH * BLOCK_SIZE))


def step(decoder, backend, rows: dict[int, list[int]], seq_lens: dict[int, int], every=False):
    """One ragged step: sequence -> new tokens, sequence -> its length after them. Logits of each
    sequence's last new token, or of every new token."""
    query_lens = [len(row) for row in rows.values()]
    tables = [TABLES[i] for i in rows]
    backend.plan(AttentionBatch(query_lens, [seq_lens[i] for i in rows], tables))
    ends = torch.tensor(query_lens).cumsum(0) - 1
    wanted = torch.arange(sum(query_lens)) if every else ends
    return decoder(torch.tensor([t for row in rows.values() for t in row]), backend, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers_on_ragged_batches(case, backend):
    rows, lens = dict(enumerate(PROMPTS)), dict(enumerate(LENS))

    found = step(case.decoder, make(backend, case.decoder.config), rows, lens, every=True)

    wanted = torch.cat(case.logits)
    assert wanted.std() > 0.3, "logits too flat to tell anything"
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_when_prompts_come_in_chunks(case, backend):
    made = make(backend, case.decoder.config)

    # chunks of 7, the shorter prompts joining late, so that all end with the last step
    for num_missing in range(28, -1, -7):
        lens = {i: n - num_missing for i, n in enumerate(LENS) if n > num_missing}
        rows = {i: PROMPTS[i][max(0, n - 7) : n] for i, n in lens.items()}
        found = step(case.decoder, made, rows, lens)

    assert (found - torch.stack([logits[-1] for logits in case.logits])).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_greedy_replies_equal_transformers(case, backend, request):
    made, lens = make(backend, case.decoder.config), dict(enumerate(LENS))
    replies: list[list[int]] = [[] for _ in PROMPTS]

    new = dict(enumerate(PROMPTS))
    for _ in range(NUM_GREEDY):
        best = step(case.decoder, made, new, lens).argmax(-1).tolist()
        new = {i: [token] for i, token in enumerate(best)}
        lens = {i: n + 1 for i, n in lens.items()}
        for reply, token in zip(replies, best, strict=True):
            reply.append(token)

    for reply, (wanted, num_certain) in zip(replies, case.replies, strict=True):
        assert reply[:num_certain] == wanted[:num_certain]
    num_compared = sum(num_certain for _, num_certain in case.replies)
    print(f"{request.node.callspec.id}: {num_compared} of {len(PROMPTS) * NUM_GREEDY} compared")
    assert num_compared >= len(PROMPTS) * NUM_GREEDY // 2


def test_every_weight_is_read_once_a_step(case):
    before = [linear.num_reads for linear in case.decoder.linears()]

    logits_of(case.decoder)

    reads = [x.num_reads - n for x, n in zip(case.decoder.linears(), before, strict=True)]
    assert reads == [1] * (4 * TINY["num_hidden_layers"] + 1)


def logits_of(decoder: Decoder) -> torch.Tensor:
    """Of the longest prompt alone, [33, vocab]."""
    return step(decoder, make("dense", decoder.config), {3: PROMPTS[3]}, {3: LENS[3]}, every=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_16_bit_loads_hold_the_rounded_weights(name, dtype, tmp_path):
    model = make_model(name)
    torch_dtype = getattr(torch, dtype)
    model.to(torch_dtype).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    config = parse_config(source)

    decoder = load_decoder(source, config, dtype)
    found = logits_of(decoder)

    assert config.checkpoint_dtype == dtype and decoder.embedding.dtype == torch_dtype
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(decoder.layers[1].qkv.weight, torch.cat([p.weight for p in parts]))
    with torch.no_grad():
        wanted = reloaded(tmp_path)(torch.tensor([PROMPTS[3]])).logits[0]
    error = (found - wanted).abs().max() / wanted.std()
    assert error < (0.03 if dtype == "float16" else 0.25)


def test_16_bit_checkpoint_in_float32_equals_transformers(tmp_path):
    make_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))

    decoder = load_decoder(source, parse_config(source), "float32")
    found = logits_of(decoder)

    with torch.no_grad():
        assert (found - reloaded(tmp_path)(torch.tensor([PROMPTS[3]])).logits[0]).abs().max() < 1e-4


OLD_STYLE = [
    {"rope_theta": 5e4, "rope_scaling": None},
    {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 5e4, "rope_scaling": {"rope_type": "llama3", "factor": 8.0} | LLAMA3},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
    {"rope_parameters": {"rope_type": "yarn", "factor": None, "beta_fast": 8, "beta_slow": 2},
     "original_max_position_embeddings": 32},
]  # fmt: skip


@pytest.mark.parametrize("rope", OLD_STYLE, ids=range(len(OLD_STYLE)))
def test_rope_tables_equal_transformers_for_old_and_new_configs(rope, tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = make_model("llama")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(written | rope))

    config = parse_config(resolve(str(tmp_path)))
    table = DenseBackend(config, max_len=300).rope

    reference = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    cos, sin = reference(torch.zeros(1), torch.arange(300)[None])
    assert torch.equal(table.cos, cos[0, :, :8]) and torch.equal(table.sin, sin[0, :, :8])


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_absent_keys_mean_what_transformers_takes_them_for(name, tmp_path):
    reference = getattr(transformers, f"{name}Config")()
    model_type = name.lower()
    written = {"model_type": model_type, "vocab_size": 64, "hidden_size": 4096}
    written |= {"num_hidden_layers": 30, "num_attention_heads": 32, "intermediate_size": 64}
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(written))

    config = parse_config(resolve(str(tmp_path)))

    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == (getattr(reference, "head_dim", None) or 4096 // 32)
    assert config.max_position == reference.max_position_embeddings
    assert config.norm_eps == reference.rms_norm_eps
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.layer_windows == ((4096,) * 30 if name == "Mistral" else ())
