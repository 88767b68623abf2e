"""The one shape of a conversation, whatever record it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# {"role": "system" | "user" | "assistant" | "tool", "content": str} and, where there are such,
#   tool_calls         assistant: [{"type": "function", "function": {"name": str, "arguments": dict}}]
#   reasoning_content  assistant: str, what was thought before the answer
#   name, tool_call_id tool: whose result it is
#   instruction, input user: the two parts of `content`, for prompt formats that name them
# These are the names that chat templates know.
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template, or a plain text that is trained as a whole.

    `untrained` holds the indices of assistant messages that are context only (weight 0). `tools`
    are JSON schemas of functions, in OpenAI's form.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    text: str | None = None


class BadRow(Exception):
    """Why a row cannot be used; the caller knows its place."""
