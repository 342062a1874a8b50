"""The model's folder as transformers and kvchat read it: bfloat16 weights, configuration, tokenizer
settings."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .llama import Llama, LlamaConfig
from .tokens import BOS, END, ROLE_MARKERS, Encoder

# Plain on purpose: marker, content, end of turn. A history is always a prefix of the next turn's
# rendering.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ROLE_MARKERS["assistant"] + "' }}{% endif %}"
)
TEMPERATURE, TOP_P = 0.6, 0.9


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config(config: LlamaConfig, encoder: Encoder) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": encoder.bos,
        "eos_token_id": encoder.end,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def tokenizer_config(encoder: Encoder, config: LlamaConfig) -> dict:
    pieces = {0: "<unk>", encoder.bos: BOS, encoder.end: END}
    pieces |= {encoder.markers[role]: marker for role, marker in ROLE_MARKERS.items()}
    added = {
        str(i): {
            "content": piece,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, piece in sorted(pieces.items())
    }
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "eos_token": END,
        "unk_token": "<unk>",
        "pad_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": config.max_position_embeddings,
        "sp_model_kwargs": {},
    }


def generation_config(encoder: Encoder) -> dict:
    return {
        "bos_token_id": encoder.bos,
        "eos_token_id": [encoder.end],
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "max_new_tokens": 400,
    }


def export(weights: dict[str, torch.Tensor], config: LlamaConfig, folder: Path) -> None:
    """Needs the tokenizer in place. The output embedding is the input's and is not stored twice."""
    encoder = Encoder(folder / "tokenizer.model")
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(rounded, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_json(folder / "config.json", model_config(config, encoder))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(encoder, config))
    _write_json(folder / "generation_config.json", generation_config(encoder))


def load_exported(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    model = Llama(LlamaConfig.from_json(folder / "config.json"))
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.to(device=device, dtype=dtype).eval()
