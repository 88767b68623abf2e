"""The `transformers` engine: the base model in 4, 8 or 16 bit, with LoRA on it.

The reference for every other engine, and the only one without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime, time
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTConfig, SFTTrainer

from jobs.data.conversation import BadRow
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import AccessError
from jobs.spec import Model, Spec
from jobs.train import attention, lora
from jobs.train.batches import FlatBatch
from jobs.train.modules import head_refused
from jobs.train.runtime import compute_dtype

LoadIn = Literal["4bit", "8bit", "16bit"]

TRAINER: Any = SFTTrainer
ARGUMENTS: Any = SFTConfig


def arguments() -> dict[str, Any]:
    return {
        # The head's logits are computed for trained tokens only, some at a time: same mathematics.
        "loss_type": "chunked_nll",
        # The data is ready: TRL must neither prepare, cut, pack nor mask anything.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
    }


def load(folder: Path, model: Model, device: str) -> PreTrainedModel:
    return load_model(folder, model.load_in, device)


def load_model(folder: Path, load_in: LoadIn, device: str) -> PreTrainedModel:
    """The model in `folder`, ready to compute on `device`.

    `4bit` is NF4 with double quantization (Dettmers et al. 2023, QLoRA, section 3), `8bit` LLM.int8
    (Dettmers et al. 2022).
    Raises AccessError where transformers cannot load it.
    """
    dtype = compute_dtype(device)
    quantization = None
    if load_in == "4bit":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif load_in == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Gemma 2's scores are soft-capped, which transformers' SDPA leaves out without a word.
        softcapped = getattr(config, "attn_logit_softcapping", None)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="eager" if softcapped else None,
            # None would hide what config.json says of weights that are quantized already.
            **({"quantization_config": quantization} if quantization else {}),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise AccessError(
            f"{folder} could not be loaded as a model: {_first_line(error)}",
            "fetch the base model again; it must be a causal language model with safetensors weights",
        ) from None
    _keep_weights_in_place(model)
    if load_in == "8bit":
        _keep_scales(model)
    return model


def _keep_weights_in_place(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    bitsandbytes 0.50.2 repacks them in place at the first forward in eval mode, and training after
    it is silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _keep_scales(model: PreTrainedModel) -> None:
    """Have 8-bit layers keep their scales where DoRA asks for their weights on a CPU.

    peft 0.21 puts each weight back as a new parameter, which has the numbers and no scales any more;
    bitsandbytes would take both from it at the next forward.
    """
    from bitsandbytes.nn import Linear8bitLt

    def pass_by(layer: Any, _: Any) -> None:
        if layer.weight.SCB is None:  # the layer's state has both already
            layer.weight.CB = None

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(pass_by)


def quantized_modules(model: torch.nn.Module) -> list[str]:
    """Names of the modules whose weights are held in 4 bit, as in the checkpoint."""
    from bitsandbytes.nn import Linear4bit

    return sorted(name for name, module in model.named_modules() if isinstance(module, Linear4bit))


def add_lora(model: PreTrainedModel, spec: Spec, base: Path) -> PeftModel:
    """Freeze the model and put trainable LoRA matrices on its linear layers."""
    for parameter in model.parameters():
        # Only what this needs of peft's prepare_model_for_kbit_training, which would also cast
        # every frozen 16-bit weight to float32.
        parameter.requires_grad = False
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=spec.lora.target, **lora.options(spec.lora, model)
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise lora.wrong_option(error) from None
    assert isinstance(peft_model, PeftModel)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise head_refused()
    if spec.lora.loftq:
        lora.start_with_loftq(peft_model, base, spec.train.seed)
    # The folder, not its name on the Hub: peft would ask there at every checkpoint.
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    return peft_model


def set_checkpointing(model: Any, wanted: bool) -> None:
    if wanted:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def with_logits() -> AbstractContextManager[None]:
    return nullcontext()


def lay_out(model: Any) -> tuple[FlatBatch, str, str | None]:
    kernel, slow = attention.attend_apart(model)
    return FlatBatch(told="boundaries"), kernel, slow


def train_in_float32(model: torch.nn.Module) -> None:
    """Hold the trainable weights in float32.

    TRL casts them to bfloat16 on a quantized base, where small updates are lost, and a resumed run
    would reload them as float32 and differ. To be called after the trainer is built.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_hf_tokenizer(folder: Path, tokenizer: ChatTokenizer) -> PreTrainedTokenizerBase:
    """transformers' tokenizer, with the template of the run, proven to encode as ours does.

    It is the one that ships and that everybody will use, so what it makes of a text must be what
    the model was trained on. Raises AccessError where the two differ.
    """
    hf: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    hf.chat_template = tokenizer.template.source
    text = theirs = " Hello,  world 1234!\n\tÄ 你好 🚀 It's a test: <b>naïve</b> café."
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    today = datetime.combine(tokenizer.template.today, time()).strftime
    with suppress(BadRow):  # a template that takes no such conversation is compared as text alone
        text = tokenizer.template.render(messages)
        theirs = hf.apply_chat_template(messages, tokenize=False, strftime_now=today)
    ids = hf(text, add_special_tokens=False)["input_ids"]
    if theirs != text or ids != tokenizer.ids_of(text):
        raise AccessError(
            f"transformers reads the tokenizer in {folder} otherwise than its tokenizer.json says, so "
            "what is trained would not be what is used",
            "save the tokenizer again with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return hf


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
