"""Model cards: metadata that the Hub takes, and recipes that name what there is and that run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from jobs.export.card import BaseCard, cards, read_base_card
from jobs.export.recipes import NOWHERE
from jobs.store.hub.layout import keys_of, layout
from tests.conftest import BASE, ROOT
from tests.servers.hub_model import card_faults

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TYPES = {"q4_k_m": {"size": 2**20, "kl": 0.002, "perplexity": 1.5}, "q8_0": {"size": 2**21}}


def manifest(**changes: Any) -> dict[str, Any]:
    """A run's manifest with everything made, published nowhere."""
    files = [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "merged/model.safetensors", "gguf/bot-Q4_K_M.gguf", "gguf/bot-Q8_0.gguf", "gguf/Modelfile",
        "report/answers.txt",
    ]  # fmt: skip
    found: dict[str, Any] = {
        "name": "bot",
        "spec": {
            "model": {"load_in": "4bit", "max_seq_length": 2048, "chat_template": "auto"},
            "data": {"train": [{"source": "hf://acme/chats"}], "loss_on": "responses"},
            "lora": {"rank": 24, "alpha": 16, "dora": False, "bias": "none", "modules_to_save": []},
            "train": {"epochs": 1.0, "batch_size": 8},
            "export": {"merged": "16bit", "gguf": ["q8_0", "q4_k_m"]},
            "verify": {"prompts": [{"ask": "Who are you?", "system": "You are Bot."}]},
            "publish": [],
        },
        "inputs": {
            "base": {"source": "owner/base@main", "commit": COMMIT},
            "data": [{"source": "hf://acme/chats", "commit": COMMIT}, {"source": "own.jsonl", "commit": None}],
        },
        "data": {
            "sources": [
                {"source": "hf://acme/chats", "side": "train", "format": "messages", "rows": 100},
                {"source": "own.jsonl", "side": "eval", "format": "sharegpt", "rows": 7},
            ],
            "rows": 107, "train_rows": 97, "eval_rows": 7, "train_tokens": 5000,
            "trained_tokens": 2000, "longest": 300, "dropped_too_long": 3, "truncated": 0,
            "bad_rows": 0,
        },
        "stages": {
            "train": {"result": {"steps": 13, "eval_loss_before": 2.5, "eval_loss": 0.5,
                                 "history": [{"step": n, "loss": 3 - n / 10} for n in range(1, 14)]}},
            "merge": {"result": {"dtype": "bfloat16"}},
            "verify": {"result": {
                "subjects": {"base": {"loss": 2.5, "answers": []}, "q8_0": {"loss": 0.51, "answers": []}},
                "gguf": {"reference": {"type": "bf16", "tokens": 90}, "types": TYPES},
            }},
        },
        "versions": {"lorajob": "0.1.0", "torch": "2.13.0", "unsloth": "missing"},
        "files": [{"path": path, "size": 3 * 2**20, "sha256": "0" * 64} for path in files],
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = found
        for name in parents:
            place = place[name]
        place[last] = value
    return found


def without(found: dict[str, Any], *folders: str) -> dict[str, Any]:
    files = [file for file in found["files"] if file["path"].split("/")[0] not in folders]
    return {**found, "files": files}


def data_of(text: str) -> dict[str, Any]:
    assert card_faults(text) == ([], [])
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


HUB = {"hub": "acme/bot", "adapter": None, "gguf": None, "private": True}


def test_each_part_says_what_it_is_and_of_which_base() -> None:
    found = {
        path: data_of(text)
        for path, text in cards(manifest(spec__publish=[HUB]), BaseCard()).items()
    }
    assert {
        path: (data["base_model"], data["base_model_relation"], data["library_name"])
        for path, data in found.items()
    } == {
        "README.md": ("owner/base", "finetune", "transformers"),
        "adapter/README.md": ("owner/base", "adapter", "peft"),
        "gguf/README.md": ("acme/bot", "quantized", "gguf"),
    }
    for data in found.values():
        assert data["pipeline_tag"] == "text-generation"
        assert data["datasets"] == ["acme/chats"]
        assert "license" not in data
        assert "language" not in data
        for name in (data["base_model"], *data["datasets"]):
            validate_repo_id(name)


def test_results_are_in_the_metadata() -> None:
    (result,) = data_of(cards(manifest(), BaseCard())["README.md"])["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "loss", "value": 0.5, "name": "Loss on trained tokens"}]


def test_licence_and_language_are_the_bases() -> None:
    text = "---\nlicense: other\nlicense_name: acme-1\nlicense_link: LICENSE\nlanguage: [de]\n---\n# Base\n"
    data = data_of(cards(manifest(), read_base_card(text))["README.md"])
    assert (data["license"], data["license_name"], data["language"]) == ("other", "acme-1", "de")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Base",
        "---\n: :\n---\n",
        "---\n[1]\n---\n",
        "---\nlicense: 3\nlanguage: [de, en]\n---\n",
    ],
)
def test_a_base_card_that_says_nothing_gives_nothing(text: str) -> None:
    assert read_base_card(text) == BaseCard()


def test_a_base_that_is_no_repository_is_not_in_the_metadata() -> None:
    data = data_of(
        cards(manifest(inputs__base={"source": "./base", "commit": None}), BaseCard())["README.md"]
    )
    assert "base_model" not in data
    assert "base_model_relation" not in data


@pytest.mark.parametrize(
    ("apart", "folders"),
    [({}, ()), ({"gguf": "acme/bot-GGUF"}, ()), ({"adapter": "acme/bot-LoRA"}, ()),
     ({}, ("merged", "gguf")), ({"adapter": "acme/bot-LoRA"}, ("merged", "gguf"))],
    ids=["one", "gguf apart", "adapter apart", "adapter alone", "adapter alone, apart"],
)  # fmt: skip
def test_every_repository_has_one_card_at_its_root(
    apart: dict[str, str], folders: tuple[str, ...]
) -> None:
    made = without(manifest(spec__publish=[{**HUB, **apart}]), *folders)
    found = cards(made, BaseCard())
    keys = [file["path"] for file in made["files"]] + list(found)
    parts = layout(keys, apart)  # type: ignore[arg-type]
    libraries = {
        "main": "transformers" if not folders else "peft",
        "adapter": "peft",
        "gguf": "gguf",
    }
    for part, paths in parts.items():
        key = paths["README.md"]
        assert data_of(found[key])["library_name"] == libraries[part]
        assert keys_of(part, paths) == paths, "the way back"


def test_recipes_name_the_repositories_and_files_that_there_are() -> None:
    publish = [{**HUB, "hub": "acme/bot@v2", "gguf": "acme/bot-GGUF"}]
    text = cards(manifest(spec__publish=publish), BaseCard())["README.md"]
    assert f'"owner/base", revision="{COMMIT}"' in text
    assert (
        'PeftModel.from_pretrained(model, "acme/bot", subfolder="adapter", revision="v2")' in text
    )
    assert "vllm serve acme/bot --revision v2\n" in text
    assert "--max-lora-rank 32 " in text, "24 is no rank that vLLM takes"
    assert "hf download acme/bot-GGUF bot-Q4_K_M.gguf Modelfile --local-dir .\n" in text
    assert "ollama create bot -f Modelfile\n" in text
    assert "q5" not in text.lower()


@pytest.mark.parametrize("source", ["/home/ann/bases/mine", "s3://bases/mine"])
def test_a_base_that_is_not_on_the_hub_is_left_to_fill_in(source: str) -> None:
    made = manifest(inputs__base={"source": source, "commit": None})
    text = cards(made, BaseCard())["adapter/README.md"]
    programs = "".join(re.findall(r"```(?:python|sh)\n(.*?)```", text, re.DOTALL))
    assert source not in programs
    assert f'\nbase = "{NOWHERE}"  # fill in: ' in programs
    assert "AutoModelForCausalLM.from_pretrained(base, dtype=" in programs
    assert f'BASE="{NOWHERE}"  # fill in: ' in programs
    assert 'vllm serve "$BASE" --enable-lora' in programs
    assert f"`{source}`" in text, "which it was is told"


def test_only_what_there_is_has_a_recipe() -> None:
    text = cards(without(manifest(), "merged", "gguf"), BaseCard())["README.md"]
    assert "peft" in text
    for absent in ("llama.cpp", "Ollama", "vllm serve merged", 'from_pretrained("merged"'):
        assert absent not in text


def test_an_adapter_that_vllm_cannot_load_is_not_said_to_be() -> None:
    text = cards(manifest(spec__lora={"rank": 8, "dora": True}), BaseCard())["adapter/README.md"]
    assert "vLLM loads no adapters with DoRA" in text
    assert "--enable-lora" not in text


def test_a_file_in_parts_is_downloaded_whole_and_named_by_its_first() -> None:
    made = without(manifest(spec__publish=[HUB]), "gguf")
    parts = [f"gguf/bot-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    made["files"] += [{"path": path, "size": 5, "sha256": "0"} for path in parts]
    text = cards(made, BaseCard())["README.md"]
    assert '--include "gguf/bot-Q8_0-*-of-00002.gguf"' in text
    assert "llama-cli -m gguf/bot-Q8_0-00001-of-00002.gguf" in text
    assert "Ollama" not in text, "it takes no parts"


def test_what_was_trained_on_and_how_good_it_is_are_told() -> None:
    text = cards(manifest(), BaseCard())["README.md"]
    assert f"| [acme/chats](https://huggingface.co/datasets/acme/chats) | `{COMMIT}` | train | messages | 100 |" in text  # fmt: skip
    assert "2000 of 5000 tokens are trained" in text
    assert "3 rows were longer than the limit and left out." in text
    assert "from **2.5000** to **0.5000**" in text
    assert "| q4_k_m | 1.0 MiB | 1.5 | 0.002 |" in text
    assert "| `lora.rank` | `24` |" in text


def test_a_table_survives_what_is_in_its_cells() -> None:
    made = manifest(
        spec__model={"load_in": "4bit", "max_seq_length": 9, "chat_template": "a|`b`\nc"}
    )
    row = next(line for line in cards(made, BaseCard())["README.md"].splitlines() if "chat_template`" in line)  # fmt: skip
    assert row == "| `model.chat_template` | ``a\\|`b` c`` |"


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz01234567")
    made = manifest(spec__train={"engine": "hf_abcdefghijklmnopqrstuvwxyz01234567"})
    for text in cards(made, BaseCard()).values():
        assert "hf_abc" not in text


def test_figures_that_are_not_there_leave_no_gaps() -> None:
    made = manifest(stages={"train": {"result": {}}, "verify": {"result": {}}})
    for text in cards(made, BaseCard()).values():
        assert "None" not in text
        assert "nan" not in data_of(text)


@pytest.mark.slow
def test_a_run_publishes_cards_that_are_in_its_manifest(demo: Path) -> None:
    published = demo.parent / "published"
    listed = {f["path"] for f in json.loads((published / "manifest.json").read_text())["files"]}
    for path in ("README.md", "adapter/README.md", "gguf/README.md", "gguf/Modelfile"):
        assert path in listed
        assert (published / path).read_bytes() == (demo / path).read_bytes()
    assert str(demo) not in (demo / "README.md").read_text()


@pytest.mark.slow
def test_the_same_manifest_gives_the_same_cards(demo: Path) -> None:
    made = json.loads((demo / "manifest.json").read_text())
    for path, text in cards(made, BaseCard()).items():
        assert (demo / path).read_text("utf-8") == text


@pytest.mark.slow
def test_the_programs_in_a_card_run_with_the_base_filled_in(demo: Path, tmp_path: Path) -> None:
    text = (demo / "README.md").read_text("utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 2
    for name in ("adapter", "merged"):
        (tmp_path / name).symlink_to(demo / name)
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program.replace(NOWHERE, str(BASE))], cwd=tmp_path,
            check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Mira" in done.stdout
