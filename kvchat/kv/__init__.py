"""The memory: who owns which block (block_pool) and the tensors they name (cache)."""
