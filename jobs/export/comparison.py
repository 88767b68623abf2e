"""What quantizing cost: each GGUF's predictions beside the 16-bit GGUF's, and the limits on that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.export.gguf import COMPARED_ROWS
from jobs.spec import Verify
from jobs.train.rows import load_rows


def compared_rows(data: Path) -> list[dict[str, list[int]]]:
    """Token ids and labels of the first conversations held out; of the training data without any."""
    rows: Any = load_rows(data / "eval.arrow") or load_rows(data / "train.arrow")
    items = [rows[i] for i in range(min(COMPARED_ROWS, len(rows)))]
    return [{"input_ids": list(i["input_ids"]), "labels": list(i["labels"])} for i in items]


def lossy_failures(verify: Verify, kind: str, made: dict[str, Any]) -> list[str]:
    """What of a type goes beyond the spec's limits; `made` is what `make_gguf` found out."""
    quality, reference = made["quality"].get(kind), made.get("reference")
    if quality is None or reference is None:
        return []
    failures = []
    against = f"the {made['conversion']} GGUF"
    if verify.max_kl is not None and not quality["kl"] <= verify.max_kl:
        failures.append(
            f"its predictions are too far from those of {against}: KL {quality['kl']:.4g} nats per "
            f"token, verify.max_kl is {verify.max_kl:g}"
        )
    increase = quality["perplexity"] / reference["perplexity"] - 1
    limit = verify.max_perplexity_increase
    if limit is not None and not increase <= limit:
        failures.append(
            f"its perplexity is {quality['perplexity']:.4g}, {increase:.1%} above the "
            f"{reference['perplexity']:.4g} of {against}; verify.max_perplexity_increase is {limit:g}"
        )
    return failures


def comparison(made: dict[str, Any], subjects: dict[str, Any]) -> dict[str, Any]:
    """The figures of each type, for the report: `made` is what `make_gguf` found out, `subjects`
    what verification did."""
    reference = made.get("reference")
    if reference is None:
        return {}
    types = {}
    for kind, quality in made["quality"].items():
        speed = subjects[kind].facts.get("tokens_per_second") if kind in subjects else None
        types[kind] = {
            "size": made["sizes"][kind],
            "bits_per_weight": quality["bits_per_weight"],
            "perplexity": round(quality["perplexity"], 4),
            "perplexity_increase": round(quality["perplexity"] / reference["perplexity"] - 1, 6),
            "kl": round(quality["kl"], 6),
            "same_top": round(quality["same_top"], 4),
            "prompt_tokens_per_second": quality["prompt_tokens_per_second"],
            "tokens_per_second": speed,
        }
    return {
        "reference": {
            "type": made["conversion"],
            "perplexity": round(reference["perplexity"], 4),
            "tokens": reference["tokens"],
        },
        "types": types,
    }
