"""Chat templates: messages -> text, exactly as transformers renders them.

Rendered here with jinja2 itself, because `check` must answer without importing transformers,
which takes seconds. That both render alike is tested.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jobs.data.conversation import BadRow, Message
from jobs.errors import DataError

# A template that writes today's date would train another text every day: it writes this one, or
# the spec's `model.template_date`.
DEFAULT_DATE = date(2025, 1, 1)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for transformers' masks; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    # Not jinja2's own filter, which escapes <, > and & for HTML.
    return json.dumps(value, **{"ensure_ascii": False, **options})


class ChatTemplate:
    """A compiled chat template with the special tokens that it may name."""

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        name: str,
        today: date = DEFAULT_DATE,
    ) -> None:
        self.source = source
        self.name = name
        self.today = today
        self._special_tokens = special_tokens
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = datetime.combine(today, time()).strftime
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template {name}, line {error.lineno}: {error.message}",
                "mend it, or set model.chat_template",
            ) from None

    @property
    def writes_today(self) -> bool:
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; BadRow where the template does not take it."""
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program of its own
            raise BadRow(f"the chat template refuses it: {error}") from None
