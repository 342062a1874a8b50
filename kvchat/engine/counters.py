"""What the scheduler counts for /stats and the reports."""

from __future__ import annotations

from dataclasses import dataclass

from kvchat.engine.request import Batch


@dataclass(slots=True)
class SchedulerCounters:
    """Counted since the start. A decode row computes one token that was sampled before."""

    num_steps: int = 0
    num_decode_steps: int = 0  # with at least one decode row
    num_decode_rows: int = 0
    num_scheduled_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0  # of prompts, not computed again
    num_preemptions: int = 0
    num_drops: int = 0  # idle sessions that gave up their blocks to others
    num_recomputed_tokens: int = 0  # kept by a fork or undo, given up with the compressed span cut

    def count_step(self, batch: Batch) -> None:
        """Count a step that was scheduled."""
        num_decodes = sum(
            row.num_tokens == 1 and row.start >= row.request.num_prompt_tokens for row in batch.rows
        )
        self.num_steps += 1
        self.num_decode_steps += num_decodes > 0
        self.num_decode_rows += num_decodes
        self.num_scheduled_tokens += batch.num_tokens
