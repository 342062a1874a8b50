#!/usr/bin/env python3
"""Makes the chat model that ships with kvchat. Each step is a command:

corpus      encode the published dialogues with the model's tokenizer
tokenizer   train a new tokenizer first (the shipped weights need the shipped one)
train       run one stage: short, middle, long, final, each resuming from the one before
export      write the model's folder from a checkpoint
evaluate    print every figure of the model card
agree       the same recall items through kvchat's pool and through transformers
transcripts the card's conversations, held in kvchat
chats       short hand-made chats, held in kvchat and judged

  python scripts/train_demo_model.py corpus
  python scripts/train_demo_model.py train --stage short
  python scripts/train_demo_model.py train --stage middle --resume build/demo_model/short
  python scripts/train_demo_model.py export --weights build/demo_model/final
  python scripts/train_demo_model.py evaluate
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "sprout"
BUILD = ROOT / "build" / "demo_model"


def _corpus(args: argparse.Namespace) -> None:
    from demo_model.prepare import encode_corpus

    encode_corpus(args.data, args.model / "tokenizer.model", args.dialogues, _held_out(args))


def _tokenizer(args: argparse.Namespace) -> None:
    from demo_model.prepare import make_tokenizer

    make_tokenizer(args.data, args.model / "tokenizer.model", args.seed)


def _held_out(args: argparse.Namespace) -> Path:
    return args.dialogues.with_name("held_out.npz")


def _train(args: argparse.Namespace) -> None:
    from demo_model.llama import LlamaConfig
    from demo_model.training import STAGES, Run, Trainer, scaled

    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        tokenizer=args.model / "tokenizer.model",
        dialogues=args.dialogues,
        out=args.out,
        seed=args.seed,
        num_workers=args.workers,
        minutes=args.minutes,
        stop_answer_loss=args.stop_answer_loss,
        config=LlamaConfig.micro() if args.micro else LlamaConfig(),
        resume=args.resume,
        has_compile=not args.micro,
    )
    Trainer(scaled(STAGES[args.stage], args.steps, args.rows), run).train()


def _export(args: argparse.Namespace) -> None:
    from demo_model.export import export
    from demo_model.llama import LlamaConfig
    from demo_model.training import load_weights

    export(load_weights(args.weights), LlamaConfig(), args.model)
    print(f"{args.model}: {sum(file.stat().st_size for file in args.model.iterdir()) / 1e6:.1f} MB")


def _evaluate(args: argparse.Namespace) -> None:
    from demo_model.evaluate import Material, evaluate, wrong_answers

    material = Material(
        args.model, args.data, args.dialogues, _held_out(args), args.seed, args.items, args.workers
    )
    figures = evaluate(material)
    args.figures.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.wrong:
        wrong_answers(material, args.wrong)


def _agree(args: argparse.Namespace) -> None:
    from demo_model.compare import has_same_ids, largest_difference
    from demo_model.through_kvchat import compare_recall

    print(f"plain model and transformers: logits within {largest_difference(args.model, 700):.1e},")
    print(f"ids of a rendered chat equal: {has_same_ids(args.model)}\n")
    compare_recall(args.model, _held_out(args), args.items, args.workers)


def _transcripts(args: argparse.Namespace) -> None:
    from demo_model.through_kvchat import transcripts

    print(transcripts(args.model, args.model / "transcript_turns.json", range(1, 11)))


def _chats(args: argparse.Namespace) -> None:
    from demo_model.through_kvchat import short_chats

    print(short_chats(args.model, args.model / "short_chats.json"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="the published dialogues"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="the model's folder")
    parser.add_argument(
        "--dialogues", type=Path, default=BUILD / "dialogues.npz", help="the encoded dialogues"
    )
    parser.add_argument("--seed", type=int, default=1)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("corpus", help="encode the dialogues").set_defaults(run=_corpus)
    commands.add_parser("tokenizer", help="train a new tokenizer").set_defaults(run=_tokenizer)
    _add_train(commands.add_parser("train", help="run one stage"))
    exporter = commands.add_parser("export", help="write the model's folder from a checkpoint")
    exporter.set_defaults(run=_export)
    exporter.add_argument(
        "--weights", type=Path, required=True, help="a checkpoint, or the common name of its parts"
    )
    _add_evaluate(commands.add_parser("evaluate", help="print every figure of the model card"))
    agree = commands.add_parser("agree", help="compare kvchat's answers with transformers'")
    agree.set_defaults(run=_agree)
    agree.add_argument("--items", type=int, default=100, help="recall items per distance")
    agree.add_argument("--workers", type=int, default=2, help="processes that write items")
    talk = commands.add_parser("transcripts", help="hold the card's conversations in kvchat")
    talk.set_defaults(run=_transcripts)
    chats = commands.add_parser(
        "chats", help="hold short hand-made chats in kvchat, judge the ends"
    )
    chats.set_defaults(run=_chats)
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_evaluate)
    parser.add_argument("--items", type=int, default=1000, help="recall items per distance")
    parser.add_argument("--workers", type=int, default=2, help="processes that write items")
    parser.add_argument(
        "--figures", type=Path, default=BUILD / "figures.json", help="where the figures go as JSON"
    )
    parser.add_argument("--wrong", type=int, default=0, help="also print this many wrong answers")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train)
    parser.add_argument("--stage", required=True, choices=["short", "middle", "long", "final"])
    parser.add_argument("--out", type=Path, default=BUILD, help="where checkpoints go")
    parser.add_argument("--resume", type=Path, help="a checkpoint, or the common name of its parts")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop and save after this time")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--rows", type=int, help="instead of the stage's own number")
    parser.add_argument("--workers", type=int, default=14, help="processes that write data")
    parser.add_argument(
        "--stop-answer-loss", type=float, help="give up at minute 3 above this loss on the answers"
    )
    parser.add_argument(
        "--micro", action="store_true", help="a tiny model for a smoke run on a CPU"
    )


if __name__ == "__main__":
    arguments = _parser().parse_args()
    arguments.run(arguments)
