"""Names that other programs have for what the spec says, so that a spec written from habit gets the
right answer: transformers' TrainingArguments, TRL's SFTConfig, peft's LoraConfig, unsloth, Axolotl and
LLaMA-Factory.
"""

from __future__ import annotations

_STEP = (
    "train.batch_size is the whole step, and how much of it goes through the GPU at a time is the "
    "job's to choose"
)
_PRECISION = "bfloat16 is used where the GPU has it, and float16 where not; there is nothing to set"
_KERNELS = "it goes by train.engine and the GPU; there is nothing to set"
_LOGGED = "every step is logged"
_ONE_GPU = "a run uses one GPU"
_PUBLISH = "list the repository under publish, as `hub: owner/name`"
_LOADING = "the data are read and tokenized once, and kept; there is nothing to set"
_ADAM = "AdamW's betas and epsilon are the usual ones"
_BEST = "the best is the one with the lowest loss on data.eval: train.keep_best"
_WANDB = "W&B takes it from its own environment variables; observe.track turns it on"
_TOKENIZER = "the base's own tokenizer is used"
_WHEN_SAVED = "checkpoints.every_minutes and checkpoints.every_steps say when"
_LAYERS = "every layer of lora.target has the same rank and alpha"
_GOES_ON = "start the same run again: it goes on at its newest checkpoint"
_ALWAYS_TRAINS = "a run always trains; data.eval says what it is evaluated with"
_PLACE = "--work (or LORAJOB_WORK) is where runs are kept, and publish where results are sent"

# The field of the same meaning, with its whole path.
FIELDS = {
    field: path
    for path, fields in {
        "name": "run_name experiment_name",
        "model.base": "base_model_config model_name model_name_or_path base_model base_model_name "
        "base_model_name_or_path pretrained_model_name_or_path model_id model_path",
        "model.max_seq_length": "max_seq_len max_length model_max_length sequence_len seq_length "
        "seq_len cutoff_len block_size context_length",
        "model.chat_template": "template chat_template_path chat_template_jinja",
        "data.train": "dataset datasets dataset_name dataset_path train_dataset train_data train_file "
        "training_file data_path data_files",
        "data.eval": "eval_dataset test_datasets validation_file validation_data val_data val_size "
        "val_set_size test_size eval_size validation_split eval_split",
        "data.loss_on": "train_on_inputs train_on_prompt train_on_responses_only assistant_only_loss "
        "completion_only_loss mask_history roles_to_train",
        "data.train.limit": "max_samples max_train_samples",
        "data.train.split": "dataset_split train_split",
        "data.train.config": "dataset_config dataset_config_name",
        "lora": "peft peft_config lora_config",
        "lora.rank": "r lora_r lora_rank",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.target": "target_modules lora_target lora_target_modules lora_target_linear",
        "lora.rslora": "use_rslora peft_use_rslora",
        "lora.dora": "use_dora peft_use_dora",
        "lora.loftq": "loftq_config",
        "lora.bias": "lora_bias",
        "lora.modules_to_save": "lora_modules_to_save additional_target",
        "train": "training training_args training_arguments trainer trainer_args",
        "train.objective": "stage rl training_type",
        "train.epochs": "num_train_epochs num_epochs n_epochs",
        "train.learning_rate": "lr",
        "train.schedule": "lr_scheduler lr_scheduler_type scheduler scheduler_type",
        "train.weight_decay": "wd",
        "train.optimizer": "optim",
        "train.max_grad_norm": "gradient_clipping gradient_clip_val clip_grad_norm",
        "train.packing": "sample_packing neat_packing",
        "train.eval_every": "eval_steps",
        "train.seed": "random_state random_seed data_seed",
        "train.early_stopping.patience": "early_stopping_patience",
        "train.early_stopping.min_delta": "early_stopping_threshold",
        "train.keep_best": "load_best_model_at_end",
        "export.gguf": "quantization_method gguf_type gguf_types",
        "export.merged": "merge_lora save_merged save_method",
        "checkpoints.every_steps": "save_steps",
        "checkpoints.keep": "save_total_limit",
        "verify.prompts.ask": "question prompt user_prompt",
        "verify.prompts.expect": "expected_answer must_contain contains",
        "observe.track": "report_to",
    }.items()
    for field in fields.split()
}

# What is said of a name that no field stands for alone.
SAYINGS = {
    field: text
    for text, fields in {
        _STEP: "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size "
        "gradient_accumulation_steps gradient_accumulation auto_find_batch_size",
        "how many conversations are evaluated at a time is the job's to choose": (
            "per_device_eval_batch_size eval_batch_size eval_accumulation_steps"
        ),
        _PRECISION: "fp16 bf16 tf32 float16 bfloat16 dtype torch_dtype compute_dtype mixed_precision "
        "bnb_4bit_compute_dtype bf16_full_eval fp16_full_eval",
        _KERNELS: "flash_attention flash_attn attn_implementation xformers_attention sdp_attention "
        "torch_compile use_liger_kernel liger_kernel",
        "the job chooses it by the GPU's memory": (
            "gradient_checkpointing use_gradient_checkpointing gradient_checkpointing_kwargs"
        ),
        _LOGGED: "logging_steps logging_strategy logging_first_step",
        "TensorBoard's files are in the run's folder, under logs/tensorboard": (
            "logging_dir tensorboard"
        ),
        "the report shows the loss curve": "plot_loss",
        _ONE_GPU: "deepspeed fsdp fsdp_config ddp ddp_backend ddp_find_unused_parameters local_rank "
        "num_gpus n_gpu device_map",
        _PUBLISH: "push_to_hub push_to_hub_model_id hub_model_id hub_repo_id repo_id hub_private_repo "
        "hub_strategy",
        _LOADING: "dataloader_num_workers dataloader_pin_memory dataset_num_proc num_proc "
        "preprocessing_num_workers dataset_prepared_path overwrite_cache remove_unused_columns",
        _ADAM: "adam_beta1 adam_beta2 adam_epsilon betas eps",
        _BEST: "metric_for_best_model greater_is_better",
        _WANDB: "wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_log_model",
        _TOKENIZER: "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_type tokenizer_path "
        "special_tokens eos_token pad_token",
        _WHEN_SAVED: "save_strategy saves_per_epoch",
        "train.eval_every says after how many steps; without it, once per epoch": (
            "eval_strategy evaluation_strategy evals_per_epoch"
        ),
        _LAYERS: "rank_pattern alpha_pattern layers_to_transform layers_pattern",
        _GOES_ON: "resume_from_checkpoint resume auto_resume_from_checkpoints overwrite_output_dir",
        _ALWAYS_TRAINS: "do_train do_eval do_predict",
        _PLACE: "output_dir save_dir export_dir",
        "train.warmup is both: below 1 a share of all steps, from 1 on a number of steps": (
            "warmup_ratio warmup_steps"
        ),
        "everything is saved as safetensors": "save_safetensors",
        "lora.loftq: true is LoftQ's start; peft's own is used otherwise": (
            "init_lora_weights init_lora"
        ),
        "it is LoRA; with model.load_in: 4bit it is QLoRA": (
            "adapter finetuning_type full_finetuning use_peft"
        ),
        "it is a causal language model's": "task_type model_type is_llama_derived_model",
        "set model.load_in to 4bit, 8bit or 16bit": (
            "load_in_4bit load_in_8bit load_in_16bit quantization_bit use_4bit bnb_4bit_quant_type "
            "bnb_4bit_use_double_quant bits"
        ),
        "model.load_in says how the base is held while training, and export.gguf which files are made": (
            "quantization quantization_config quantize"
        ),
        "say it in data.train, as {source: FILE, format: text, columns: {text: FIELD}}": (
            "dataset_text_field text_column text_field"
        ),
        "write it after the name: model.base: owner/name@revision": (
            "revision model_revision revision_of_model hub_revision"
        ),
        "code that comes with a model is never run": "trust_remote_code",
        "there is none": "neftune_noise_alpha noisy_embedding_alpha label_smoothing_factor "
        "label_smoothing",
        "train.schedule has no options": "lr_scheduler_kwargs cosine_min_lr_ratio",
    }.items()
    for field in fields.split()
}


def meant_by(name: str) -> str | None:
    """What to write for another program's name; None for one that is not known."""
    name = name.lower().replace("-", "_")
    if name in FIELDS:
        return f"it is called {FIELDS[name]} here"
    return SAYINGS.get(name)
