"""What `scripts/compare` runs: kvchat, transformers and llama.cpp on the same work, in turns."""
