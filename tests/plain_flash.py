"""What attention/flash computes, in float32 and sequence by sequence: for machines without it."""

import torch


def plain_flash(q, k, v, chunks, scale, window):
    out = torch.full_like(q, float("nan"))  # what is padding
    group = q.shape[1] // k.shape[1]
    for idx, seq_len in enumerate(chunks.seq_lens.tolist()):
        rows = slice(*chunks.starts[idx : idx + 2].tolist())
        first = int(chunks.key_starts[idx])
        keys, values = (
            x[first : first + seq_len].float().repeat_interleave(group, 1) for x in (k, v)
        )
        queries = q[rows].float()
        scores = scale * torch.einsum("qhd,khd->hqk", queries, keys)
        at = torch.arange(seq_len)
        places = at[seq_len - queries.shape[0] :, None]
        is_seen = (at <= places) & (at > places - (window or seq_len))
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(dim=2)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
