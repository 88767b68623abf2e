"""Write what the demo's base should still know afterwards, and some of what it learned from.

data/retention.jsonl   conversations of corpus.py that the base was not trained on, to measure with
data/replay.jsonl      conversations that it was trained on, to mix into another training
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import corpus
from make_base import TRAINED_CONVERSATIONS, TRAINED_SEED

HELD_OUT_SEED = 2
RETAINED, REPLAYED = 36, 160


def said(messages: list[corpus.Message]) -> int:
    """The same for two conversations that differ in nothing but the system prompt."""
    return hash(tuple(m["content"] for m in messages if m["role"] != "system"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    data = parser.parse_args().out / "data"
    data.mkdir(parents=True, exist_ok=True)
    trained = {said(m) for m in corpus.conversations(TRAINED_CONVERSATIONS, TRAINED_SEED)}
    retained = [
        messages
        for messages in corpus.conversations(10 * RETAINED, HELD_OUT_SEED)
        if said(messages) not in trained
    ]
    files = {
        "retention.jsonl": retained[:RETAINED],
        "replay.jsonl": corpus.conversations(REPLAYED, TRAINED_SEED),
    }
    for name, talks in files.items():
        lines = (json.dumps({"messages": messages}) + "\n" for messages in talks)
        (data / name).write_text("".join(lines))


if __name__ == "__main__":
    main()
