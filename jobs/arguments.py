"""The commands' texts and arguments. Imports nothing: the command line is read before anything is.

Of each text the first line says what the command does, in the list of commands too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SPEC = """\
The spec is read from the path given, else from $LORAJOB_SPEC, else from /etc/lorajob/spec.yaml; `-`
is standard input. Any field can be set from the environment, over what the file says:
  LORAJOB__TRAIN__LEARNING_RATE=1e-4
"""

ALL_CODES = """\
exit codes: 0 done   2 the spec is wrong   3 the data is wrong   4 not there, or not allowed
            5 does not fit   6 the result failed its verification   10 a service failed
            20 stopped from outside, a checkpoint is safe   1 a bug
"""

MAIN = """\
Fine-tune a language model as one batch job, and prove that the result works.

  lorajob check my-run.yaml      will it work? everything that can be known without training
  lorajob run my-run.yaml        do it; start it again to go on where it ended
  lorajob chat runs/my-run       talk to what came out
"""

RUN = """\
Do the whole job (the default).

Reads the spec, the base model and the data. Trains, merges, makes GGUF files, verifies all of it, and
only then sends it to the places in `publish`. Everything is in WORK/NAME:
  adapter/ merged/ gguf/         the results, each where the spec asks for it
  report/report.html             how it went; README.md is the model card
  logs/run.jsonl                 every event; also TensorBoard's files
  manifest.json                  written last: what went in, and every file with its sha256

Start the same again to go on: stages whose inputs are the same are not done again, and training goes
on at its newest checkpoint. SIGTERM and Ctrl-C end it, with a checkpoint where training has begun.

  lorajob run my-run.yaml
  lorajob my-run.yaml --work /scratch/runs --log json > events.jsonl
  LORAJOB__TRAIN__EPOCHS=3 lorajob run my-run.yaml
  cat my-run.yaml | lorajob run -
"""
RUN_CODES = (
    ALL_CODES
    + """\
            143, 130 stopped by SIGTERM or Ctrl-C before there was anything to keep
Run it again after 10, 20, 130 and 143; the others stay until something is changed.
"""
)

CHECK = """\
Find out everything that can be known without training.

Reads the spec, the base's configuration and tokenizer, and all of the data; fetches no weights. Says
how the rows were read and labelled, what is too long or unusable, what training takes of a GPU's
memory (of the card in this machine, or of `limits.gpu`), what will be fetched and sent, and whether
every place in `publish` can be written. It leaves the labelled data in WORK/NAME, where `run` takes
them, and nothing in the places.

  lorajob check my-run.yaml
  lorajob check my-run.yaml --rows 5                    what is trained of five rows, in green
  lorajob check my-run.yaml --format json | jq .rows    for scripts: text, token ids, spans
  LORAJOB__LIMITS__GPU=L4 lorajob check my-run.yaml     does it fit an L4?
"""
CHECK_CODES = """\
exit codes: 0 it can run   2 the spec is wrong   3 the data is wrong   4 not there, or not allowed
            5 does not fit   10 a service failed   1 a bug
"""

EXPORT = """\
Make everything from an adapter that is there.

An adapter, made by a run or by any other program that saves peft's LoRA, becomes merged weights, GGUF
files, a model card and a Modelfile; all of it is verified as a run verifies its own. Nothing is trained.

  lorajob export my-run.yaml --gguf q5_k_m        a run's adapter, with its data
  lorajob export --adapter runs/bot --out bot-gguf --gguf q4_k_m,q8_0
  lorajob export --adapter ./lora --base owner/model@revision --load-in 4bit --out out --data chats.jsonl

Without --base the adapter's own files say which base it is for. Without --data everything is measured
with a few general questions; with the data that it was trained for, the figures say more.
"""

CHAT = """\
Talk to base, adapter, merged model or GGUF.

Of a run's folder it talks to the merged model, else to the adapter on its base, else to a GGUF file;
--side-by-side asks several of them the same. A folder with a model, an adapter's folder and a GGUF file
of any origin can be talked to as well. Nothing is written.

  lorajob chat runs/demo
  lorajob chat runs/demo --side-by-side base,adapter,q4_k_m
  lorajob chat runs/demo --side-by-side base,merged --prompts questions.txt
  lorajob chat model-Q4_K_M.gguf --system "You are brief." --temperature 0.3

While talking: /system TEXT sets the system prompt, /reset forgets the conversation, /quit ends (so does
the end of the input); Ctrl-C ends an answer, and at the prompt the program.
"""
CHAT_CODES = """\
exit codes: 0 done   2 an option is wrong   3 --prompts holds no questions, or wrong ones
            4 not there, or not allowed   5 does not fit   10 a service failed   1 a bug
"""

REPORT = """\
Make a run's report.html anew, from report.json beside it.

Reads FOLDER/report/report.json alone, so neither weights nor data are needed; writes report.html and
the loss curve's pictures beside it, and prints the page's path.

  lorajob report runs/my-run
  lorajob report downloaded/my-run && xdg-open downloaded/my-run/report/report.html
"""
REPORT_CODES = "exit codes: 0 done   4 there is no report of this version   1 a bug\n"

SCHEMA = """\
Print the spec's JSON schema.

Every field with its type, its default and what it means. An editor that knows YAML completes and
checks a spec with it:

  lorajob schema > lorajob.schema.json
  # yaml-language-server: $schema=lorajob.schema.json      the spec's first line
"""

TOOLS = """\
Build llama.cpp now instead of when it is first needed.

Fetches its pinned source by pip, compiles it for this machine (a C++ compiler is needed; about a
minute on two cores) and keeps it in $LORAJOB_CACHE (default: ~/.cache/lorajob). Is it there already,
that is said and nothing done. On a closed network LORAJOB_LLAMA_CPP_SDIST names the source's archive.

  lorajob tools
  LORAJOB_CACHE=/shared/cache lorajob tools
"""
TOOLS_CODES = """\
exit codes: 0 it is there   4 a compiler is missing, or the source is another one
            10 the source could not be fetched   1 a bug
"""

COMPLETION = """\
Print a script that makes a shell complete commands, options and files.

  bash    eval "$(lorajob completion bash)"          in ~/.bashrc
  zsh     eval "$(lorajob completion zsh)"           in ~/.zshrc, after compinit
  fish    lorajob completion fish | source           in ~/.config/fish/config.fish

It completes after the word lorajob. Where that is no program yet, a function makes it one:
  PATH=/path/to/checkout/.venv/bin:$PATH
"""


def add_spec_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", metavar="SPEC", help="the spec's path, or - for standard input"
    )


def add_work_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", default=Path(os.environ.get("LORAJOB_WORK") or "runs"),
        help="where runs are kept, each in a folder of its name ($LORAJOB_WORK; default: runs)",
    )  # fmt: skip


def add_log_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log", choices=("auto", "json", "terminal"), default="auto",
        help="what is printed: bars for a terminal, JSON lines for a pipe (default: auto)",
    )  # fmt: skip


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="for people, or for scripts"
    )
    parser.add_argument(
        "--rows", type=int, default=1, metavar="N",
        help="show the first N rows as they are trained (default: 1)",
    )  # fmt: skip


def add_report_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER",
        help="the run's folder, or a copy of what it published",
    )  # fmt: skip


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", metavar="SPEC",
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
    parser.add_argument(
        "--name", metavar="NAME", help="what files are called after (default: the folder's name)"
    )
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
        help="a folder, s3://... or hub://owner/name; may be repeated (default: nowhere)",
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
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of what is drawn (default: 0)"
    )
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
