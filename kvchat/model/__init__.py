"""Weights and the decoder: config.json -> ModelConfig, safetensors -> tensors, tokens -> logits."""
