"""Which tokens are trained: ours, TRL's assistant_only_loss and unsloth's train_on_responses_only.

    PYTHONPATH=SITE .venv/bin/python -m bench.labels        writes bench/results/labels.md

SITE is a folder with unsloth_zoo in it, where the virtual environment has none:
`pip install --no-deps --target SITE unsloth==2026.10.9 unsloth_zoo==2026.10.9`. All chat templates of
llama.cpp (`make tools`) times the conversations of tests/data/cases.py whose every answer is trained.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import platform
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.data.conversation import BadRow
from jobs.data.labels import label
from jobs.data.tokenizer import ChatTokenizer
from tests.data.cases import (
    DEMO,
    REAL,
    SHARED,
    Case,
    Expected,
    Render,
    cases_for,
    ends_of,
    expectation,
    find_templates,
    renderer,
    spans_of,
    tokenizer_of,
)

RESULT = Path(__file__).parent / "results" / "labels.md"

EXACT, REFUSED = "exact", "refused or error"
OPENER = "exact, but for a `<think>` or `</think>` that the prompt writes"
LOST = "exact, but reasoning, a call or a turn is silently missing"
# Wrong, the worst first.
WRONG = (
    "nothing trained",
    "an answer or part of it not trained",
    "prompt, other role or text after the end trained",
    "end-of-turn lost",
    "newline after trained",
)
KINDS = (EXACT, OPENER, LOST, *WRONG, REFUSED)
SHORT = {
    OPENER: "think tag trained",
    LOST: "text missing",
    WRONG[1]: "answer not trained",
    WRONG[2]: "too much trained",
}
PEERS = ("ours", "TRL", "unsloth")

# Of each reason for which ours refuses a row: whether exact labels exist.
NO_ANSWER = "no: "
REASONS = (
    ("the chat template refuses it", NO_ANSWER + "nothing is rendered, by transformers neither"),
    ("leaves out the reasoning", NO_ANSWER + "the reasoning is not in the text, so the model would learn to "
     "answer without it. Some templates write it with a switch on, but then prompt otherwise too. Of Ministral-3: yes, "
     "were it handed over as a part of a list of contents"),
    ("repeats a turn of the", NO_ANSWER + "a turn that was said is not in the text"),
    ("repeats an assistant turn", NO_ANSWER + "the answer is not in the text, or stands there twice"),
    ("leaves out an assistant's tool calls", NO_ANSWER + "a call, or one of its arguments, is not in the text"),
    ("never learn to stop", NO_ANSWER + "there is no token to stop with"),
    ("opens or closes a reasoning otherwise", NO_ANSWER + "the prompt opens a reasoning that the turn does not "
     "have, or has closed the one that it has: what the model would have to write is not in the row"),
    ("before its tool calls", NO_ANSWER + "the model would stop before it calls"),
    ("in its own text", NO_ANSWER + "the model would stop in the middle. Of gpt-oss and Solar with reasoning: yes, if "
     "`<|end|>`, which ends both a part and an earlier turn there, were known not to stop the model"),
    ("middle of a token", "yes: but the SentencePiece tokenizer decodes a piece that begins there with a "
     "space more or less, so that its tokens are not proven"),
    ("in no way that can be known", NO_ANSWER + "the template takes no tool's result after a call, so its end is not known"),
    ("rewrites a turn", NO_ANSWER + "a text is changed, or a turn is written in two places"),
    ("ends an assistant turn twice", NO_ANSWER + "the model would stop at the first end"),
)  # fmt: skip
OTHER_REASON = "other"

Spans = list[str]


class Refusal(Exception):
    pass


def judge(got: Spans, want: list[Expected | None], case: Case, ends: tuple[str, ...]) -> str:
    if not got:
        return WRONG[0]
    known = [expected for expected in want if expected is not None]
    if len(known) == len(want) == len(got) and all(
        expected.holds_decoded(span) for expected, span in zip(known, got, strict=True)
    ):
        return LOST if lost(case, known[0].text) else EXACT
    if len(known) == len(want) == len(got) and all(
        expected.holds_decoded(without_opener(span))
        for expected, span in zip(known, got, strict=True)
    ):
        return OPENER
    if len(known) < len(want):  # a call or a turn is not in the text
        return LOST
    found = {
        fault([got[at]] if len(got) == len(known) else got, one, words(case.messages[index]))
        for at, (one, index) in enumerate(zip(known, case.trained, strict=True))
    }
    if len(got) > len(known):
        found.add(WRONG[2])
    return min(found - {EXACT}, key=KINDS.index, default=WRONG[2])


def without_opener(span: str) -> str:
    return re.sub(r"^\s*</?think>\n?", "", span)


def words(message: dict[str, Any]) -> str:
    """Something of the message that the model has to write."""
    text = str(message["content"] or "").split("</think>")[-1].strip()
    calls = message.get("tool_calls") or ()
    return text or next((str(call["function"]["name"]) for call in calls), thought(message))


def thought(message: dict[str, Any]) -> str:
    named = (message.get(field) for field in ("reasoning_content", "reasoning", "thinking"))
    return next((str(text) for text in named if text), "")


def fault(got: Spans, expected: Expected, core: str) -> str:
    if any(expected.holds_decoded(span) for span in got):
        return EXACT
    if any(
        expected.holds_decoded(form.rstrip())
        for span in got
        for form in (span, without_opener(span))
    ):
        return WRONG[4]
    bare = [re.sub("[ ▁]", "", span) for span in got]
    around = [span for span in bare if re.sub("[ ▁]", "", core) in span]
    if not around:
        return WRONG[1]
    # Of "Hi.<|END_TEXT|><|END_OF_TURN|>" the first token may be trained and the second one not.
    wanted = re.sub("[ ▁]", "", expected.text[expected.low : expected.end])
    return WRONG[3] if any(span.strip() in wanted for span in around) else WRONG[2]


def lost(case: Case, text: str) -> bool:
    """Whether something that was said is not in the text; of reasoning only the last one counts."""
    last = max(case.trained)
    said = [message["content"] or "" for message in case.messages]
    said.append(thought(case.messages[last]))
    parts = [part.strip() for whole in said for part in re.split("</?think>", whole)]
    plain = text.replace("\\n", "\n")  # a tool's result may be JSON
    return any(part and part not in plain for part in parts)


def ours(tokenizer: ChatTokenizer, _: Any, case: Case) -> tuple[Spans, Render, Case]:
    try:
        made = label(tokenizer, case.conversation, case.loss_on)
    except BadRow as reason:
        raise Refusal(str(reason)) from None
    spans = [tokenizer.text_of(made.input_ids[a:b]) for a, b in spans_of(made.labels)]
    render = renderer(tokenizer.template)
    return spans, render, case.as_rendered(render, made.text)


def hf_renderer(hf: Any, template: str | None) -> Render:
    def render(messages: Any, tools: Any, prompt: bool) -> str:
        return str(
            hf.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False,
                add_generation_prompt=prompt, chat_template=template,
            )
        )  # fmt: skip

    return render


def trl(tokenizer: ChatTokenizer, hf: Any, case: Case) -> tuple[Spans, Render, Case]:
    """As SFTTrainer prepares a row with assistant_only_loss."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = hf.chat_template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(hf)
        except ValueError:
            # The file may end with a newline that the model's own template does not have.
            hf.chat_template = hf.chat_template.rstrip("\n")
            template = get_training_chat_template(hf)
    made = hf.apply_chat_template(
        list(case.messages), tools=list(case.tools) or None, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True, chat_template=template,
    )  # fmt: skip
    ids, mask = made["input_ids"], made["assistant_masks"]
    if 1 not in mask:
        raise Refusal("no assistant tokens")  # SFTTrainer raises RuntimeError
    labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
    return [hf.decode(ids[a:b]) for a, b in spans_of(labels)], hf_renderer(hf, template), case


def unsloth_masking() -> Callable[..., Any] | None:
    """unsloth_zoo's function; its package itself wants a GPU when it is imported."""
    spec = importlib.util.find_spec("unsloth_zoo")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("dataset_utils.py")
    own = importlib.util.spec_from_file_location("unsloth_dataset_utils", file)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    function: Callable[..., Any] = module.train_on_responses_only
    return function


def unsloth(masking: Callable[..., Any]) -> Callable[..., tuple[Spans, Render, Case]]:
    """With the instruction and response part that unsloth itself finds in the template."""

    def made_by(tokenizer: ChatTokenizer, hf: Any, case: Case) -> tuple[Spans, Render, Case]:
        render = hf_renderer(hf, None)
        text = render(case.messages, case.tools, False)
        ids = hf(text, add_special_tokens=False).input_ids
        mask = masking(None, tokenizer=hf, return_function=True)
        labels = mask({"input_ids": [ids]})["labels"][0]
        return [hf.decode(ids[a:b]) for a, b in spans_of(labels)], render, case

    return made_by


def fast_tokenizer(tokenizer: ChatTokenizer, kept: dict[int, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    key = id(tokenizer.backend)
    if key not in kept:
        kept.clear()
        kept[key] = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    hf = kept[key]
    for name, value in tokenizer.special_tokens.items():
        setattr(hf, name, value)
    hf.chat_template = tokenizer.template.source
    return hf


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    templates = find_templates()
    if not templates:
        raise SystemExit("llama.cpp's templates are missing: `make tools`")
    peers: dict[str, Callable[..., tuple[Spans, Render, Case]]] = {"ours": ours}
    if importlib.util.find_spec("trl"):
        peers["TRL"] = trl
    masking = unsloth_masking()
    if masking:
        peers["unsloth"] = unsloth(masking)
    folders = [DEMO, *(SHARED / name for name in REAL if (SHARED / name).is_dir())]
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    why: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    reasons: Counter[str] = Counter()
    names: list[str] = []
    for folder in folders:
        kept: dict[int, Any] = {}
        for path in templates:
            tokenizer = tokenizer_of(folder, path)
            ends = ends_of(path.stem)
            cases = [case for case in cases_for(tokenizer) if not case.untrained]
            cases = [case for case in cases if case.loss_on == "responses"]
            names = [case.name for case in cases]
            for case in cases:
                for peer, made_by in peers.items():
                    hf = fast_tokenizer(tokenizer, kept)
                    try:
                        with contextlib.redirect_stdout(io.StringIO()):
                            spans, render, made = made_by(tokenizer, hf, case)
                        kind = judge(spans, expectation(render, made, ends), made, ends)
                    except Exception as reason:  # whatever a peer or a template raises
                        kind = REFUSED
                        if peer == "ours":
                            reasons[class_of(str(reason))] += 1
                            if folder == DEMO:
                                why[path.stem][str(reason)].append(case.name)
                    counts[path.stem][peer][kind] += 1
    tokenizers = [folder.name for folder in folders]
    RESULT.write_text(report(counts, why, reasons, names, tokenizers, set(peers)))
    print("\n".join(RESULT.read_text(encoding="utf-8").splitlines()[:30]))


def class_of(reason: str) -> str:
    return next((text for text, _ in REASONS if text in reason), OTHER_REASON)


def report(
    counts: dict[str, dict[str, Counter[str]]],
    why: dict[str, dict[str, list[str]]],
    reasons: Counter[str],
    names: list[str],
    folders: list[str],
    present: set[str],
) -> str:
    total: dict[str, Counter[str]] = {
        peer: sum((row[peer] for row in counts.values()), Counter()) for peer in PEERS
    }
    whole = {
        peer: sum(not (set(row[peer]) - {EXACT, OPENER, LOST, REFUSED}) and row[peer][EXACT] > 0 for row in counts.values())
        for peer in PEERS
    }  # fmt: skip

    def cell(peer: str, text: str) -> str:
        return text if peer in present else "not installed"

    def short(row: Counter[str]) -> str:
        return ", ".join(f"{row[kind]} {SHORT.get(kind, kind)}"
                         for kind in KINDS if row[kind])  # fmt: skip

    rows = sum(total["ours"].values())
    wrongs = {peer: sum(total[peer][kind] for kind in WRONG) for peer in PEERS}
    lines = [
        "# Which tokens are trained",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, transformers {version('transformers')}, "
        f"TRL {version('trl')}, unsloth_zoo {version('unsloth_zoo')}: "
        "`PYTHONPATH=SITE .venv/bin/python -m bench.labels`",
        "",
        f"{len(counts)} chat templates of llama.cpp x {len(names)} conversations ({', '.join(names)}) x "
        f"{len(folders)} tokenizers ({', '.join('demo' if name == 'base' else name for name in folders)}) "
        f"= {rows} rows. Exact: each answer, from its first word or from the end of what prompts for it, "
        "to the token that stops the model, and nothing else. What is exact is found without any of the "
        "three (`tests/data/cases.py`). A tool call that holds the end-of-turn token has no exact labels, "
        "for the model stops there. TRL: `assistant_only_loss` with `get_training_chat_template`; "
        "unsloth: `train_on_responses_only` with the parts that it finds itself. The stop "
        "tokens of each template's model are a table in `tests/data/cases.py`, read off the templates; "
        "ours was mended on these same cases, so its 0 means no known fault. TRL knows templates by "
        "their exact text and refuses the others; its own ones train the newline after the end-of-turn "
        "token on purpose.",
        "",
        "| | " + " | ".join(PEERS) + " |",
        "| --- |" + " --- |" * len(PEERS),
        *(f"| {kind} | " + " | ".join(cell(p, str(total[p][kind])) for p in PEERS) + " |" for kind in KINDS),
        "| **wrong in all** | " + " | ".join(cell(p, f"**{wrongs[p]}**") for p in PEERS) + " |",
        f"| of {len(counts)} templates: some rows exact, none wrong | "
        + " | ".join(cell(p, str(whole[p])) for p in PEERS) + " |",
        "",
        "## Why ours refuses",
        "",
        "| reason | rows | do exact labels exist? |",
        "| --- | --- | --- |",
        *(f"| {text} | {reasons[text]} | {exist} |" for text, exist in (*REASONS, (OTHER_REASON, "")) if reasons[text]),
        "",
        "## By template",
        "",
        "Rows of each kind.",
        "",
        "| template | " + " | ".join(PEERS) + " | why ours refuses |",
        "| --- |" + " --- |" * (len(PEERS) + 1),
    ]  # fmt: skip
    for name, row in sorted(counts.items()):
        causes = "; ".join(
            f"{'all' if len(cases) == len(names) else ', '.join(cases)}: {reason}"
            for reason, cases in why[name].items()
        ).replace("|", "\\|")
        cells = " | ".join(cell(peer, short(row[peer])) for peer in PEERS)
        lines.append(f"| {name} | {cells} | {causes} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
