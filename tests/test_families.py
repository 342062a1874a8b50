"""Every family against transformers: tiny random checkpoints, ragged batches, greedy replies."""

import json
import logging

import pytest
import torch
from dense_backend import DenseBackend

from kvchat.attention import AttentionBatch
from kvchat.model.families import parse_config
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

transformers = pytest.importorskip("transformers")

PROMPT_LENS = (1, 16, 17, 33)
NUM_GREEDY = 64
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


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(transformers model, kvchat decoder) of one saved checkpoint."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    shards = {"max_shard_size": "100KB"} if request.param == "llama" else {}
    model.save_pretrained(folder, **shards)
    assert (folder / "model.safetensors.index.json").exists() == bool(shards)
    source = resolve(str(folder))
    return model, load_decoder(source, parse_config(source), "float32")


def reloaded(folder):
    """The checkpoint as transformers reads it in float32; model.float() would keep rounded RoPE."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENS]


def step(decoder, backend, rows: list[list[int]], seq_lens: list[int], all_logits=False):
    """One ragged step; `rows` are the new tokens of each sequence."""
    query_lens = [len(row) for row in rows]
    backend.plan(AttentionBatch(query_lens, seq_lens, [[i] for i in range(len(rows))]))
    ends = torch.tensor(query_lens).cumsum(0) - 1
    wanted = torch.arange(sum(query_lens)) if all_logits else ends
    return decoder(torch.tensor([t for row in rows for t in row]), backend, wanted)


def test_logits_equal_transformers_on_ragged_batches(pair):
    model, decoder = pair
    rows = prompts(TINY["vocab_size"])

    found = step(decoder, DenseBackend(decoder.config), rows, list(PROMPT_LENS), all_logits=True)

    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    assert wanted.std() > 0.3, "logits too flat to tell anything"
    assert (found - wanted).abs().max() < 1e-4


def test_logits_equal_when_prompts_come_in_chunks(pair):
    model, decoder = pair
    rows, backend = prompts(TINY["vocab_size"]), DenseBackend(decoder.config)

    for start in range(0, 33, 7):  # sequences join late, so that each ends with the last chunk
        late = [(i, row[max(0, start - 33 + len(row)) : max(0, start - 26 + len(row))])
                for i, row in enumerate(rows)]  # fmt: skip
        live = [(i, part) for i, part in late if part]
        lens = [min(len(rows[i]), start + 7 - 33 + len(rows[i])) for i, _ in live]
        backend.plan(AttentionBatch([len(p) for _, p in live], lens, [[i] for i, _ in live]))
        ends = torch.tensor([len(part) for _, part in live]).cumsum(0) - 1
        found = decoder(torch.tensor([t for _, part in live for t in part]), backend, ends)

    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert (found - wanted).abs().max() < 1e-4


def greedy_transformers(model, prompt: list[int]) -> tuple[list[int], int]:
    """(64 greedy ids, how many come before the first near-tie)."""
    ids, past, new, agreed = [], None, prompt, NUM_GREEDY
    with torch.no_grad():
        for position in range(NUM_GREEDY):
            out = model(torch.tensor([new]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            best, second = out.logits[0, -1].topk(2).values.tolist()
            if best - second < TIE_GAP:
                agreed = min(agreed, position)
            new = [int(out.logits[0, -1].argmax())]
            ids += new
    return ids, agreed


def test_greedy_replies_equal_transformers(pair, request):
    model, decoder = pair
    rows, backend = prompts(TINY["vocab_size"])[::3], DenseBackend(decoder.config)
    replies: list[list[int]] = [[] for _ in rows]

    new, lens = rows, [len(row) for row in rows]
    for _ in range(NUM_GREEDY):
        new = [[t] for t in step(decoder, backend, new, lens).argmax(-1).tolist()]
        lens = [n + 1 for n in lens]
        for reply, token in zip(replies, new, strict=True):
            reply += token

    num_compared = 0
    for row, reply in zip(rows, replies, strict=True):
        wanted, agreed = greedy_transformers(model, row)
        assert reply[:agreed] == wanted[:agreed]
        num_compared += agreed
    print(f"{request.node.callspec.id}: {num_compared} of {len(rows) * NUM_GREEDY} ids compared")
    assert num_compared >= len(rows) * NUM_GREEDY // 2


def test_every_weight_is_read_once_a_step(pair):
    _, decoder = pair
    before = [linear.num_reads for linear in decoder.linears()]

    step(decoder, DenseBackend(decoder.config), prompts(TINY["vocab_size"]), list(PROMPT_LENS))

    assert [x.num_reads - n for x, n in zip(decoder.linears(), before, strict=True)] == [1] * len(
        before
    )
    assert len(before) == 4 * TINY["num_hidden_layers"] + 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_16_bit_loads_hold_the_rounded_weights(case, dtype, tmp_path):
    model = make_model(case)
    torch_dtype = getattr(torch, dtype)
    model.to(torch_dtype).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    config = parse_config(source)

    decoder = load_decoder(source, config, dtype)
    row = prompts(TINY["vocab_size"])[3]
    found = step(decoder, DenseBackend(decoder.config), [row], [len(row)], all_logits=True)

    assert config.checkpoint_dtype == dtype and decoder.dtype == torch_dtype
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(decoder.layers[1].qkv.weight, torch.cat([p.weight for p in parts]))
    with torch.no_grad():
        wanted = reloaded(tmp_path)(torch.tensor([row])).logits[0]
    error = (found - wanted).abs().max() / wanted.std()
    assert error < (0.03 if dtype == "float16" else 0.25)


def test_16_bit_checkpoint_in_float32_equals_transformers(tmp_path):
    make_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))

    decoder = load_decoder(source, parse_config(source), "float32")
    row = prompts(TINY["vocab_size"])[3]
    found = step(decoder, DenseBackend(decoder.config), [row], [len(row)], all_logits=True)

    with torch.no_grad():
        assert (found - reloaded(tmp_path)(torch.tensor([row])).logits[0]).abs().max() < 1e-4


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
