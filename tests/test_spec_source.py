"""Where a spec comes from, and what is said about a wrong one."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import pytest

from jobs import spec_source
from jobs.errors import AccessError, SpecError
from jobs.spec import Spec
from jobs.spec_mistakes import all_fields
from jobs.spec_names import FIELDS, SAYINGS
from jobs.spec_source import load_spec

GOOD = """\
name: t
model:
  base: some/base
data:
  train: x.jsonl
"""
ENOUGH = {
    "LORAJOB__NAME": "t",
    "LORAJOB__MODEL__BASE": "b",
    "LORAJOB__DATA__TRAIN": "x.jsonl",
}


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def load(folder: Path, text: str, **env: str) -> Spec:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return load_spec(str(path), env)


def mistakes(folder: Path, text: str, **env: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(folder, text, **env)
    return caught.value.message


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spec_source, "DEFAULT_PATH", str(tmp_path / "etc.yaml"))


def test_a_spec_is_read_from_the_path_given_before_any_other(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(GOOD.replace("name: t", "name: other"))
    (tmp_path / "etc.yaml").write_text(GOOD.replace("name: t", "name: etc"))
    env = {"LORAJOB_SPEC": str(tmp_path / "other.yaml")}
    assert load(tmp_path, GOOD, **env).name == "t"
    assert load_spec(None, env).name == "other"
    assert load_spec(None, {}).name == "etc"
    assert load_spec(None, {"LORAJOB_SPEC": ""}).name == "etc"


def test_a_spec_is_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(GOOD.replace("name: t", "name: piped").encode()))
    assert load_spec("-", {}).name == "piped"


def test_a_closed_standard_input_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AccessError, match="standard input is closed"):
        load_spec("-", {})


def test_mistakes_on_standard_input_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"\xff"))
    with pytest.raises(SpecError, match=r"^standard input is no UTF-8 text"):
        load_spec("-", {})


def test_the_environment_alone_is_enough() -> None:
    spec = load_spec(None, ENOUGH)
    assert (spec.name, spec.model.base, spec.data.train[0].source) == ("t", "b", "x.jsonl")


def test_without_a_spec_anywhere_the_message_says_how_to_give_one() -> None:
    with pytest.raises(AccessError) as caught:
        load_spec(None, {})
    assert "there is no spec at" in caught.value.message
    assert "LORAJOB_SPEC" in str(caught.value.hint)


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="Is a directory"):
        load_spec(str(tmp_path), {})


def test_a_variable_wins_over_the_file_and_leaves_the_rest(tmp_path: Path) -> None:
    spec = load(tmp_path, GOOD + "train: {epochs: 3, batch_size: 4}\n", LORAJOB__TRAIN__EPOCHS="5")
    assert (spec.train.epochs, spec.train.batch_size) == (5, 4)


def test_variables_are_numbers_lists_null_and_text_as_in_the_file(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        GOOD,
        LORAJOB__TRAIN__LEARNING_RATE="1e-4",
        LORAJOB__TRAIN__MAX_STEPS="null",
        LORAJOB__LORA__TARGET="[q_proj, v_proj]",
        LORAJOB__EXPORT="{gguf: [], merged: null}",
        LORAJOB__PUBLISH='["a: b"]',
    )
    assert spec.train.learning_rate == 1e-4
    assert spec.train.max_steps is None
    assert spec.lora.target == ["q_proj", "v_proj"]
    assert spec.export.merged is None
    assert spec.publish == ["a: b"]


@pytest.mark.parametrize(
    "text",
    [
        "Say: hi",
        "a # b",
        "{not yaml",
        "[Mira] says",
        '"Hm", she said',
        "one\ntwo",
        "=",
        "@me",
        "2024-13-45",
        "*",
        "é 漢 🦜",
    ],
)
def test_a_variable_keeps_its_text_as_it_is(tmp_path: Path, text: str) -> None:
    prompts = "verify: {prompts: [{ask: x}, {ask: y}]}\n"
    spec = load(tmp_path, GOOD + prompts, LORAJOB__VERIFY__PROMPTS__1__ASK=text)
    assert [prompt.ask for prompt in spec.verify.prompts] == ["x", text]


def test_a_quoted_variable_is_the_text_in_the_quotes() -> None:
    assert load_spec(None, {**ENOUGH, "LORAJOB__MODEL__BASE": "'12'"}).model.base == "12"


def test_a_variable_fills_a_section_of_which_only_the_heading_is_there(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + "train:\n", LORAJOB__TRAIN__EPOCHS="2").train.epochs == 2


@pytest.mark.parametrize(
    "name", ["LORAJOB__VERIFY__PROMPTS__7__ASK", "LORAJOB__NAME__X", "LORAJOB__MODEL__BASE__0"]
)
def test_a_variable_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    text = GOOD + "verify: {prompts: [{ask: x}]}\n"
    assert mistakes(tmp_path, text, **{name: "1"}).startswith(f"{name} names no field")


def test_a_mistake_in_a_variable_names_the_variable(tmp_path: Path) -> None:
    said = mistakes(
        tmp_path, GOOD + "train: {epochs: 1}\n",
        LORAJOB__TRAIN__EPOCHS="many", LORAJOB__TRAIN__EPOHS="2",
    )  # fmt: skip
    assert "got 'many' (LORAJOB__TRAIN__EPOCHS)" in said
    assert "did you mean train.epochs? (LORAJOB__TRAIN__EPOHS)" in said


@pytest.mark.parametrize("name", ["LORAJOB_TRAIN__EPOCHS", "LORAJOB_DATA__TRAIN__0__LIMIT"])
def test_a_variable_with_one_underscore_after_the_prefix_is_refused(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(None, {**ENOUGH, name: "3"})
    assert caught.value.message.startswith(f"{name} sets nothing")
    assert f"write {name.replace('LORAJOB_', 'LORAJOB__')}," in str(caught.value.hint)


def test_variables_that_are_no_fields_are_let_be() -> None:
    env = {"LORAJOB_CACHE": "c", "LORAJOB_DATA_SERVICE_HOST": "10.0.0.1", "LORAJOB_MY__OWN": "x"}
    assert load_spec(None, {**ENOUGH, **env}).name == "t"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {epochs: '3'}", "train.epochs: a number is wanted, got '3': remove the quotes, 3"),
        ("train: {batch_size: '16'}", "a whole number is wanted, got '16': remove the quotes, 16"),
        ("train: {batch_size: 2.0}", "a whole number is wanted, got 2.0: write 2"),
        ("train: {batch_size: 2.5}", "a whole number is wanted, got 2.5 ("),
        ("train: {batch_size: 0}", "has to be 1 or more, got 0"),
        ("train: {epochs:}", "a number is wanted, got null"),
        ("train: {warmup: 3%}", "a number is wanted, got '3%': write 0.03"),
        ("train: {packing: perhaps}", "true or false is wanted, got 'perhaps'"),
        ("train:", "train: it is a section, got null: write its fields below it, or leave it out"),
        ("verify: {prompts: [5]}", "verify.prompts.0: it is a section, got 5: write {ask: 5}"),
        ("publish: {hub: a/b}", "publish: a list is wanted: begin each of its items with a dash"),
        ("publish:", "publish: a list is wanted, got null: leave it out, or write []"),
        ("publish: [5]", "a folder, s3://bucket/prefix or hub: owner/name is wanted, got 5"),
        ("lora: {target: 'q_proj,v_proj'}", "several are a list: write [q_proj, v_proj]"),
        ("export: {gguf: 'q8_0, f16'}", "export.gguf: several are a list: write [q8_0, f16]"),
        ("export: {gguf: [q8_0, q4km]}",
         "export.gguf.1: unknown value 'q4km'; did you mean q4_k_m? Known are f32, f16,"),
        ("export: {gguf: [q4_k]}", "did you mean q4_k_m? Known"),
        ("export: {gguf: zzz}", "export.gguf: unknown value 'zzz'; known are f32, f16,"),
        ("export: {merged: none}", "export.merged: unknown value 'none'; for none write null"),
        ("export: {merged: 16}", "unknown value 16; did you mean 16bit? Known are 16bit, 4bit"),
        ("export: {adapter: false}", "export.adapter: it is always true: leave it out"),
        ("limits: {gpu: rtx4090}", "unknown value 'rtx4090'; did you mean RTX-4090? Known are T4,"),
        ("limits: {gpu: RTX-4080}", "unknown value 'RTX-4080'; known are T4,"),
        ("limits: {gpu: RTX-4080}", "for another one leave it out and set limits.gpu_memory_gib"),
        ("s3: {endpoint: minio}", "an address is wanted, as https://minio.example.org:9000"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_what_is_wanted(tmp_path: Path, text: str, said: str) -> None:
    told = mistakes(tmp_path, GOOD + text + "\n")
    assert said in told
    assert "Input should" not in told
    assert "has 1 mistake:" in told


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("10%", "data.eval: a share is a number: write 0.1, got '10%'"),
        ("'0.1'", "data.eval: a share is a number: remove the quotes, got '0.1'"),
        ("10", "data.eval: has to be below 1, got 10: write 0.1 for 10 %"),
    ],
)
def test_a_share_that_is_none_is_told_with_one(tmp_path: Path, written: str, said: str) -> None:
    told = mistakes(tmp_path, GOOD + f"  eval: {written}\n")
    assert said in told
    assert "has 1 mistake:" in told


def test_a_section_that_is_one_text_is_told_with_its_field(tmp_path: Path) -> None:
    said = mistakes(tmp_path, "name: t\nmodel: some/base\ndata: x.jsonl\n")
    assert "model: it is a section, got 'some/base': write {base: some/base} (line 2)" in said
    assert "data: it is a section, got 'x.jsonl': write {train: x.jsonl} (line 3)" in said


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "+1e-4", "100e-6"])
def test_learning_rates_are_numbers_however_they_are_written(tmp_path: Path, text: str) -> None:
    spec = load(tmp_path, GOOD + f"train: {{learning_rate: {text}}}\n")
    assert spec.train.learning_rate == pytest.approx(1e-4)


def test_a_date_is_a_text(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace("name: t", "name: 2024-13-45")).name == "2024-13-45"


def test_a_key_written_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    said = mistakes(tmp_path, GOOD + "train:\n  epochs: 1\n  epochs: 2\n")
    assert "spec.yaml, line 8, column 3" in said
    assert "'epochs' is written twice" in said


def test_yaml_merge_keys_may_repeat_a_key(tmp_path: Path) -> None:
    text = """\
name: t
model: {base: b}
data: {train: x.jsonl}
verify:
  prompts:
    - &first {ask: x, system: s}
    - &second {<<: *first, ask: y}
    - {<<: *second, ask: z}
"""
    prompts = load(tmp_path, text).verify.prompts
    assert [(prompt.ask, prompt.system) for prompt in prompts] == [
        ("x", "s"), ("y", "s"), ("z", "s"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "field", "nearest"),
    [
        ("trian: {}\n", "trian", "train"),
        ("train: {epoch: 2}\n", "train.epoch", "train.epochs"),
        ("learning_rate: 1\n", "learning_rate", "train.learning_rate"),
        ("lora: {rnk: 1}\n", "lora.rnk", "lora.rank"),
        ("verify: {prompts: [{ask: x, expects: y}]}\n", "verify.prompts.0.expects",
         "verify.prompts.0.expect"),
    ],
)  # fmt: skip
def test_an_unknown_field_is_told_with_the_nearest_name(
    tmp_path: Path, text: str, field: str, nearest: str
) -> None:
    said = mistakes(tmp_path, GOOD + text)
    assert f"{field}: unknown field; did you mean {nearest}? (line 6)" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora: {r: 8}\n", "lora.r: unknown field; it is called lora.rank here (line 6)"),
        (
            "lora_dropout: 0\n",
            "lora_dropout: unknown field; it is called lora.dropout here (line 6)",
        ),
        ("train: {lr: 1}\n", "train.lr: unknown field; it is called train.learning_rate here"),
        ("train: {num_train_epochs: 1}\n", "it is called train.epochs here"),
        ("train: {per_device_train_batch_size: 1}\n", "; train.batch_size is the whole step"),
        ("train: {gradient_accumulation_steps: 1}\n", "; train.batch_size is the whole step"),
        ("train: {logging_steps: 1}\n", "; every step is logged (line 6)"),
        ("max_steps: 1\n", "did you mean train.max_steps?"),
        ("max-seq-len: 1\n", "it is called model.max_seq_length here"),
        ("load_in_4bit: true\n", "; set model.load_in to 4bit, 8bit or 16bit (line 6)"),
        ("dataset_text_field: text\n", "; say it in data.train, as {source: FILE"),
        ("train: {lr_scheduler_type: x}\n", "it is called train.schedule here"),
        ("train: {warmup_ratio: 0.1}\n", "; train.warmup is both"),
        ("train: {save_steps: 10}\n", "it is called checkpoints.every_steps here"),
        ("train: {FP16: true}\n", "; bfloat16 is used where the GPU has it"),
        ("output_dir: x\n", "; --work (or LORAJOB_WORK) is where runs are kept"),
        ("push_to_hub: true\n", "; list the repository under publish, as `hub: owner/name`"),
        ("sequence_len: 5\n", "it is called model.max_seq_length here"),
        ("cutoff_len: 5\n", "it is called model.max_seq_length here"),
        ("gguf: q8_0\n", "gguf: unknown field; did you mean export.gguf?"),
        ("verify: {prompts: [{ask: x, question: y}]}\n", "it is called verify.prompts.ask here"),
    ],
)
def test_the_names_of_other_programs_are_told_with_what_they_are_here(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in mistakes(tmp_path, GOOD + text)


@pytest.mark.parametrize("name", ["model_name", "model_name_or_path", "base_model"])
def test_a_model_by_another_name_is_the_base(tmp_path: Path, name: str) -> None:
    said = mistakes(tmp_path, GOOD.replace("base:", f"{name}:"))
    assert f"model.{name}: unknown field; it is called model.base here (line 3)" in said


def test_other_names_lead_to_fields_that_there_are() -> None:
    fields = all_fields()
    assert {*FIELDS.values()} <= {*fields}
    assert not {*FIELDS} & {*SAYINGS}
    sections = "|".join(Spec.model_fields)
    for text in SAYINGS.values():
        for path in re.findall(rf"\b(?:{sections})\.[a-z_]+", text):
            assert path in fields, text


def test_no_field_is_taken_for_another_programs() -> None:
    ours = {path.rpartition(".")[2] for path in all_fields()}
    # At the top Axolotl has it for the kind of training, and here it is one only of other sections.
    assert ours & {*FIELDS, *SAYINGS} == {"adapter"}


def test_an_unknown_field_in_a_source_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("train: x.jsonl", "train: [{source: x, formt: auto}]")
    said = mistakes(tmp_path, text)
    assert "data.train.0.formt: unknown field; did you mean data.train.0.format? (line 5)" in said


def test_an_unknown_field_like_no_other_gets_no_guess(tmp_path: Path) -> None:
    said = mistakes(tmp_path, GOOD + "zzzz: 1\n")
    assert "zzzz: unknown field (line 6)" in said


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    said = mistakes(
        tmp_path,
        "name: Not A Name\nmodel:\n  load_in: 5bit\ntrain:\n  epochs: -1\n  batch: 3\nlora: null\n",
    )
    assert "has 7 mistakes" in said
    told = {line.split(":")[0].strip(): line for line in said.splitlines()[1:]}
    where = {field: line.rpartition("(")[2].rstrip(")") for field, line in told.items()}
    assert where.pop("data").endswith("is missing")
    assert where == {
        "name": "line 1", "model.base": "line 2", "model.load_in": "line 3", "lora": "line 7",
        "train.epochs": "line 5", "train.batch": "line 6",
    }  # fmt: skip


def test_a_long_wrong_value_is_shown_in_part(tmp_path: Path) -> None:
    said = mistakes(tmp_path, GOOD.replace("name: t", f"name: {'A' * 5000}"))
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "holds a list, not fields"),
        ("hello\n", "holds a text, not fields"),
        ("? [a, b]\n: 1\n", "line 1, column 3: no valid YAML: a field's name is a text"),
        ("a: [1\nb: 2\n", "line 2"),
        ("a: 'x\n", "no valid YAML"),
        ("a: \0\n", "no valid YAML"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("a: " + "9" * 5000, "line 1, column 4: no valid YAML: Exceeds the limit"),
        ("[" * 5000, "nested too deep"),
        ("a: &a [*a]\n", "a: unknown field"),
        ("a: &a {b: *a}\n", "a: unknown field"),
        ("", "name: is missing"),
    ],
)
def test_what_is_no_spec_is_told_so(tmp_path: Path, text: str, said: str) -> None:
    assert said in mistakes(tmp_path, text)


def test_binary_junk_is_no_spec(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(bytes(range(256)))
    with pytest.raises(SpecError, match="no UTF-8 text"):
        load_spec(str(tmp_path / "junk"), {})


TOKEN = "hf_" + "9aBcDeFgHiJkLmNoPqRsTuVwXyZ2qWeRtY"


@pytest.mark.parametrize(
    ("text", "field", "line"),
    [
        (GOOD.replace("some/base", TOKEN), "model.base", 3),
        (GOOD + f"zzzz: [1, {{a: 'x {TOKEN}'}}]\n", "zzzz.1.a", 6),
        (GOOD + f"verify: {{prompts: [{{ask: 'Bearer {TOKEN}'}}]}}\n", "verify.prompts.0.ask", 6),
        (GOOD + f"publish:\n  - out\n  - https://me:{TOKEN}@host/x\n", "publish.1", 8),
        (GOOD + f"train:\n  {TOKEN}: 1\n", "train.***", 7),
        (GOOD + f"zzzz: !!binary {base64.b64encode(TOKEN.encode()).decode()}\n", "zzzz", 6),
        (GOOD + f"zzzz: !!set {{{TOKEN}}}\n", "zzzz.0", 6),
        (GOOD + f"a: &a [*a, {TOKEN}]\n", "a.1", 6),
    ],
)
def test_a_secret_anywhere_is_refused_by_its_fields_name(
    tmp_path: Path, text: str, field: str, line: int
) -> None:
    said = mistakes(tmp_path, text)
    assert f"{field}: holds a secret (line {line})" in said
    assert TOKEN not in said


def test_every_secret_is_told_at_once_before_any_mistake(tmp_path: Path) -> None:
    text = GOOD.replace("some/base", TOKEN).replace("x.jsonl", TOKEN) + "zzzz: 1\n"
    said = mistakes(tmp_path, text, LORAJOB__TRAIN__TOKEN=TOKEN)
    assert said.count("holds a secret") == 3
    assert "train.token: holds a secret (LORAJOB__TRAIN__TOKEN)" in said
    assert "zzzz" not in said


def test_a_value_of_the_environment_is_refused_in_a_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path, GOOD.replace("some/base", "open-sesame")).model.base == "open-sesame"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame")
    said = mistakes(tmp_path, GOOD.replace("some/base", "open-sesame"))
    assert "model.base: holds a secret (line 3)" in said
    assert "sesame" not in said


@pytest.mark.parametrize("name", ["secret_key", "token", "password", "access_key", "hf_token"])
def test_a_field_for_a_secret_is_told_where_secrets_belong(tmp_path: Path, name: str) -> None:
    said = mistakes(tmp_path, GOOD + f"{name}: sesame\n")
    assert f"{name}: unknown field; credentials belong into the environment" in said
    assert "did you mean" not in said
    assert "sesame" not in said


def test_a_wrong_value_is_shown_without_its_secret(tmp_path: Path) -> None:
    filler = "x" * 105  # so that showing a part of it would cut the token in two
    said = mistakes(tmp_path, GOOD + f"train: {{epochs: '{filler} token={TOKEN[3:]}'}}\n")
    assert "train.epochs:" in said
    assert "token=***" in said
    assert TOKEN[3:8] not in said


def test_a_line_that_is_no_yaml_is_told_without_its_secret(tmp_path: Path) -> None:
    for text in (f"a: *{TOKEN}\n", f"a: !{TOKEN} x\n", f"{TOKEN}: 1\n{TOKEN}: 2\n"):
        said = mistakes(tmp_path, text)
        assert "no valid YAML" in said
        assert "***" in said
        assert TOKEN not in said


def test_a_path_with_a_secret_is_told_without_it() -> None:
    with pytest.raises(AccessError) as caught:
        load_spec(f"https://h.example/x?token={TOKEN}", {})
    assert caught.value.message == "there is no spec at https://h.example/x?token=***"


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "publish: [{hub: 'not a repository'}]\n",
        GOOD + "s3: {endpoint: 'no address'}\n",
    ],
)
def test_a_text_of_no_known_pattern_is_a_mistake_and_no_bug(tmp_path: Path, text: str) -> None:
    assert "has 1 mistake" in mistakes(tmp_path, text)
