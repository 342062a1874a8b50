"""A tiny random chat model in a folder: `python tests/tiny_model.py FOLDER`, or write_tiny_model().

Weights are noise from a seed; the tokenizer is a real sentencepiece model with role markers, so
that loading, templates and streaming run as with any other model.
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "hello there, how are you today? I am fine, thank you.",
    "one two three four five six seven eight nine ten",
    "a chat runtime keeps many chats alive in one paged pool of memory",
)
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(vocab_size: int = 340) -> bytes:
    """A serialised sentencepiece BPE model: byte fallback, the markers as CONTROL pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        control_symbols=list(MARKERS),
        minloglevel=2,
    )
    return model.getvalue()


def _weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        base = f"model.layers.{i}"
        shapes |= {
            f"{base}.self_attn.q_proj.weight": (q, hidden),
            f"{base}.self_attn.k_proj.weight": (kv, hidden),
            f"{base}.self_attn.v_proj.weight": (kv, hidden),
            f"{base}.self_attn.o_proj.weight": (hidden, q),
            f"{base}.mlp.gate_proj.weight": (ffn, hidden),
            f"{base}.mlp.up_proj.weight": (ffn, hidden),
            f"{base}.mlp.down_proj.weight": (hidden, ffn),
        }
    made = {n: torch.randn(s, generator=generator) * s[-1] ** -0.5 for n, s in shapes.items()}
    norms = ["model.norm.weight"]
    for i in range(config["num_hidden_layers"]):
        norms += [
            f"model.layers.{i}.input_layernorm.weight",
            f"model.layers.{i}.post_attention_layernorm.weight",
        ]
    return made | {name: torch.ones(hidden) for name in norms}


def write_tiny_model(folder: Path, seed: int = 0, max_position: int = 512) -> Path:
    """Write config, weights, tokenizer and template into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": pieces.get_piece_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.piece_to_id("<|end|>"),
        "torch_dtype": "float32",
    }
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "config.json").write_text(json.dumps(config))
    texts = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    return folder


if __name__ == "__main__":
    write_tiny_model(Path(sys.argv[1]))
