"""How to run what was made, as text for a model card: transformers and peft, vLLM, llama.cpp, Ollama.

Each recipe names the repositories, folders and files that there are, so that it can be copied as it
stands. Who runs it is in a download of the results, or anywhere where they are on the Hub. One thing
may be left to fill in: where the base is, if that is not on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOWHERE = "path/to/the/base"  # what a reader fills in
# The ranks that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Where:
    """Where a part of the results is: a folder here, or a repository on the Hub, or a folder in one."""

    folder: str  # in the repository, or in the run's prefix; "" for its root
    repository: str | None = None
    branch: str | None = None

    @property
    def path(self) -> str:
        """What a program takes that knows the Hub's names: it has no folders in them."""
        return self.repository or self.folder or "."

    @property
    def arguments(self) -> str:
        """The same as arguments of `from_pretrained`."""
        found = [_text(self.path)]
        if self.repository and self.folder:
            found.append(f"subfolder={_text(self.folder)}")
        if self.branch:
            found.append(f"revision={_text(self.branch)}")
        return ", ".join(found)

    def download(self, *files: str) -> str:
        """The command that brings these files, or the whole part, into this folder; "" if it is here."""
        if not self.repository:
            return ""
        what = f' --include "{self.folder}/*"' if self.folder else ""
        if any("*" in name for name in files):
            what = "".join(f' --include "{self.inside(name)}"' for name in files)
        elif files:
            what = "".join(f" {self.inside(name)}" for name in files)
        at = f" --revision {self.branch}" if self.branch else ""
        return f"hf download {self.repository}{what}{at} --local-dir .\n"

    def inside(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file


@dataclass(frozen=True)
class Base:
    """The base model, as a program names it."""

    name: str  # owner/name on the Hub, else the path or address in the spec
    commit: str | None
    load_in: str
    on_hub: bool = True

    @property
    def arguments(self) -> str:
        if not self.on_hub:
            return "base"
        revision = f", revision={_text(self.commit)}" if self.commit else ""
        return f"{_text(self.name)}{revision}"

    @property
    def flags(self) -> str:
        if not self.on_hub:
            return '"$BASE"'
        return f"{self.name} --revision {self.commit}" if self.commit else self.name

    def to_fill_in(self, assignment: str) -> str:
        """The line that whoever runs it has to fill in; "" where the Hub has the base. A path of
        the machine that it was trained on means nothing elsewhere."""
        if self.on_hub:
            return ""
        return f'{assignment}"{NOWHERE}"  # fill in: the folder with the base model\n'


def transformers_with_peft(
    base: Base, adapter: Where, dtype: str, ask: Sequence[Mapping[str, str]]
) -> str:
    """Base and adapter, loaded as they were while training."""
    place = adapter.arguments
    quantization = {
        "4bit": 'BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        f'bnb_4bit_use_double_quant=True,\n    bnb_4bit_compute_dtype="{dtype}",\n)',
        "8bit": "BitsAndBytesConfig(load_in_8bit=True)",
    }.get(base.load_in)
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantization else "")
    lines = ["from peft import PeftModel", f"from transformers import {names}", ""]
    if to_fill_in := base.to_fill_in("base = "):
        lines.append(to_fill_in.rstrip())
    options = f'{base.arguments}, dtype="{dtype}", device_map="auto"'
    if quantization:
        lines.append(f"held = {quantization}  # as in the training")
        options += ", quantization_config=held"
    lines += [
        f"model = AutoModelForCausalLM.from_pretrained({options})",
        f"model = PeftModel.from_pretrained(model, {place})",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        "",
        *_generate(ask),
    ]
    return _block("python", "\n".join(lines))


def transformers_merged(merged: Where, dtype: str, ask: Sequence[Mapping[str, str]]) -> str:
    place = merged.arguments
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="{dtype}", device_map="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        "",
        *_generate(ask),
    ]
    return _block("python", "\n".join(lines))


def vllm_lora(base: Base, adapter: Where, name: str, lora: Mapping[str, Any]) -> str:
    """The base served with the adapter, or why vLLM cannot."""
    without = [
        what
        for what, there in (
            ("DoRA", lora.get("dora")),
            ("trained biases", lora.get("bias", "none") != "none"),
            ("modules that were trained whole", lora.get("modules_to_save")),
        )
        if there
    ]
    if without:
        return f"vLLM loads no adapters with {' and '.join(without)}; serve the merged model.\n"
    if lora["rank"] > VLLM_RANKS[-1]:
        return f"vLLM loads no adapters of rank {lora['rank']}; serve the merged model.\n"
    rank = next(size for size in VLLM_RANKS if size >= lora["rank"])
    lines = (
        f"{base.to_fill_in('BASE=')}{adapter.download()}vllm serve {base.flags} --enable-lora --max-lora-rank {rank} \\\n"
        f"  --lora-modules {name}={_here(adapter)} \\\n"
        f"  --chat-template {adapter.inside('chat_template.jinja')}\n"
        f"{_curl(name)}"
    )
    return _block("sh", lines)


def vllm_merged(merged: Where) -> str:
    at = f" --revision {merged.branch}" if merged.branch else ""
    return _block("sh", f"vllm serve {merged.path}{at}\n{_curl(merged.path)}")


def llama_cpp(gguf: Where, file: str) -> str:
    path = gguf.inside(file)
    file = file.replace("-00001-of-", "-*-of-")  # in parts, of which llama.cpp is told the first
    return _block(
        "sh",
        f"{gguf.download(file)}llama-cli -m {path} --jinja           # to talk to\n"
        f"llama-server -m {path} --jinja        # OpenAI's protocol, http://localhost:8080",
    )


def ollama(gguf: Where, file: str, name: str, recipe: str) -> str:
    return _block(
        "sh",
        f"{gguf.download(file, recipe)}ollama create {name} -f {gguf.inside(recipe)}\n"
        f"ollama run {name}",
    )


def _generate(ask: Sequence[Mapping[str, str]]) -> list[str]:
    turns = ",\n    ".join(json.dumps(dict(turn), ensure_ascii=False) for turn in ask)
    return [
        f"messages = [\n    {turns},\n]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        "output = model.generate(",
        "    **inputs, max_new_tokens=256, do_sample=False, eos_token_id=tokenizer.eos_token_id",
        ")",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _curl(name: str) -> str:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    return (
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{body}'"
    )


def _here(where: Where) -> str:
    return f"./{where.folder}" if where.folder else "."


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"
