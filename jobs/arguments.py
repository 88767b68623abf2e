"""The arguments of `export` and `chat`. Imports nothing: the command line is read before anything is."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPORT = """\
An adapter, made by a run or by any other program that saves peft's LoRA, becomes merged weights, GGUF
files, a model card and a Modelfile; all of it is verified as a run verifies its own. Nothing is trained.

  lorajob export my-run.yaml --gguf q5_k_m        a run's adapter, with its data and its publish
  lorajob export --adapter runs/bot --out bot-gguf --gguf q4_k_m,q8_0
  lorajob export --adapter ./lora --base owner/model@revision --load-in 4bit --out out --data chats.jsonl

Without --base the adapter's own files say which base it is for. Without --data everything is measured
with a few general questions; with the data that it was trained for, the figures say more.
"""

CHAT = """\
Of a run's folder it talks to the merged model, else to the adapter on its base, else to a GGUF file;
--side-by-side asks several of them the same. A folder with a model, an adapter's folder and a GGUF file
of any origin can be talked to as well.

  lorajob chat runs/demo
  lorajob chat runs/demo --side-by-side base,adapter,q4_k_m
  lorajob chat runs/demo --side-by-side base,merged --prompts questions.txt
  lorajob chat model-Q4_K_M.gguf --system "You are brief." --temperature 0.3

While talking: /system TEXT sets the system prompt, /reset forgets the conversation, /quit ends (so does
the end of the input); Ctrl-C ends an answer, and at the prompt the program.
"""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?",
        help="a run's spec: its adapter is exported, and what is not said here is taken from it",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="the adapter, or a folder of a run"
    )
    parser.add_argument(
        "--base", metavar="MODEL",
        help="the base: a folder, owner/name[@revision] or s3://... (default: what the adapter names)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="where the results go (default with a spec: exports/NAME)",
    )  # fmt: skip
    parser.add_argument("--name", help="what files are called after (default: the folder's name)")
    parser.add_argument(
        "--load-in", choices=("4bit", "8bit", "16bit"),
        help="how the base was held while the adapter was trained (default: 16bit, or what its run "
        "says)",
    )  # fmt: skip
    parser.add_argument(
        "--merged", choices=("16bit", "4bit", "none"), help="merged weights (default: 16bit)"
    )
    parser.add_argument("--gguf", metavar="TYPES", help="GGUF files: q4_k_m,q8_0,...")
    parser.add_argument(
        "--imatrix",
        action="store_true",
        help="quantize with an importance matrix, made with --data",
    )
    parser.add_argument(
        "--adapter-gguf", action="store_true", help="the adapter alone as a GGUF file, too"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="conversations to verify with; may be repeated",
    )
    parser.add_argument(
        "--template", metavar="TEMPLATE",
        help="the chat template: a family's name, a .jinja file, a prompt format, or auto for the "
        "base's own (default: the one beside the adapter, else the base's)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="an answer that has not stopped by then fails",
    )
    parser.add_argument(
        "--publish", action="append", metavar="PLACE",
        help="a folder, s3://... or hub://owner/name; may be repeated (default: the spec's)",
    )  # fmt: skip


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place", type=Path, metavar="FOLDER|MODEL.gguf",
        help="a run's folder, a model's, an adapter's, or a GGUF file",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="MODEL",
        help="the base: a folder, owner/name[@revision] or s3://... (default: what the run or the "
        "adapter names)",
    )  # fmt: skip
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="another adapter to use")
    parser.add_argument(
        "--load-in", choices=("4bit", "8bit", "16bit"),
        help="how base and adapter are held (default: as in the run, else 16bit)",
    )  # fmt: skip
    parser.add_argument(
        "--side-by-side", metavar="NAMES",
        help="what is asked, by names: base, adapter, merged, and types of GGUF files: q4_k_m, ...",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--temperature", type=float, metavar="T",
        help="0 takes the likeliest token each time (default: 0.7, and 0 with --prompts)",
    )  # fmt: skip
    parser.add_argument(
        "--min-p", type=float, default=0.1, metavar="P",
        help="leave out tokens less likely than P times the likeliest one (default: 0.1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: 0)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N",
        help="the longest answer, in tokens (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="ask these and end: one a line, or JSON lines with `prompt` and `system`, or `messages`",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("text", "json"), default="text",
        help="with --prompts: a table for people, or JSON for scripts",
    )  # fmt: skip
