"""Model cards: what was published, what it was made of, how good it is, how to run it.

A card is made from the manifest alone, and from what the base's own card says of its licence: the same
run has the same card. There is one for each part that can be a repository of its own on the Hub; the
first stands at the root, for what stands there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCardData

from jobs.base_model import BaseModel
from jobs.errors import LorajobError
from jobs.export import modelfile, recipes
from jobs.export.recipes import Base, Where
from jobs.secrets import redact, redact_tree
from jobs.store.places import HubPlace, WrongPlace, parse_base, parse_place
from jobs.store.remote import Remote

NAME = "README.md"

Part = Literal["merged", "adapter", "gguf"]

RELATIONS = {"merged": "finetune", "adapter": "adapter", "gguf": "quantized"}
LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
LICENCE_FIELDS = ("license", "license_name", "license_link")

TRAINED = ("train", "replay")  # what sources are for, of which a model is made
CURVE = "report/loss.png"

POINTS = 12  # of the loss, in the card's table


@dataclass(frozen=True)
class BaseCard:
    """What the base's own card says that holds for what is made of it."""

    licence: Mapping[str, str] = field(default_factory=dict)
    language: str | None = None  # where it has exactly one


def read_base_card(text: str) -> BaseCard:
    """From a README.md; what cannot be read says nothing."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        return BaseCard()
    licence = {
        name: data[name]
        for name in LICENCE_FIELDS
        if isinstance(data.get(name), str) and data[name]
    }
    if "license" not in licence:
        licence = {}
    languages = data.get("language")
    if isinstance(languages, list) and len(languages) == 1:
        languages = languages[0]
    return BaseCard(licence, languages if isinstance(languages, str) else None)


def find_base_card(base: BaseModel) -> BaseCard:
    """The base's own card, fetched where it is elsewhere; one that cannot be had says nothing."""
    try:
        folder = base.folder
        if base.remote:
            store = base.remote.store
            entries = tuple(entry for entry in store.entries() if entry.key == NAME)
            folder = Remote(store, entries).bring() if entries else folder
        return read_base_card((folder / NAME).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, LorajobError):
        return BaseCard()


def cards(manifest: Mapping[str, Any], base_card: BaseCard) -> dict[str, str]:
    """The cards by their path in the run's folder."""
    made = _Made(redact_tree(manifest), base_card)
    found = {NAME: made.card("merged" if made.has("merged") else "adapter")}
    if made.has("merged") or made.adapter_is_apart:
        found[f"adapter/{NAME}"] = made.card("adapter")
    if made.has("gguf"):
        found[f"gguf/{NAME}"] = made.card("gguf")
    return found


class _Made:
    """A run's manifest, read for its cards."""

    def __init__(self, manifest: Mapping[str, Any], base_card: BaseCard) -> None:
        self.manifest, self.base_card = manifest, base_card
        self.name = manifest["name"]
        self.spec = manifest["spec"]
        self.stages = {name: stage["result"] for name, stage in manifest["stages"].items()}
        self.trained = self.stages.get("train") or {}
        self.verified = self.stages.get("verify") or {}
        self.files = {file["path"]: file["size"] for file in manifest["files"]}
        source, commit = (manifest["inputs"]["base"][key] for key in ("source", "commit"))
        place = parse_base(source)
        self.hub_base = place.repository if isinstance(place, HubPlace) else None
        self.base = Base(
            self.hub_base or source, commit, self.spec["model"]["load_in"],
            on_hub=self.hub_base is not None,
        )  # fmt: skip
        hubs = [target for target in self.spec["publish"] if isinstance(target, dict)]
        hub: Mapping[str, Any] = hubs[0] if hubs else {}  # the others hold the same
        main, branch = _repository(hub.get("hub"))
        root = "merged" if self.has("merged") else "adapter"

        def where(part: str) -> Where:
            repository, own_branch = _repository(hub.get(part))
            if repository:
                return Where("", repository, own_branch)
            return Where("" if main and part == root else part, main, branch)

        self.adapter_is_apart = bool(hubs) and all(target.get("adapter") for target in hubs)
        self.main, self.adapter, self.gguf = (where(part) for part in ("merged", "adapter", "gguf"))

    def has(self, part: str) -> bool:
        return any(path.startswith(f"{part}/") for path in self.files)

    @property
    def gguf_files(self) -> list[str]:
        names = (path.partition("/")[2] for path in self.files if path.startswith("gguf/"))
        return sorted(name for name in names if name.endswith(".gguf"))

    @property
    def first_gguf(self) -> str | None:
        """The one to begin with."""
        found = modelfile.files_of(self.name, self.spec["export"]["gguf"], self.gguf_files)
        return found[0] if found else None

    @property
    def dtype(self) -> str:
        return str((self.stages.get("merge") or {}).get("dtype") or "bfloat16")

    def card(self, part: Part) -> str:
        title = {"merged": "", "adapter": ": LoRA adapter", "gguf": ": GGUF"}[part]
        sections = [
            f"# {self.name}{title}",
            self._intro(part),
            *self._recipes(part),
            *self._files(part),
            *self._training(),
            *self._results(part),
            self._provenance(),
        ]
        body = "\n".join(f"{section.strip()}\n" for section in sections if section.strip())
        return redact(f"---\n{self._data(part).to_yaml().strip()}\n---\n\n{body}")

    def _data(self, part: Part) -> ModelCardData:
        base = self.hub_base
        if part == "gguf" and self.main.repository and self.has("merged"):
            base = self.main.repository  # what was quantized
        tags = ["lorajob", "sft"]
        if part != "merged":
            tags.append("lora" if part == "adapter" else "gguf")
        merged_in_4_bit = part == "merged" and self.spec["export"]["merged"] == "4bit"
        tags += ["bitsandbytes", "4-bit"] if merged_in_4_bit else []
        trained_on = [] if "given" in self.trained else self._sources()
        datasets = [_dataset(one["source"]) for one in trained_on if one["side"] in TRAINED]
        licence = self.base_card.licence
        data = ModelCardData(
            base_model=base,
            base_model_relation=RELATIONS[part] if base else None,
            library_name=LIBRARIES[part],
            pipeline_tag="text-generation",
            tags=tags,
            datasets=[name for name in dict.fromkeys(datasets) if name] or None,
            language=self.base_card.language,
            model_name=self.name,
            eval_results=self._eval_results() or None,
            license=licence.get("license"),
            license_name=licence.get("license_name"),
            license_link=licence.get("license_link"),
        )
        if not data.eval_results:
            data.model_name = None  # it belongs to the results
        return data

    def _eval_results(self) -> list[EvalResult]:
        loss = self.trained.get("eval_loss")
        if loss is None:
            return []
        # Of held-out rows no data set on the Hub is a proper name: the sources are named above.
        return [
            EvalResult(
                task_type="text-generation", task_name="Text generation",
                dataset_type="held-out", dataset_name=f"{self.name}, held-out conversations",
                metric_type="loss", metric_name="Loss on trained tokens", metric_value=loss,
            )
        ]  # fmt: skip

    def _intro(self, part: Part) -> str:
        base = _code(self.base.name)
        if self.hub_base:
            tree = f"/tree/{self.base.commit}" if self.base.commit else ""
            base = f"[{self.hub_base}](https://huggingface.co/{self.hub_base}{tree})"
        at = f" at revision `{self.base.commit}`" if self.base.commit else ""
        how = {"4bit": "4-bit (NF4)", "8bit": "8-bit"}.get(self.base.load_in, "16-bit")
        what = {
            "merged": "The base with the adapter merged into its weights",
            "adapter": "A LoRA adapter",
            "gguf": "GGUF files for llama.cpp, Ollama and others, made from the merged weights",
        }[part]
        method = f"The LoRA adapter was trained on the {how} base"
        if "given" in self.trained:
            method = "The LoRA adapter is one that was there before"
        others = [
            f"{label}: {self._place(where)}"
            for label, other, where in (
                ("merged weights", "merged", self.main),
                ("adapter", "adapter", self.adapter),
                ("GGUF files", "gguf", self.gguf),
            )
            if other != part and self.has(other)
        ]
        more = f"\n\nAlso there: {'; '.join(others)}." if others else ""
        return f"{what}. Base model: {base}{at}. {method}.{more}"

    def _place(self, where: Where) -> str:
        if not where.repository:
            return f"`{where.folder}/`"
        link = f"[{where.repository}](https://huggingface.co/{where.repository})"
        return f"{link}, folder `{where.folder}/`" if where.folder else link

    def _recipes(self, part: Part) -> Iterable[str]:
        yield "## How to run it"
        if not self.main.repository:
            yield "Paths are from the folder that `manifest.json` is in."
        ask = self._ask()
        if part != "gguf":
            if self.has("merged") and part == "merged":
                yield "### transformers"
                yield recipes.transformers_merged(self.main, self.dtype, ask)
            yield "### transformers and peft"
            yield recipes.transformers_with_peft(self.base, self.adapter, self.dtype, ask)
            yield "### vLLM"
            if self.has("merged") and part == "merged":
                yield recipes.vllm_merged(self.main)
                yield "Or the base with the adapter on it:"
            yield recipes.vllm_lora(self.base, self.adapter, self.name, self._lora())
        first = self.first_gguf
        if first and part != "adapter":
            yield "### llama.cpp"
            yield recipes.llama_cpp(self.gguf, first)
            if f"gguf/{modelfile.NAME}" in self.files:
                yield "### Ollama"
                yield recipes.ollama(self.gguf, first, self.name, modelfile.NAME)

    def _ask(self) -> list[dict[str, str]]:
        """The spec's first question: what comes from the data stays out of the card."""
        prompts = self.spec["verify"]["prompts"]
        if not prompts:
            return [{"role": "user", "content": "Who are you?"}]
        system = prompts[0].get("system")
        before = [{"role": "system", "content": system}] if system else []
        return [*before, {"role": "user", "content": prompts[0]["ask"]}]

    def _lora(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.trained.get("lora") or self.spec["lora"]
        return found

    def _files(self, part: Part) -> Iterable[str]:
        if part == "gguf":
            yield "## Files"
            rows = [(_code(name), _size(self.files[f"gguf/{name}"])) for name in self.gguf_files]
            yield _table(("file", "size"), rows)

    def _types(self) -> Iterable[str]:
        """What each type of GGUF has lost against the file that was not quantized."""
        compared = self.verified.get("gguf") or {}
        types = compared.get("types") or {}
        figures = [name for name in TYPES if any(name in type_ for type_ in types.values())]
        if not figures:
            return
        reference = compared.get("reference") or {}
        kind = str(reference.get("type", "16-bit")).upper()
        tokens = reference.get("tokens")
        yield f"The GGUF files against the one in {kind}" + (
            f", on {tokens} trained tokens of the same conversations:" if tokens else ":"
        )
        yield _table(
            ["type", *(TYPES[name] for name in figures)],
            [
                (kind, *(_figure(name, type_.get(name)) for name in figures))
                for kind, type_ in types.items()
            ],
        )

    def _training(self) -> Iterable[str]:
        data = self.manifest["data"]
        if "given" in self.trained:
            names = ", ".join(_code(Path(source["source"]).name) for source in self._sources())
            yield (
                f"## Data\n\nWhat the adapter was trained on is not known here. Everything was measured "
                f"with {data.get('rows')} conversations of {names}."
            )
            return
        yield "## Training data"
        rows = []
        for source in self._sources():
            link = _code(source["source"])
            if repository := _dataset(source["source"]):
                link = f"[{repository}](https://huggingface.co/datasets/{repository})"
            revision = _code(source["commit"]) if source["commit"] else ""
            rows.append((link, revision, source["side"], source["format"], source["rows"]))
        yield _table(("source", "revision", "for", "format", "rows"), rows)
        said = [
            f"{data.get('train_rows')} conversations to train on, {data.get('eval_rows')} held out; "
            f"{data.get('trained_tokens')} of {data.get('train_tokens')} tokens are trained "
            f"(`data.loss_on: {self.spec['data']['loss_on']}`), the longest conversation has "
            f"{data.get('longest')}."
        ]
        left_out = {
            "longer than the limit and left out": data.get("dropped_too_long"),
            "cut after the last whole answer that fits": data.get("truncated"),
            "unusable and skipped": data.get("bad_rows"),
        }
        said += [
            f"{count} {'row was' if count == 1 else 'rows were'} {what}."
            for what, count in left_out.items()
            if count
        ]
        yield " ".join(said)
        yield "## Settings"
        settings = [(_code(name), _code(value)) for name, value in self._settings()]
        yield _table(("setting", "value"), settings)

    def _sources(self) -> list[dict[str, Any]]:
        """What was read: the source, its commit, what it was for, its format and its rows."""
        commits = {one["source"]: one["commit"] for one in self.manifest["inputs"]["data"]}
        return [
            {**source, "commit": commits.get(source["source"])}
            for source in self.manifest["data"].get("sources", [])
        ]

    def _settings(self) -> Iterable[tuple[str, Any]]:
        model = self.spec["model"]
        for name in ("load_in", "max_seq_length", "chat_template"):
            value = model[name]
            if name == "chat_template" and "{" in str(value):
                value = "a prompt format"
            yield f"model.{name}", value
        for section in ("lora", "train"):
            for name, value in self.spec[section].items():
                if value is not None and value != [] and value is not False:
                    yield f"{section}.{name}", value
        for name, value in (
            ("steps", self.trained.get("steps")),
            ("trainable parameters", self.trained.get("trainable_parameters")),
        ):
            if value is not None:
                yield name, value

    def files_are_beside(self, part: Part) -> bool:
        """Whether the run's other folders are where this card is published."""
        return part == "merged" or not self.has("merged") or not self.adapter_is_apart

    def _results(self, part: Part) -> Iterable[str]:
        yield "## Results"
        before, after = self.trained.get("eval_loss_before"), self.trained.get("eval_loss")
        if before is not None and after is not None:
            yield (
                f"The loss on held-out conversations went from **{before:.4f}** to **{after:.4f}** "
                "(nats per trained token)."
            )
        history = [
            entry
            for entry in self.trained.get("history") or []
            if isinstance(entry, dict) and ("loss" in entry or "eval_loss" in entry)
        ]
        if part != "gguf" and CURVE in self.files and self.files_are_beside(part):
            yield f"![loss over the steps]({'../' if part == 'adapter' else ''}{CURVE})"
        if history:
            yield _table(("step", "training loss", "eval loss"), _curve(history))
        subjects = self.verified.get("subjects") or {}
        if subjects:
            yield (
                "Before it was published everything was loaded again from its files and checked: "
                "the answers, that they stop, and the loss on the same conversations."
            )
            yield _table(*_subjects(subjects))
        yield from self._types()

    def _provenance(self) -> str:
        versions = self.manifest["versions"]
        shown = ("lorajob", "torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")
        named = ", ".join(
            f"{n} {versions[n]}" for n in shown if versions.get(n, "missing") != "missing"
        )
        return (
            f"## Provenance\n\nMade with {named}. `manifest.json` has the whole spec, all versions, the "
            "revisions of base and data, and every file's size and sha256."
        )


def _curve(history: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Some points of the loss over the steps: the first, the last and some between, and all evaluations
    as far as there are not too many."""
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        at = steps.setdefault(int(entry["step"]), {})
        at.update({name: entry[name] for name in ("loss", "eval_loss") if name in entry})
    evaluated = [step for step, values in steps.items() if "eval_loss" in values]
    chosen = {*_spread(list(steps), POINTS - min(len(evaluated), POINTS // 2))}
    chosen |= {*_spread(evaluated, POINTS // 2)}
    return [
        (step, _number(steps[step].get("loss")), _number(steps[step].get("eval_loss")))
        for step in sorted(chosen)
    ]


def _spread(values: Sequence[int], count: int) -> list[int]:
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


COLUMNS = {
    "loss": "loss", "kl_to_adapter": "KL to adapter", "changed_tensors": "changed tensors",
    "reloaded_logits_off_by": "reloaded logits off by",
}  # fmt: skip
TYPES = {
    "size": "size", "bits_per_weight": "bits per weight", "perplexity": "perplexity",
    "perplexity_increase": "perplexity, share more", "kl": "KL divergence",
    "same_top": "same first choice", "tokens_per_second": "tokens/s",
}  # fmt: skip


def _subjects(subjects: Mapping[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """One row a subject of the verification, one column for each figure that any has."""
    figures = [name for name in COLUMNS if any(name in each for each in subjects.values())]
    rows = [
        (name, *(_figure(figure, subject.get(figure)) for figure in figures))
        for name, subject in subjects.items()
    ]
    return ["", *(COLUMNS[name] for name in figures)], rows


def _figure(name: str, value: Any) -> str:
    return _size(value) if name == "size" and _is_number(value) else _number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{text}{ticks}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line("---" for _ in head), *(line(row) for row in rows)])


def _dataset(source: str) -> str | None:
    """The data set on the Hub that a source names."""
    try:
        place = parse_place(source, hub_kind="dataset")
    except WrongPlace:
        return None
    return place.repository if isinstance(place, HubPlace) and place.kind == "dataset" else None


def _repository(name: str | None) -> tuple[str | None, str | None]:
    """`owner/name`, and the branch that is meant."""
    repository, _, branch = (name or "").partition("@")
    return repository or None, branch or None


def write_cards(folder: Path, texts: Mapping[str, str]) -> None:
    """Write what is not there as it is: an unchanged file keeps its time."""
    for path, text in texts.items():
        target = folder / path
        content = text.encode()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
