"""Ollama's Modelfile: which GGUF file, how a conversation becomes a prompt, what ends an answer.

Ollama writes prompts with a template in Go's language, not with the Jinja template in the file. This
makes one of the other: the training template is rendered with marks in place of the texts, and what it
writes between two turns is looked up by their roles. With that table alone some conversations are
written again; only if all come out as the training template writes them, is the table the template.
A template that does more than that (it takes reasoning out of earlier answers, puts the system text
before the last question, ...) is not guessed at: the Modelfile then has none, and says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.data.bounds import marked
from jobs.data.conversation import BadRow, Message
from jobs.data.template import ChatTemplate
from jobs.data.tokenizer import ChatTokenizer
from jobs.export.gguf_header import adds_bos, read_header

NAME = "Modelfile"

# What most people want to run, where several files are there: small and still good.
PREFERRED = ("q4_k_m", "q5_k_m", "q4_k_s", "q5_k_s", "q6_k", "q8_0")

START = ""  # the role before the first turn
ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Ollama makes one message of neighbours of one role, so turns alternate. The last user's turn is
# where an answer begins; a conversation that ends with the assistant is one to be gone on with.
SHAPES = ("u", "uau", "uauau", "ua", "uaua")


class CannotSay(Exception):
    """Why a template has no counterpart in Go's language."""


@dataclass(frozen=True)
class Turns:
    """What a template writes before each text, by the roles before it and its own."""

    before: dict[tuple[str, str], str]
    prompt: str  # after the last user's text, for the model to go on from
    system: str  # the system text that the template writes where there is none
    notes: tuple[str, ...] = ()  # where it may differ nevertheless

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation, as the Go template that is made of this writes it."""
        text, role = "", START
        for message in messages:
            literal = self.before.get((role, message["role"]))
            if literal is None:
                continue
            text += literal + message["content"]
            role = message["role"]
        return text + self.prompt if role == "user" else text


def turns_of(template: ChatTemplate) -> Turns:
    """The table for a template. Raises CannotSay."""
    try:
        before, prompt = _learn(template, "uau")
    except BadRow as reason:
        raise CannotSay(f"it does not take a plain conversation: {reason}") from None
    notes = []
    shapes = list(SHAPES)
    system = ""
    try:
        with_system, _ = _learn(template, "suau")
    except BadRow:
        notes.append("system messages are left out: the training template takes none")
    else:
        system = _default(before, with_system)
        before = {**with_system, **before}
        shapes += [f"s{shape}" for shape in SHAPES]
        try:
            before |= _learn(template, "uasuau")[0]
            shapes.append("uasuau")
        except (BadRow, CannotSay):
            notes.append("system messages after the first turn are left out")
    turns = Turns(before, prompt, system)
    _prove(template, turns, shapes)
    said = {"u": "  What is it?\n", "a": " It is this. ", "s": "\nBe brief. "}
    if not _is_same(template, turns, _conversation(shapes[-1], said)):
        notes.append("white space around a text is kept, which the training template takes off")
    if re.search(r"\btools\b", template.source):
        notes.append("tools are left out: use the chat template in the GGUF file for them")
    if template.writes_today:
        notes.append(f"the day that it writes is always that of the training, {template.today}")
    return Turns(before, prompt, system, tuple(notes))


def go_template(turns: Turns, bos: str = "") -> str:
    """The table in Go's template language. `bos` is what Ollama writes in front by itself."""
    literals: dict[str, list[str]] = {}
    for (role, next_role), whole in sorted(turns.before.items()):
        literal = whole.removeprefix(bos) if role == START else whole
        literals.setdefault(literal, []).append(f"{role} {next_role}")
    branches = []
    for number, (literal, pairs) in enumerate(literals.items()):
        test = " ".join(_quoted(pair) for pair in pairs)
        word = "else if" if number else "if"
        branches.append(f"{{{{- {word} eq $turn {test} }}}}{{{{ {_quoted(literal)} }}}}")
    lines = [
        '{{- $before := "" }}',
        "{{- range .Messages }}",
        '{{- $turn := printf "%s %s" $before .Role }}',
        *branches,
        "{{- else }}{{ continue }}",
        "{{- end }}{{ .Content }}",
        "{{- $before = .Role }}",
        "{{- end }}",
        f'{{{{- if eq $before "user" }}}}{{{{ {_quoted(turns.prompt)} }}}}{{{{ end }}}}',
    ]
    return "\n".join(lines)


def modelfile(files: Sequence[str], tokenizer: ChatTokenizer, begins: bool) -> str:
    """The Modelfile for GGUF files that lie beside it, the one to begin with first.

    `begins` says whether the file has a beginning-of-sequence token put before every prompt.
    """
    first, *others = files
    lines = [f"FROM ./{first}", *(f"# FROM ./{name}" for name in others), ""]
    bos = tokenizer.special_tokens.get("bos_token") or ""
    try:
        turns = turns_of(tokenizer.template)
        body = go_template(turns, bos if begins else "")
        if '"""' in body:
            raise CannotSay("its text cannot be quoted here")
    except CannotSay as reason:
        lines += [
            "# No TEMPLATE: the chat template of the training cannot be written in Ollama's language, as",
            f"# {_line(reason)}.",
            "# It is in the GGUF file: `llama-server --jinja` uses it. Ollama does for models it knows.",
        ]
    else:
        starts = [text for (role, _), text in turns.before.items() if role == START]
        notes = list(turns.notes)
        if begins and not all(bos and text.startswith(bos) for text in starts):
            notes.append("the file has a token put first that the training template does not write")
        lines.append("# Writes prompts as the chat template of the training does.")
        lines += [f"# - {_line(note)}" for note in notes]
        lines.append(f'TEMPLATE """{body}"""')
        if turns.system and '"""' not in turns.system:
            lines += ["", f'SYSTEM """{turns.system}"""']
    stops = sorted({tokenizer.eos_id, *tokenizer.stop_ids})
    texts = [tokenizer.backend.id_to_token(token) for token in stops]
    lines += ["", *(f'PARAMETER stop "{text}"' for text in texts if text and '"' not in text)]
    return "\n".join(lines) + "\n"


def files_of(name: str, kinds: Sequence[str], there: Sequence[str]) -> list[str]:
    """The GGUF files of a run, one a type, the one to begin with first. Of a file in parts it is the
    first part, and it comes after the whole ones: Ollama takes no parts."""
    order = [*(kind for kind in PREFERRED if kind in kinds), *kinds]
    whole, parts = [], []
    for kind in dict.fromkeys(order):
        stem = re.escape(f"{name}-{kind.upper()}")
        whole += [file for file in there if re.fullmatch(rf"{stem}\.gguf", file)]
        parts += [file for file in there if re.fullmatch(rf"{stem}-00001-of-\d+\.gguf", file)]
    return [*whole, *parts]


def write_modelfile(
    gguf: Path, name: str, kinds: Sequence[str], tokenizer: ChatTokenizer
) -> Path | None:
    """Put it beside the GGUF files; None where Ollama can take none of them."""
    there = sorted(path.name for path in gguf.glob("*.gguf"))
    whole = [file for file in files_of(name, kinds, there) if "-00001-of-" not in file]
    if not whole:
        return None
    text = modelfile(whole, tokenizer, adds_bos(read_header(gguf / whole[0])))
    path = gguf / NAME
    if not path.is_file() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
    return path


def _learn(template: ChatTemplate, shape: str) -> tuple[dict[tuple[str, str], str], str]:
    """What stands before each text of a conversation, and after its last. Raises BadRow, CannotSay."""
    roles = [ROLES[letter] for letter in shape]
    made = marked(template, [{"role": role, "content": True} for role in roles], (), True)
    if made.marks != tuple((number, "content") for number in range(len(roles))):
        raise CannotSay("it leaves out, repeats or moves a turn")
    before: dict[tuple[str, str], str] = {}
    for pair, literal in zip(
        zip([START, *roles], roles, strict=False), made.literals[:-1], strict=True
    ):
        if before.setdefault(pair, literal) != literal:
            raise CannotSay("it writes later turns otherwise than earlier ones")
    return before, made.literals[-1]


def _default(without: dict[tuple[str, str], str], given: dict[tuple[str, str], str]) -> str:
    """The system text that a conversation without one gets, if that is all that is between."""
    head, tail = given[START, "system"], given["system", "user"]
    whole = without[START, "user"]
    if len(whole) > len(head) + len(tail) and whole.startswith(head) and whole.endswith(tail):
        return whole[len(head) : len(whole) - len(tail)].strip()
    return ""


def _prove(template: ChatTemplate, turns: Turns, shapes: Sequence[str]) -> None:
    """Raises CannotSay where the table writes a conversation otherwise than the template."""
    plain = {"u": 'What is {{ it }}?\n\nAnd "why"?', "a": "It is <this>.\nSo.", "s": "Be brief."}
    for shape in shapes:
        if not _is_same(template, turns, _conversation(shape, plain)):
            raise CannotSay(
                "it writes some turns otherwise depending on what comes before or after"
            )
    thinking = {**plain, "a": "<think>\nHm.\n</think>\n\nIt is this."}
    if not _is_same(template, turns, _conversation("uau", thinking)):
        raise CannotSay("it takes the reasoning out of earlier answers")
    if turns.system:
        told = _conversation("suau", {**plain, "s": turns.system})
        if turns.render(told) != turns.render(told[1:]):
            raise CannotSay("its system text cannot be told from the rest")


def _is_same(template: ChatTemplate, turns: Turns, messages: Sequence[Message]) -> bool:
    ours = turns.render(messages)
    try:
        if messages[-1]["role"] == "user":
            return template.render(messages, add_generation_prompt=True) == ours
        # What ends the answer is for the model to write.
        return template.render(messages).startswith(ours)
    except BadRow:
        return False


def _conversation(shape: str, said: dict[str, str]) -> list[Message]:
    return [{"role": ROLES[letter], "content": said[letter]} for letter in shape]


def _quoted(text: str) -> str:
    # JSON's escapes are all Go's, too.
    return json.dumps(text, ensure_ascii=False)


def _line(text: object) -> str:
    return " ".join(str(text).split())
