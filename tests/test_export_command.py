"""`lorajob export`: an adapter that is there becomes all that a run makes of one."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jobs.arguments import add_export_arguments
from jobs.errors import AccessError, LorajobError, SpecError, VerificationError
from jobs.export.adapter import require_same_base
from jobs.export_command import Request, request
from jobs.store.hashing import sha256_of
from tests.conftest import BASE, ROOT, Result, lorajob, lorajob_warm

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as peft saves it, of a kind that no spec here asked for, trained by nobody."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=6, lora_alpha=12, use_rslora=True,
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    folder = tmp_path_factory.mktemp("foreign") / "adapter"
    tuned.save_pretrained(str(folder))
    return folder


def asked(*arguments: str) -> Request:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    return request(parser.parse_args(arguments))


def events_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def copy(foreign: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign, tmp_path / "copy"))


@pytest.fixture(scope="session")
def exported(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("exported") / "small_one"
    result = lorajob(
        "export", "--adapter", str(foreign), "--out", str(out), "--gguf", "q8_0",
        "--publish", str(out.parent / "published"),
    )  # fmt: skip
    assert result.code == 0, result.err + result.out[-2000:]
    return out, result


@pytest.mark.slow
def test_a_foreign_adapter_becomes_everything(exported: tuple[Path, Result]) -> None:
    out, result = exported
    stages = [e["stage"] for e in events_of(result) if e["event"] == "stage_done"]
    assert stages == ["data", "given", "adapter", "merge", "gguf", "verify"]
    made = json.loads((out / "manifest.json").read_text())
    for entry in made["files"]:
        assert sha256_of(out.parent / "published" / entry["path"]) == entry["sha256"]
    listed = {entry["path"] for entry in made["files"]}
    assert {
        "README.md",
        "gguf/small-one-Q8_0.gguf",
        "gguf/Modelfile",
        f"adapter/{CONFIG}",
    } <= listed
    assert made["stages"]["train"]["result"]["lora"]["rslora"] is True


@pytest.mark.slow
def test_its_merged_weights_are_pefts_own(foreign: Path, exported: tuple[Path, Result]) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, str(foreign)).merge_and_unload()
    wanted = merged.state_dict()
    for name, tensor in load_file(exported[0] / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


@pytest.mark.slow
def test_its_card_does_not_say_that_it_was_trained_here(exported: tuple[Path, Result]) -> None:
    text = (exported[0] / "README.md").read_text()
    assert "not known here" in text
    assert "Settings" not in text
    assert "--max-lora-rank 8 " in text


@pytest.mark.slow
def test_a_runs_adapter_is_exported_anew_without_training(demo: Path, tmp_path: Path) -> None:
    arguments = (
        "export", "examples/demo.yaml", "--work", str(demo.parent), "--out", str(tmp_path / "again"),
        "--gguf", "q5_k_m", "--publish", str(tmp_path / "published"),
    )  # fmt: skip
    result = lorajob_warm(*arguments)
    assert result.code == 0, result.err
    again = tmp_path / "again"
    for path in (f"adapter/{WEIGHTS}", "adapter/chat_template.jinja", "merged/model.safetensors"):
        assert sha256_of(again / path) == sha256_of(demo / path), path
    assert (again / "gguf" / "demo-Q5_K_M.gguf").is_file()
    losses = [
        json.loads((folder / "report" / "answers.json").read_text())["subjects"]["adapter"]["loss"]
        for folder in (demo, again)
    ]
    assert losses[0] == losses[1], "measured with the run's own data"
    result = lorajob_warm(*arguments)
    assert result.code == 0, result.err
    assert not [e for e in events_of(result) if e["event"] == "stage_start"]


@pytest.mark.slow
def test_an_adapter_that_does_not_keep_what_it_must_is_not_published(
    demo: Path, tmp_path: Path
) -> None:
    result = lorajob_warm(
        "export", "examples/demo.yaml", "--work", str(demo.parent), "--out", str(tmp_path / "out"),
        "--gguf", "", "--merged", "none", "--publish", str(tmp_path / "published"),
        LORAJOB__VERIFY__PROMPTS__1__EXPECT="Captain Nobody",
    )  # fmt: skip
    assert result.code == 6
    assert "Captain Nobody" in result.err
    assert list((tmp_path / "published").rglob("*")) == []


def test_nothing_is_published_but_where_the_command_line_says(copy: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    tree["publish"], tree["model"]["base"] = [str(tmp_path / "published")], str(BASE)
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(tree))
    arguments = (str(file), "--adapter", str(copy), "--gguf", "q6_k")
    assert asked(*arguments).spec.publish == []
    other = str(tmp_path / "other")
    assert asked(*arguments, "--publish", other).spec.publish == [other]


def test_the_wrong_base_is_found_by_shapes(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    wide = {name: torch.cat([w, w], 1) if "lora_A" in name else w for name, w in weights.items()}
    save_file(wide, copy / WEIGHTS)
    with pytest.raises(VerificationError, match=r"of another base.* do not fit.*6 x 1536") as found:
        require_same_base(copy, BASE)
    assert str(BASE) in (found.value.hint or "")


def test_the_wrong_base_is_found_by_names(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    save_file({n.replace("q_proj", "query"): w for n, w in weights.items()}, copy / WEIGHTS)
    with pytest.raises(VerificationError, match="4 of the weights that it changes are not in"):
        require_same_base(copy, BASE)


def test_the_right_base_passes(foreign: Path) -> None:
    require_same_base(foreign, BASE)


def test_the_wrong_base_ends_with_6(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    save_file({n.replace("q_proj", "query"): w for n, w in weights.items()}, copy / WEIGHTS)
    result = lorajob_warm("export", "--adapter", str(copy), "--out", str(tmp_path / "out"))
    assert result.code == 6
    assert "of another base" in result.err
    assert "--base" in result.err


def test_another_name_of_the_base_is_a_warning(copy: Path, tmp_path: Path) -> None:
    edit(copy, base_model_name_or_path="acme/other")
    found = asked("--adapter", str(copy), "--base", str(BASE), "--out", str(tmp_path / "out"))
    assert any("names acme/other as its base" in text for text in found.warnings)
    plain = asked("--adapter", str(copy), "--out", str(tmp_path / "out"))
    assert plain.spec.model.base == "acme/other"
    assert plain.warnings == ()


def test_the_base_is_pinned_to_the_adapters_revision(copy: Path, tmp_path: Path) -> None:
    edit(copy, base_model_name_or_path="acme/other", revision="abc123")
    found = asked("--adapter", str(copy), "--out", str(tmp_path / "out"))
    assert found.spec.model.base == "acme/other@abc123"


def test_the_template_beside_the_adapter_is_taken(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert asked("--adapter", str(copy), "--out", str(out)).spec.model.chat_template == "auto"
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ old }}"}))
    taken = asked("--adapter", str(copy), "--out", str(out)).spec.model.chat_template
    assert Path(taken).read_text() == "{{ old }}"
    (copy / "chat_template.jinja").write_text("{{ new }}")
    taken = asked("--adapter", str(copy), "--out", str(out)).spec.model.chat_template
    assert Path(taken).read_text() == "{{ new }}"
    chosen = asked("--adapter", str(copy), "--out", str(out), "--template", "chatml")
    assert chosen.spec.model.chat_template == "chatml"


def ia3(folder: Path) -> None:
    edit(folder, peft_type="IA3")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def broken(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (ia3, SpecError, "of type IA3, and only LORA"),
        (pickled, AccessError, f"has no {WEIGHTS}"),
        (empty, AccessError, "is no adapter"),
        (broken, AccessError, "cannot be read"),
    ],
)
def test_what_is_no_lora_adapter_is_said_at_once(
    copy: Path, tmp_path: Path, change: Callable[[Path], None],
    error: type[LorajobError], message: str,
) -> None:  # fmt: skip
    change(copy)
    with pytest.raises(error, match=message):
        asked("--adapter", str(copy), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither a spec nor --adapter"),
        (("--adapter", "{adapter}"), "neither a spec nor --out"),
        (("--adapter", "{adapter}", "--out", "x", "--gguf", "q9"), "--gguf: unknown value .q9."),
        (("--adapter", "{adapter}", "--out", "x", "--gguf", "q8_0", "--merged", "none"), "merged"),
    ],
)
def test_a_wrong_request_is_the_specs_error(
    foreign: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        asked(*(argument.format(adapter=foreign) for argument in arguments))
