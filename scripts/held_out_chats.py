"""Held-out persona chats as JSON lines on stdout: the text for `kvchat probe --text FILE.jsonl`.

python scripts/held_out_chats.py > build/held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo_model.corpus import persona_dialogues

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the published dialogues")
    for chat in persona_dialogues(parser.parse_args().data, "test"):
        if chat.source == "persona":
            messages = [{"role": turn.role, "content": turn.text} for turn in chat.turns]
            print(json.dumps({"messages": messages}))
