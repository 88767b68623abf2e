"""From the report's figures to its page: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.observe.charts import Chart, Curve, is_wide, svg
from jobs.observe.live import duration

GIB = 2**30
NARROW, WIDE = (350, 205), (700, 250)  # pixels of a picture: on a phone, and over two columns
TITLES = {  # of a table's columns, where the field's name says too little
    "kl": "KL, nats per token", "same_top": "same first choice", "perplexity_increase": "increase",
    "prompt_tokens_per_second": "prompt tokens/s", "tokens_per_second": "tokens/s",
}  # fmt: skip
SHARES = ("same_top", "perplexity_increase")
NAMES = {"base": "before", "adapter": "after", "merged": "merged"}


def page(report: dict[str, Any], charts: Sequence[Chart]) -> str:
    """The report as HTML. Every text of the run is escaped: answers may hold markup."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "duration": duration, "gib": gib, "size": size}
    drawn: list[dict[str, Any]] = [
        {
            "chart": chart,
            "narrow": Markup(svg(chart, *NARROW)),  # noqa: S704 - made here; its texts are escaped
            "wide": Markup(svg(chart, *WIDE)) if chart.name == "loss" else None,  # noqa: S704
        }
        for chart in charts
    ]
    verify = report["verify"]
    limit = report["spec"]["data"]["retention_limit"]
    return environment.get_template("report.html.jinja").render(
        r=report,
        css=Markup((here / "report.css").read_text("utf-8")),  # noqa: S704
        charts=[d for d in drawn if not d["chart"].bars],
        histogram=next((d for d in drawn if d["chart"].bars), None),
        summary=summary(report),
        tiles=tiles(report),
        about=about(report),
        data_facts=data_facts(report["data"]),
        answers=answers(report),
        made=made(verify),
        quantization=table(quantization(verify)),
        retention=retention(report["train"].get("retention"), limit),
        retention_limit=limit,
        stages=timings(report["stages"]),
        seconds=sum(stage["seconds"] for stage in report["stages"]),
        cost=cost(report),
        spec_text=yaml.safe_dump(report["spec"], sort_keys=False, allow_unicode=True),
    )


# --- what stands on top


def summary(report: dict[str, Any]) -> str:
    """The run in a sentence."""
    data, train = report["data"], report["train"]
    base = report["inputs"]["base"]["source"]
    if not report["history"]:
        return f"{base} with an adapter that was trained before."
    text = f"{base}, fine-tuned on {number(data['train_rows'])} conversations."
    before, after = train.get("eval_loss_before"), train.get("eval_loss")
    if before is not None and after is not None:
        way = "fell" if after < before else "rose"
        text += f" The loss on {number(data['eval_rows'])} held-out ones {way} from {before:.3f} to {after:.3f}."
    return text


def tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that people look for first."""
    train, seconds = report["train"], sum(stage["seconds"] for stage in report["stages"])
    found: list[tuple[str, str]] = []
    if train.get("eval_loss") is not None and train.get("eval_loss_before") is not None:
        found.append(
            ("held-out loss", f"{train['eval_loss_before']:.3f} → {train['eval_loss']:.3f}")
        )
    elif train.get("train_loss") is not None:
        found.append(("training loss", f"{train['train_loss']:.3f}"))
    if report["data"].get("train_tokens") and report["history"]:
        epochs = max((entry.get("epoch", 0) for entry in report["history"]), default=0)
        trained = round(epochs * report["data"]["trained_tokens"])
        found.append(("tokens trained", number(trained)))
    if "steps" in train:
        found.append(("steps", number(train["steps"])))
    if train.get("tokens_per_second"):
        found.append(("tokens a second", number(round(train["tokens_per_second"]))))
    if gpu := train.get("gpu"):
        found.append(("of GPU memory", f"{gpu['share_of_memory']:.0%}"))
    found.append(("time", duration(seconds)))
    if (price := cost(report)) is not None:
        found.append(("cost", f"{price:,.2f}"))
    found.append(("warnings", number(len(report["warnings"]))))
    return found


def about(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, with what, on what."""
    spec, train, base = report["spec"], report["train"], report["inputs"]["base"]
    revision = f" at {base['commit'][:12]}" if base.get("commit") else ""
    lora, training = spec["lora"], spec["train"]
    found = [
        ("base", f"{base['source']}{revision}, loaded in {spec['model']['load_in']}"),
        ("adapter", f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}"
         + (f"; {number(train['trainable_parameters'])} weights trained"
            if "trainable_parameters" in train else "")),
        ("training", f"{training['epochs']:g} epochs, {training['batch_size']} conversations a step, "
         f"learning rate {training['learning_rate']:g} ({training['schedule']}), seed {training['seed']}"
         + (f"; at most {training['max_steps']} steps" if training["max_steps"] else "")),
    ]  # fmt: skip
    if gpu := train.get("gpu"):
        memory = f"{gib(gpu['reserved_bytes'])} of {gib(gpu['memory_bytes'])}"
        used = f"{gpu['share_of_matrix_rate']:.0%} of its {gpu['matrix_tflops']:,.0f} TFLOP/s"
        found.append(("GPU", f"{gpu['name']}; {memory}, {used}"))
    elif "device" in train:
        found.append(("device", train["device"]))
    for source in report["inputs"].get("data", []):
        commit = f" at {source['commit'][:12]}" if source.get("commit") else ""
        found.append(("data", f"{source['source']}{commit}"))
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v != "missing")
    if train.get("stopped_early"):
        found.append(
            (
                "stopped early",
                f"after {number(train['steps'])} of {number(train['max_steps'])} steps",
            )
        )
    if train.get("best_step") is not None:
        found.append(
            ("weights", f"those of step {number(train['best_step'])}, the best on held-out data")
        )
    return [*found, ("versions", versions)]


# --- the curves


def charts_of(report: dict[str, Any]) -> list[Chart]:
    """A picture for each thing that was measured over the steps, and one of the data's lengths."""
    history = report["history"]

    def points(name: str, unit: float = 1) -> list[tuple[float, float]]:
        return [(e["step"], e[name] / unit) for e in history if isinstance(e.get(name), int | float)]  # fmt: skip

    train, held_out = points("loss"), points("eval_loss")
    before = report["train"].get("eval_loss_before")
    if before is not None and held_out and held_out[0][0] > 0:
        held_out = [(0.0, before), *held_out]
    found: list[Chart] = []
    if train:
        curves = [Curve(train, "a", noisy=True)]
        legend = [("a", "training")]
        if held_out:
            curves.append(Curve(held_out, "b", marks=True))
            legend.append(("b", "held out"))
        log = is_wide([value for curve in curves for _, value in curve.points])
        found.append(Chart("loss", "Loss", curves, legend, log=log))
    gpu = "gpu_memory_bytes" in {name for entry in history for name in entry}
    kinds: list[tuple[str, str, str, float, str, bool]] = [
        ("rate", "Learning rate", "learning_rate", 1, "", False),
        ("norm", "Gradient norm", "grad_norm", 1, "", True),
        ("speed", "Tokens a second", "tokens_per_second", 1, ",.0f", False),
        ("memory", "GPU memory in use, GiB" if gpu else "Memory of the process, GiB",
         "gpu_memory_bytes" if gpu else "memory_bytes", GIB, "", False),
    ]  # fmt: skip
    for name, title, key, unit, form, noisy in kinds:
        if values := points(key, unit):
            log = noisy and is_wide([value for _, value in values])
            curves = [Curve(values, "a", noisy)]
            found.append(
                Chart(name, title, curves, form=form, log=log, zero=name in ("speed", "memory"))
            )
    if lengths := report["data"].get("lengths"):
        bars = [(str(bucket["up_to"]), bucket["rows"]) for bucket in lengths]
        title = "Conversations by their length"
        found.append(Chart("lengths", title, bars=bars, x="tokens, up to"))
    return found


# --- data


def data_facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    if not data:
        return []
    share = data["trained_tokens"] / data["train_tokens"]
    facts = [
        ("read", f"{number(data['rows'])} conversations"),
        ("used", f"{number(data['train_rows'])} to train on, {number(data['eval_rows'])} held out"),
        ("tokens", f"{number(data['train_tokens'])}, of which {number(data['trained_tokens'])} are "
         f"trained ({share:.0%})"),
        ("length", f"{data['mean_length']:.0f} tokens on average, {number(data['longest'])} at the most"),
    ]  # fmt: skip
    left = {"too long": data["dropped_too_long"], "unusable": data["bad_rows"]}
    facts.append(("left out", _counts(left)))
    seen = {
        "cut after their last whole answer": data["truncated"],
        "near the limit": data["near_limit"],
        "duplicates, all kept": data["duplicates"],
        "held out and trained on as well": data["in_train_and_eval"],
    }
    if any(seen.values()):
        facts.append(("besides", _counts(seen)))
    return facts


def _counts(counts: dict[str, int]) -> str:
    """3 too long, 1 unusable; or nothing."""
    return ", ".join(f"{number(count)} {what}" for what, count in counts.items() if count) or "nothing"  # fmt: skip


# --- answers and losses


def answers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each question with everyone's answers; who says the same is named together."""
    verify = report["verify"]
    prompts = report["spec"]["verify"]["prompts"]
    found = []
    for at, question in enumerate(verify.get("questions", [])):
        expect = prompts[at]["expect"] if at < len(prompts) else None
        groups: list[dict[str, Any]] = []
        for name, subject in verify["subjects"].items():
            if at >= len(subject.get("answers", [])):
                continue
            answer = subject["answers"][at]
            same = [g for g in groups if name != "base" and g["who"] != ["before"]
                    and (g["text"], g["stopped"]) == (answer["text"], answer["stopped"])]  # fmt: skip
            if same:
                same[0]["who"].append(name_of(name))
                continue
            met = None
            if expect and name != "base":
                met = expect.lower() in answer["text"].lower()
            groups.append({"who": [name_of(name)], "met": met, **answer})
        found.append({"question": question, "expect": expect, "groups": groups})
    return found


def name_of(subject: str) -> str:
    return NAMES.get(subject, f"GGUF {subject}")


def made(verify: dict[str, Any]) -> list[dict[str, Any]]:
    """Base and everything that was made of it, with the loss of each."""
    return [
        {
            "name": name_of(name),
            "loss": subject.get("loss"),
            "size": subject.get("size"),
            "speed": subject.get("tokens_per_second"),
        }
        for name, subject in verify.get("subjects", {}).items()
    ]


def quantization(verify: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured of each GGUF file, below the one that they are compared with."""
    found: list[dict[str, Any]] = list(verify.get("quantization") or [])
    measured = verify.get("gguf") or {}
    if reference := measured.get("reference"):
        known = {"perplexity": reference.get("perplexity")}
        found.append({"type": f"{reference.get('type', '')}, compared with", **known})
    return found + [
        {"type": kind, **figures} for kind, figures in measured.get("types", {}).items()
    ]


def table(rows: Any) -> dict[str, Any] | None:
    """Any list of records as a table: a column for every field that one of them has."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        return None
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "columns": [TITLES.get(column, column.replace("_", " ")) for column in columns],
        "numeric": [all(_is_number(row.get(c)) for row in rows) for c in columns],
        "rows": [[_cell(column, row.get(column)) for column in columns] for row in rows],
    }


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value) and column in ("bytes", "size"):
        return size(value)
    if _is_number(value) and column in SHARES:
        return f"{value:.2%}"
    return number(value) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def retention(rows: Any, limit: float) -> list[dict[str, Any]]:
    """Losses before and after on what the model should still know, with the change, and whether it
    is one that the run warns of."""
    found = []
    for row in rows if isinstance(rows, list) else []:
        if _is_number(row.get("before")) and _is_number(row.get("after")):
            change = (row["after"] - row["before"]) if None not in (row["before"], row["after"]) else None  # fmt: skip
            worse = change is not None and not change <= limit  # also where it is not a number
            found.append({**row, "change": change, "worse": worse, "source": row.get("source", "")})
    return found


# --- time and money


def timings(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage["seconds"] for stage in stages), default=0) or 1
    return [
        {**stage, "share": max(0.5, round(100 * stage["seconds"] / longest, 1))} for stage in stages
    ]


def cost(report: dict[str, Any]) -> float | None:
    price = report["spec"]["observe"]["price_per_gpu_hour"]
    if price is None:
        return None
    seconds: float = sum(stage["seconds"] for stage in report["stages"])
    return float(price) * seconds / 3600


# --- how values are written


def number(value: Any) -> str:
    """12,345; 0.0429; 1.2e-05."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.1f}"


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def size(count: float) -> str:
    """In the largest unit that leaves a digit before the point."""
    for unit, bytes_ in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count:.0f} bytes"
