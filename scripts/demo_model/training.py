"""The training loop: stages of one length each, checkpoints that fit through a small door, progress
lines."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batches, Feed
from .generator import Mix
from .llama import Llama, LlamaConfig, rotary_tables
from .muon import Muon
from .tokens import VALUE_LOSS, WEIGHT_UNIT

PART_BYTES = 15 * 1024 * 1024  # checkpoints travel in parts of this size
REPORT_STEPS = 20
SAVE_SECONDS = 100
MUON_LR, ADAM_LR = 0.02, 0.003


@dataclass(frozen=True)
class Stage:
    name: str
    length: int
    rows: int
    steps: int
    lr_start: float  # share of the peak rates
    lr_end: float
    passes: dict[str, int] = field(default_factory=dict)
    long_share: float = 0.7
    mix: Mix = field(default_factory=Mix)
    warmup_steps: int = 60


def _passes(persona: int, pair: int, booking: int) -> dict[str, int]:
    return {
        "persona": persona,
        "pair": pair,
        "program": pair,
        "booking": booking,
        "coffee": booking,
    }


# Each real dialogue is learned at most 6 times over all stages. A persona pass takes a chat from
# both sides of the table, and
# a pair pass takes its single replies: 2 x 2 + 2.
STAGES = {
    "short": Stage(
        "short", 512, 256, 400, 1.0, 1.0, _passes(0, 0, 1), 0.7, Mix(tokens_per_fact=75)
    ),
    "middle": Stage(
        "middle", 1024, 128, 500, 1.0, 1.0, _passes(0, 0, 1), 0.7, Mix(tokens_per_fact=90)
    ),
    "long": Stage(
        "long", 4096, 64, 1600, 1.0, 0.6, _passes(1, 1, 2), 0.8, Mix(tokens_per_fact=140)
    ),
    "final": Stage(
        "final", 4096, 64, 2300, 0.6, 0.0, _passes(1, 1, 2), 0.7, Mix(tokens_per_fact=140)
    ),
}


@dataclass(frozen=True)
class Run:
    """Where a stage reads and writes, and when it must stop."""

    tokenizer: Path
    dialogues: Path
    out: Path
    seed: int
    num_workers: int
    minutes: float
    stop_minute: float = 3.0
    stop_answer_loss: float | None = (
        None  # give up if the answers' loss is above this at stop_minute
    )
    config: LlamaConfig = field(default_factory=LlamaConfig)
    resume: Path | None = None
    has_compile: bool = True  # on a GPU


def make_optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    is_cuda = others[0].is_cuda
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=is_cuda)
    return [Muon(matrices, lr=MUON_LR), adam]


def weighted_loss(
    model: Llama, ids: Tensor, weights: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss over learned tokens; and [sum of loss, number right, number] over values to remember."""
    dtype = torch.bfloat16 if ids.is_cuda else torch.float32
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids[:, :-1], tables, dtype).flatten(0, 1)
    targets, weights = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    is_value = (weights == VALUE_LOSS).float()
    shares = weights.float() / WEIGHT_UNIT
    is_right = (logits.argmax(-1) == targets).float()
    answers = torch.stack(
        ((losses.detach() * is_value).sum(), (is_right * is_value).sum(), is_value.sum())
    )
    return (losses * shares).sum() / shares.sum(), answers


def rate(stage: Stage, step: int, first_step: int) -> float:
    """Share of the peak rates: a line from start to end, and a warm-up wherever moments are new."""
    warm = min(1.0, (step - first_step + 1) / stage.warmup_steps)
    return warm * (stage.lr_start + (stage.lr_end - stage.lr_start) * step / stage.steps)


def save_parts(model: Llama, folder: Path, name: str, step: int) -> None:
    """The weights in float32, cut into numbered parts; a cut run leaves the last whole set."""
    whole = folder / f"{name}.tmp"
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, whole)
    data = whole.read_bytes()
    for i in range(0, len(data), PART_BYTES):
        (folder / f"{name}.part{i // PART_BYTES}").write_bytes(data[i : i + PART_BYTES])
    whole.unlink()
    (folder / f"{name}.step").write_text(f"{step}\n", encoding="utf-8")


def finished_steps(stage: Stage, resume: Path | None) -> int:
    """Steps of this very stage that the checkpoint already has: 0 when it comes from another."""
    if resume is None or resume.name != stage.name:
        return 0
    return int(resume.with_suffix(".step").read_text(encoding="utf-8"))


def load_weights(path: Path) -> dict[str, Tensor]:
    """From `path` itself, or from its parts `path.part0`, ..."""
    if path.exists():
        return torch.load(path, map_location="cpu", weights_only=True)
    joined = path.with_suffix(".joined")
    joined.write_bytes(
        b"".join(part.read_bytes() for part in sorted(path.parent.glob(path.name + ".part*")))
    )
    return torch.load(joined, map_location="cpu", weights_only=True)


def _tensors(batches: Batches, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for ids, weights in batches:
        pair = torch.from_numpy(ids.astype("int32")), torch.from_numpy(weights)
        yield tuple(
            t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
            for t in pair
        )  # type: ignore[misc]


class Trainer:
    def __init__(self, stage: Stage, run: Run) -> None:
        self.stage, self.run = stage, run
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(run.seed)
        self.model = Llama(run.config).to(self.device)
        if run.resume:
            self.model.load_state_dict(load_weights(run.resume))
        self.optimizers = make_optimizers(self.model)
        self.tables = rotary_tables(run.config, stage.length, self.device)
        self.loss = weighted_loss
        if run.has_compile and self.device.type == "cuda":
            self.loss = torch.compile(weighted_loss)
        self.recent = torch.zeros(3, device=self.device)
        self.first_step = finished_steps(stage, run.resume)

    def train(self) -> bool:
        """Runs the stage; False when it gave up because recall had not appeared."""
        batches = Batches(self._feed(), self.run.num_workers)
        try:
            return self._train(_tensors(batches, self.device))
        finally:
            batches.close()

    def _train(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        stage, run = self.stage, self.run
        started = saved = time.monotonic()
        for step, (ids, weights) in enumerate(batches, self.first_step):
            loss = self._step(ids, weights, step)
            now = time.monotonic()
            minutes = (now - started) / 60
            is_last = step + 1 >= stage.steps or minutes > run.minutes
            if step % REPORT_STEPS == 0 or is_last:
                answer_loss = self._report(step, loss, minutes)
                if self._is_hopeless(answer_loss, minutes):
                    return False
            if is_last or now - saved > SAVE_SECONDS:
                save_parts(self.model, run.out, stage.name, step + 1)
                saved = now
            if is_last:
                break
        return True

    def _feed(self) -> Feed:
        stage, run = self.stage, self.run
        return Feed(
            tokenizer=run.tokenizer,
            dialogues=run.dialogues,
            length=stage.length,
            rows=stage.rows,
            num_batches=stage.steps,
            first_batch=self.first_step,
            long_share=stage.long_share,
            mix=stage.mix,
            passes=stage.passes,
            seed=run.seed,
        )

    def _step(self, ids: Tensor, weights: Tensor, step: int) -> Tensor:
        share = rate(self.stage, step, self.first_step)
        loss, answers = self.loss(self.model, ids.long(), weights, self.tables)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.recent += answers
        return loss.detach()

    def _report(self, step: int, loss: Tensor, minutes: float) -> float:
        total, right, count = self.recent.tolist()
        self.recent.zero_()
        millions = (step + 1 - self.first_step) * self.stage.rows * self.stage.length / 1e6
        answer_loss = total / max(count, 1)
        print(
            f"{self.stage.name} step {step}/{self.stage.steps} min {minutes:.2f} "
            f"loss {loss.item():.3f} answers {answer_loss:.3f} right {right / max(count, 1):.3f} "
            f"tokens {millions:.0f}M {millions / max(minutes, 1e-6) / 60:.2f}M/s",
            flush=True,
        )
        return answer_loss

    def _is_hopeless(self, answer_loss: float, minutes: float) -> bool:
        limit = self.run.stop_answer_loss
        if limit is None or minutes < self.run.stop_minute or answer_loss < limit:
            return False
        print(f"gave up: answers {answer_loss:.2f} > {limit} at minute {minutes:.1f}", flush=True)
        return True


def scaled(stage: Stage, steps: int | None, rows: int | None) -> Stage:
    return replace(stage, steps=steps or stage.steps, rows=rows or stage.rows)
