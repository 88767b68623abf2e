"""The run spec: the only configuration there is.

Each field says what it means where it stands; the published JSON schema and the reference
documentation are generated from these models. Reading a spec from a file, standard input and the
environment is `jobs.spec_source`.

Nothing here touches the network, the disk or torch: a wrong spec is answered at once.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)

from jobs.store.places import require_no_secret

# A repository on the Hub, with a branch where one is meant.
REPOSITORY_PATTERN = r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@[A-Za-z0-9_./-]+)?$"

# File names, Kubernetes names and label values all accept this.
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]{0,51}[a-z0-9])?$"

# No system takes a NUL character in a path.
PLACE_PATTERN = r"^[^\x00]+$"

ENDPOINT_PATTERN = r"^https?://[^/?#@]+/?$"

# llama.cpp's names for the file types that libllama can write (its enum llama_ftype), lower case.
GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q5_1",
    "q4_k_m", "q4_k_s", "q4_0", "q4_1", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s",
    "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs",
    "iq2_xxs", "iq1_m", "iq1_s",
]  # fmt: skip

# As many write them: Q4_K_M.
_Upper = Annotated[
    str, Field(json_schema_extra={"enum": [kind.upper() for kind in get_args(GgufType)]})
]

# Those that libllama writes with an importance matrix only.
NEED_IMATRIX = frozenset(
    {"q2_k_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"}
)


# Cards whose memory is known (jobs/train/cards.py).
GpuName = Literal[
    "T4", "V100-16GB", "V100-32GB", "L4", "A10G", "A40", "L40S", "A100-40GB", "A100", "H100",
    "H100-NVL", "H200", "B200", "RTX-3090", "RTX-4090", "RTX-5090", "RTX-A6000", "RTX-6000-Ada",
]  # fmt: skip


# A number is a number: neither `yes` nor "16" in quotes stands for one.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]


def _no_secret(text: str) -> str:
    if "://" in text:
        require_no_secret(text)
    return text


Place = Annotated[str, Field(pattern=PLACE_PATTERN), AfterValidator(_no_secret)]


def share_of(text: str) -> float | None:
    """What a percentage is as a share: 0.1 of `10%`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    return float(match[1]) / 100 if match else None


def _text_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _names(value: Any) -> Any:
    """Names in a list; a text is one of them."""
    if isinstance(value, str) and "," in value:
        names = ", ".join(name.strip() for name in value.strip("[]").split(","))
        raise ValueError(f"several are a list: write [{names}]")
    return _text_as_list(value)


Names = Annotated[list[str], BeforeValidator(_names, json_schema_input_type=str | list[str])]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    base: Place
    """The model to fine-tune: a repository on the Hub (`owner/name[@revision]`), `s3://bucket/path`
    or a folder, with config.json, safetensors weights and a tokenizer. The weights are the original
    ones: a base that is quantized already is refused."""
    load_in: Literal["4bit", "8bit", "16bit"] = "4bit"
    """How the frozen base is held while training: NF4 with double quantization, LLM.int8, or 16 bit."""
    max_seq_length: Annotated[Int, Field(ge=16)] = 2048
    """Longest conversation in tokens; `data.too_long` says what becomes of a longer one."""
    chat_template: Place = "auto"
    """`auto` for the tokenizer's own chat template; or a family's name (chatml, llama-3, llama-3.1,
    gemma, mistral, phi-3, phi-4, llama-2, alpaca, vicuna, zephyr); or the path of a .jinja file; or a prompt
    format with {instruction} or {input}, {output}, and {system} where wanted."""
    template_date: date | None = None
    """The day that a template which writes today's date writes instead; 2025-01-01 where unset."""


RecordFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]


class Source(Section):
    source: Place
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt, each also as .gz or .zst), a folder of
    such files, or a glob; here, in S3 (`s3://bucket/path`) or on the Hub
    (`hf://owner/name[@revision][/path]`)."""
    format: Literal["auto"] | RecordFormat = "auto"
    """The records' format; `auto` looks at the first record's fields."""
    columns: dict[str, str] = {}
    """Names of this source's fields, where they are not the format's own: `output: answer` takes
    `output` from the field `answer`."""
    limit: Annotated[Int, Field(ge=1)] | None = None
    """Use only the first so many records."""
    weight: Annotated[Float, Field(gt=0)] = 1.0
    """How often each conversation of this source is trained in an epoch: 2 is twice, 0.5 half of
    them. In `data.replay`: how much likelier its conversations are drawn than another source's.
    Never applied to evaluation."""
    split: str | None = None
    """The split to use. On the Hub the data set says which files are of it; in a folder those that
    are named after it: train, test, ..."""
    config: str | None = None
    """The configuration of a data set on the Hub, where it has several."""


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


# A bare path stands for a source, and one source for a list of one, so that
# LORAJOB__DATA__TRAIN=chats.jsonl is all a `docker run` needs.
OneSource = Place | Source
Sources = Annotated[
    list[Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=OneSource)]],
    Field(min_length=1),
    BeforeValidator(
        _as_list,
        json_schema_input_type=OneSource | Annotated[list[OneSource], Field(min_length=1)],
    ),
]


def _as_share(value: Any) -> Any:
    if isinstance(value, str) and (share := share_of(value)) is not None:
        raise ValueError(f"a share is a number: write {share:g}")
    if isinstance(value, str) and re.fullmatch(r"\s*\d*\.?\d+\s*", value):
        raise ValueError("a share is a number: remove the quotes")
    return value


class Replay(Section):
    sources: Sources
    """Data like that which the base learned from: texts, of which each token is trained, or
    conversations, which are labelled as those of `data.train`. Of a text longer than
    `model.max_seq_length` its beginning is used."""
    share: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    """Their part of all trained tokens, which is their weight in the loss. As many conversations as
    that takes are drawn by the seed, each once at the most, and mixed with the others."""


class Data(Section):
    train: Sources
    """Where the conversations come from: a path or address, a source with its fields, or a list of
    these, which are read one after another."""
    eval: Annotated[
        Annotated[Float, Field(ge=0, lt=1)] | Sources,
        BeforeValidator(
            _as_share, json_schema_input_type=Annotated[Float, Field(ge=0, lt=1)] | Sources
        ),
    ] = 0.0
    """About which share of the conversations is held out for evaluation (each is drawn for itself, so
    that more data move none), or sources of their own."""
    retention: Sources | None = None
    """What the model should not get worse at: texts or conversations, never trained on, whose loss is
    measured before and after the training. Of a text every token counts; of one longer than
    `model.max_seq_length` its beginning is used."""
    retention_limit: Annotated[Float, Field(gt=0)] = 0.1
    """The run warns where the loss on a source of `retention` rises by more than so many nats a
    token. 0.1 is a perplexity 10.5 % higher."""
    replay: Replay | None = None
    """Mix such data into the training, so that the model forgets less."""
    loss_on: Literal["responses", "last_response", "all"] = "responses"
    """What is trained: every assistant turn with its end-of-turn token, only the last, or all."""
    too_long: Literal["drop", "truncate", "fail"] = "drop"
    """What becomes of a conversation longer than `model.max_seq_length`: left out; cut after its
    last whole answer that fits; or the run ends. An answer is never cut, a plain text is."""
    skip_bad_rows: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """The share of rows that may be unusable and are left out; more of them end the run. With 0
    every unusable row does."""


def _as_targets(value: Any) -> Any:
    if value == "all-linear" or isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise ValueError("all-linear is wanted, or names of modules, as [q_proj, v_proj]")
    if re.fullmatch(r"all([-_ ]?linear)?", value.strip(), re.IGNORECASE):
        raise ValueError("every linear layer is written all-linear")
    return _names(value)


Targets = Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]


class Lora(Section):
    rank: Annotated[Int, Field(ge=1, le=1024)] = 16
    """Rank of the two low-rank matrices."""
    alpha: Annotated[Float, Field(gt=0)] = 16
    """The update is scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of each LoRA layer while training."""
    target: Annotated[
        Targets, BeforeValidator(_as_targets, json_schema_input_type=Targets | str)
    ] = "all-linear"
    """Which layers get LoRA: every linear layer but the output head, or names of modules, such as
    `[q_proj, v_proj]`."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that a high rank learns as fast as a low one."""
    dora: bool = False
    """Train each layer's magnitude apart from its direction (DoRA): a little better at low ranks,
    and slower."""
    loftq: bool = False
    """Begin with the matrices that make up for what 4-bit loading took off the weights (LoftQ)."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases are trained: none, those of layers with LoRA, or all."""
    modules_to_save: Names = []
    """Modules that are trained whole and saved with the adapter: embed_tokens, lm_head, norms."""


class EarlyStopping(Section):
    patience: Annotated[Int, Field(ge=1)] = 3
    """So many evaluations one after another without a lower loss end the training."""
    min_delta: Annotated[Float, Field(ge=0)] = 0.0
    """By how much the loss must have fallen since the last that counted as lower, in nats."""


class Train(Section):
    objective: Literal["sft"] = "sft"
    """What is learnt. `sft`, supervised fine-tuning, is all there is so far."""
    epochs: Annotated[Float, Field(gt=0)] = 1
    """Passes over the training data; `max_steps` wins over it."""
    max_steps: Annotated[Int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps."""
    batch_size: Annotated[Int, Field(ge=1)] = 8
    """Conversations in one optimizer step; with `packing`, rows filled with conversations. How
    many go through the GPU at a time is the job's to choose."""
    packing: bool = False
    """Fill rows of `max_seq_length` tokens with whole conversations, which do not see each other."""
    group_by_length: bool = False
    """Let conversations of like length share a step."""
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    """The highest learning rate, reached after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup: Annotated[Float, Field(ge=0)] = 0.03
    """Warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay, on the LoRA matrices."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW with 32-bit states, or bitsandbytes' with 8-bit states; `paged_` ones move their states
    to the machine's memory when the GPU's runs short."""
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    eval_every: Annotated[Int, Field(ge=1)] | None = None
    """Evaluate every so many steps; without it, once per epoch."""
    early_stopping: EarlyStopping | None = None
    """End the training when the loss on the held-out data (`data.eval`) falls no more; `{}` for the
    defaults."""
    keep_best: bool | None = None
    """Export the weights of the evaluation with the lowest loss, not the last ones. Unset: with
    `early_stopping` the best, otherwise the last."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 3407
    """Seed of everything random: LoRA's start, dropout, the order of the data, the split."""
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    """What runs the model: `auto` is unsloth on a GPU, transformers elsewhere."""

    @property
    def keeps_best(self) -> bool:
        return self.early_stopping is not None if self.keep_best is None else self.keep_best


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


AnyGgufType = Annotated[GgufType, BeforeValidator(_lower, json_schema_input_type=GgufType | _Upper)]


class Export(Section):
    adapter: Literal[True] = True
    """The LoRA adapter in peft's format; it is what training makes, so it is always there."""
    merged: Literal["16bit", "4bit"] | None = "16bit"
    """The base with the adapter merged in, as safetensors: in 16 bit, or in bitsandbytes' 4 bit (NF4
    with double quantization), which transformers loads as it is; null for none."""
    merge_base: Literal["auto", "original", "dequantized"] = "auto"
    """What the adapter is merged into where the base was loaded in 4 or 8 bit: its original weights,
    or those that it was trained on, dequantized. `auto` is dequantized for 16 bit, which is nearer to
    what was trained, and original for 4 bit: quantizing what was quantized before rounds a small
    update away."""
    gguf: Annotated[
        list[AnyGgufType],
        BeforeValidator(_names, json_schema_input_type=GgufType | _Upper | list[GgufType | _Upper]),
    ] = []
    """GGUF files to make, by llama.cpp's names: q8_0, q4_k_m, ..."""
    imatrix: bool = False
    """Quantize with an importance matrix, made by sending some of the training data through the model:
    what the run's own conversations use is kept best. Types of fewer than four bits gain most, and
    the smallest (iq3_xs, iq3_xxs, iq2_*, iq1_*, q2_k_s) cannot be made without."""
    gguf_max_gib: Annotated[Float, Field(gt=0)] | None = 46.0
    """A GGUF file larger than this is split into several, NAME-Q8_0-00001-of-00002.gguf and so on,
    of which llama.cpp is given the first: the Hub takes no file over 50 GB. null for never."""
    adapter_gguf: bool = False
    """The adapter alone as GGUF too, for `llama-server --lora` on the base's own GGUF."""

    @model_validator(mode="after")
    def _gguf_needs_merged(self) -> Self:
        if (self.gguf or self.adapter_gguf) and self.merged != "16bit":
            what = "gguf is made from" if self.gguf else "adapter_gguf is proven on"
            raise ValueError(f"{what} 16-bit merged weights: set merged to 16bit")
        if len(set(self.gguf)) != len(self.gguf):
            raise ValueError("gguf names a type twice")
        needing = [kind for kind in self.gguf if kind in NEED_IMATRIX]
        if needing and not self.imatrix:
            raise ValueError(
                f"gguf: {', '.join(needing)} cannot be made without an importance matrix: set imatrix "
                "to true, or choose iq3_m, iq3_s, q2_k or a larger type"
            )
        return self

    @property
    def needs_llama_cpp(self) -> bool:
        return bool(self.gguf) or self.adapter_gguf

    @property
    def asks_for_llama_cpp(self) -> str:
        """The field that does, for messages."""
        return "export.gguf" if self.gguf else "export.adapter_gguf"

    def into_dequantized(self, load_in: str, loftq: bool) -> bool:
        """Whether the adapter is merged into the base as it was held while training."""
        if load_in == "16bit" or self.merge_base == "original":
            return False
        return self.merge_base == "dequantized" or self.merged == "16bit" or loftq


class Checkpoints(Section):
    every_minutes: Annotated[Float, Field(gt=0)] = 10.0
    """Write a checkpoint after so many minutes of training; also one whenever the run is stopped."""
    every_steps: Annotated[Int, Field(ge=1)] | None = None
    """Write one after so many steps, too."""
    keep: Annotated[Int, Field(ge=1)] = 2
    """How many of the newest are kept until the run is done."""
    to: Place | None = None
    """Where they go besides the run's own folder, so that another machine finds them: a folder or
    `s3://bucket/prefix`. Unset: the first such target of `publish`."""
    if_changed: Literal["fail", "restart"] = "fail"
    """What becomes of the checkpoints of an unfinished run whose spec, base or data have changed
    since: the run ends and says what changed, or they are removed and training begins anew."""


class Limits(Section):
    grace_seconds: Annotated[Int, Field(ge=5)] = 120
    """Time between being told to stop (SIGTERM) and being killed; a Kubernetes pod's
    terminationGracePeriodSeconds."""
    stall_minutes: Annotated[Float, Field(gt=0)] | None = 30.0
    """A run that makes no progress for so long writes down what it was doing and ends with code 10;
    null for never."""
    retry_minutes: Annotated[Float, Field(gt=0)] = 10.0
    """How long a failing service is tried again."""
    gpu_memory_gib: Annotated[Float, Field(gt=0)] | None = None
    """The most of the GPU's memory, in GiB, that the run may use: for a card that is shared."""
    gpu: GpuName | None = None
    """The GPU that `check` reckons with, where the run will have another than the one that `check`
    finds. Unset: the one in this machine; without one, `check` says what the run takes and no more."""
    lease_seconds: Annotated[Int, Field(ge=5, le=3600)] = 60
    """How long a run that was killed keeps its place in a bucket: one of the same place that starts
    meanwhile waits so long. A run that cannot reach the bucket for so long stops."""


class Prompt(Section):
    ask: Annotated[str, Field(min_length=1)]
    """The user's turn."""
    system: str | None = None
    """A system prompt before it."""
    expect: str | None = None
    """Text that the tuned model's answer must contain, whatever the case of its letters."""


def _as_prompt(value: Any) -> Any:
    return {"ask": value} if isinstance(value, str) else value


Question = Annotated[str, Field(min_length=1)]
Prompts = Annotated[
    list[Annotated[Prompt, BeforeValidator(_as_prompt, json_schema_input_type=Prompt | Question)]],
    BeforeValidator(_text_as_list, json_schema_input_type=Question | list[Prompt | Question]),
]


class Verify(Section):
    prompts: Prompts = []
    """Questions put to the base, the tuned model and each GGUF; without any, the first
    conversations of the evaluation (or training) data are asked."""
    max_new_tokens: Annotated[Int, Field(ge=1)] = 128
    """The longest answer. One to a question of `prompts` that has not stopped by itself by then
    fails; of the answers to other questions, at least one has to stop."""
    max_kl: Annotated[Float, Field(gt=0)] | None = None
    """A GGUF file fails whose predictions of the trained tokens are further from the 16-bit GGUF's:
    mean KL divergence in nats per token. q8_0 is usually below 0.01, q4_k_m below 0.1."""
    max_perplexity_increase: Annotated[Float, Field(gt=0)] | None = None
    """A GGUF file fails whose perplexity on the trained tokens is higher than the 16-bit GGUF's by
    more than this share: 0.05 is 5 %."""


Tracker = Literal["wandb", "mlflow"]


class Observe(Section):
    track: Annotated[
        list[Tracker], BeforeValidator(_names, json_schema_input_type=Tracker | list[Tracker])
    ] = []
    """Experiment trackers that get the curves besides TensorBoard, whose files are always in the run's
    `logs/tensorboard`. Each has to be installed, and takes its address and credentials from its own
    environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI). One that fails stops no run."""
    metrics_port: Annotated[Int, Field(ge=1, le=65535)] | None = None
    """Serve Prometheus metrics on this port, under /metrics, while the run goes on; 9400 is a usual
    choice. null for not at all."""
    price_per_gpu_hour: Annotated[Float, Field(gt=0)] | None = None
    """What an hour of the machine costs, in any currency: the report then says what the run cost."""
    report_rows: Annotated[Int, Field(ge=0, le=20)] = 4
    """How many conversations of the training data the report shows, with what is trained of them; 0
    for none, where the report goes further than the data may."""


class HubTarget(Section):
    hub: Annotated[str, Field(pattern=REPOSITORY_PATTERN)]
    """The repository on the Hub, `owner/name` or `owner/name@branch`. The merged model stands at
    its root, the adapter and the GGUF files in folders beside it."""
    adapter: Annotated[str, Field(pattern=REPOSITORY_PATTERN)] | None = None
    """A repository of its own for the adapter, at its root."""
    gguf: Annotated[str, Field(pattern=REPOSITORY_PATTERN)] | None = None
    """A repository of its own for the GGUF files, at its root."""
    private: bool = True
    """Whether a repository that has to be made is private. One that exists stays as it is."""


class S3Options(Section):
    endpoint: Annotated[Place, Field(pattern=ENDPOINT_PATTERN)] | None = None
    """The server, where it is not AWS: https://minio.example.org:9000. Without it
    AWS_ENDPOINT_URL_S3 and the profile are looked at."""
    region: str | None = None
    """The region; without it the environment, the profile or the instance says it."""
    profile: str | None = None
    """A profile of the AWS configuration files, for its credentials and settings."""
    path_style: bool | None = None
    """Address buckets as paths, not as host names. Unset: wherever an endpoint is set."""
    checksums: bool = True
    """Send and check the checksums that S3 has since 2022. A server that knows none of them needs
    `false`; MD5 is used then."""
    encryption: Literal["AES256", "aws:kms"] | None = None
    """Ask the server to encrypt what is written, with its own keys or with the key service's."""
    kms_key: str | None = None
    """The key service's key, where it is not the default one."""
    storage_class: str | None = None
    """The storage class of what is written: STANDARD, STANDARD_IA, ..."""


class S3(S3Options):
    buckets: dict[str, S3Options] = {}
    """Other settings for single buckets, by their names; none of those above hold for such a bucket."""


def _publish_target(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("hub://", "hf://")):
        return {"hub": value.partition("://")[2]}
    if not isinstance(value, str | dict | HubTarget):
        raise ValueError("a folder, s3://bucket/prefix or hub: owner/name is wanted")
    return value


Target = Annotated[
    HubTarget | Place,
    BeforeValidator(_publish_target, json_schema_input_type=HubTarget | Place),
]


Publish = Annotated[
    list[Target],
    BeforeValidator(_text_as_list, json_schema_input_type=Place | list[HubTarget | Place]),
]


class Spec(Section):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The run's name: lower-case letters, digits, dots and dashes, at most 53."""
    model: Model
    """The base model, how it is held, and how conversations become its text."""
    data: Data
    """What is trained, what is held out, and which tokens count."""
    lora: Lora = Lora()
    """The trainable matrices."""
    train: Train = Train()
    """The training itself."""
    export: Export = Export()
    """What is made of the trained adapter. Each is verified before anything is published."""
    checkpoints: Checkpoints = Checkpoints()
    """What an interrupted training goes on with."""
    verify: Verify = Verify()
    """What the result has to prove."""
    observe: Observe = Observe()
    """Who is told about the run while it goes on, and what its report shows."""
    publish: Publish = []
    """Where the results go: a folder, `s3://bucket/prefix`, or `hub: owner/name` (or
    `hub://owner/name`). The run's own folder has them too, unless an
    earlier start had published everything already: then nothing is made again."""
    s3: S3 = S3()
    """How S3 is reached. Credentials are never here: they come from the environment, from mounted
    files or from the machine's role."""
    limits: Limits = Limits()
    """Time, memory and patience."""

    @model_validator(mode="after")
    def _options_that_go_together(self) -> Self:
        if self.lora.loftq and self.model.load_in != "4bit":
            raise ValueError("lora.loftq makes up for 4-bit loading: set model.load_in to 4bit")
        if self.lora.loftq and self.export.merge_base == "original":
            raise ValueError(
                "with lora.loftq the adapter holds what 4-bit loading took off the weights, which the "
                "original ones still have: set export.merge_base to auto or dequantized"
            )
        again = self.export.into_dequantized(self.model.load_in, self.lora.loftq)
        if self.export.merged == "4bit" and self.model.load_in == "4bit" and again:
            why = "lora.loftq" if self.lora.loftq else "export.merge_base: dequantized"
            raise ValueError(
                f"with {why}, export.merged: 4bit would quantize what was quantized before, which "
                "rounds small updates away: set merged to 16bit or null"
            )
        if self.export.adapter_gguf and (
            self.lora.dora or self.lora.modules_to_save or self.lora.bias != "none"
        ):
            raise ValueError(
                "export.adapter_gguf: llama.cpp's adapters hold the two low-rank matrices and no more, "
                "so lora.dora, lora.bias and lora.modules_to_save cannot go with it; use export.gguf"
            )
        for field in ("early_stopping", "keep_best"):
            if getattr(self.train, field) and not self.data.eval:
                raise ValueError(
                    f"train.{field} goes by the loss on held-out data: set data.eval, to 0.05 for "
                    "instance"
                )
        if self.train.group_by_length and self.train.packing:
            raise ValueError("train.group_by_length and train.packing exclude each other")
        return self


def json_schema() -> dict[str, Any]:
    """The spec's JSON schema (draft 2020-12), as published by `lorajob schema`."""
    schema = Spec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lorajob run spec"
    return schema
