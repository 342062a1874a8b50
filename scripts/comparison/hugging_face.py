"""transformers' side: `generate`, greedy, the chats as one batch, its dynamic cache."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import torch

from comparison.ours import Prompts, draw_prompts
from comparison.table import Missing, Sample, Shape, Timed
from kvchat.config import ModelConfig
from kvchat.errors import UsageError


def is_installed() -> bool:
    """Whether transformers can be imported."""
    return importlib.util.find_spec("transformers") is not None


def write_checkpoint(config: ModelConfig, folder: Path, dtype: str) -> None:
    """A checkpoint of this shape with weights from a seed, for every program to read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.family != "llama" or config.rope_scaling is not None:
        raise UsageError("--shape: only Llamas without RoPE scaling; give a model with -m")
    _hide_bars()
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    made.to(getattr(torch, dtype)).save_pretrained(folder)


def _hide_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


class Transformers:
    """One model for all shapes. `replies` are those of the last run."""

    def __init__(self, folder: Path, dtype: str, device: str, vocab: range) -> None:
        self.replies: Prompts = []
        self._vocab, self._device = vocab, device
        if not is_installed():
            self._model = None
            return
        from transformers import AutoModelForCausalLM

        _hide_bars()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = loaded.to(device).eval()
        settings = self._model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0

    def run(self, shape: Shape, pair: int) -> Sample:
        """All prompts are of one length, so nothing is padded."""
        if self._model is None:
            raise Missing("not installed (pip install 'kvchat[compare]')")
        prompts = torch.tensor(draw_prompts(shape, pair, self._vocab), device=self._device)
        first_s: list[float] = []

        def look(input_ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
            """Asked after each token of all; the first one is timed."""
            if not first_s:
                self._wait()
                first_s.append(time.perf_counter() - started)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        self._wait()
        started = time.perf_counter()
        with torch.inference_mode():
            found = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=shape.num_reply,
                do_sample=False,
                stopping_criteria=[look],
            )
        self._wait()
        whole_s = time.perf_counter() - started
        self.replies = found[:, shape.num_prompt :].tolist()
        assert {len(ids) for ids in self.replies} == {shape.num_reply}, "a reply ended early"
        return Timed(first_s[0], whole_s, shape.num_sessions).sample(shape)

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()
