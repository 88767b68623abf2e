"""Our rendering is transformers' rendering, and the sandbox holds."""

from __future__ import annotations

import pytest

from jobs.data.conversation import BadRow
from jobs.data.template import ChatTemplate
from jobs.errors import DataError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": 'Say "hi" \n in 你好'},
    {"role": "assistant", "content": "  hi\n"},
]

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if loop.first %}\n  {{ bos_token }}{% endif %}\n"
    "  {{- m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "prompt": "{{ messages[0].content }}{% if add_generation_prompt %}<assistant>{% endif %}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("prompt", [False, True])
def test_it_renders_as_transformers_does(name: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(TEMPLATES[name], special, name).render(
        MESSAGES, add_generation_prompt=prompt
    )
    theirs, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **special
    )
    assert ours == theirs[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(BadRow):
        ChatTemplate(source, {}, "bad").render(MESSAGES)


def test_a_broken_template_names_its_line() -> None:
    with pytest.raises(DataError, match=r"my\.jinja, line 2"):
        ChatTemplate("{{ messages }}\n{% for %}", {}, "my.jinja")
