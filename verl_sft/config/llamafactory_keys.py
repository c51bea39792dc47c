"""What becomes of each argument of a LLaMA-Factory file: the table behind docs/llamafactory.md.

Known are the arguments of LLaMA-Factory 0.9 and those of transformers' trainer that it hands on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "cutoff_len": 2048,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "seed": 42,
    "save_strategy": "steps",
    "save_steps": 500,
    "finetuning_type": "lora",
    "optim": "adamw_torch",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine",  # with one cycle
    "polynomial": "linear",  # with power 1
}
# Their optimizers, as library and class.
_TORCH, _BNB, _AO = "torch.optim", "bitsandbytes.optim", "torchao.optim"
OPTIMIZERS = {
    "adamw_torch": (_TORCH, "AdamW"),
    "adamw_torch_fused": (_TORCH, "AdamW"),
    "adamw_hf": (_TORCH, "AdamW"),
    "adamw_torch_8bit": (_AO, "AdamW8bit"),
    "adamw_torch_4bit": (_AO, "AdamW4bit"),
    "adamw_8bit": (_BNB, "AdamW8bit"),
    "adamw_bnb_8bit": (_BNB, "AdamW8bit"),
    "paged_adamw": (_BNB, "PagedAdamW32bit"),
    "paged_adamw_32bit": (_BNB, "PagedAdamW32bit"),
    "paged_adamw_8bit": (_BNB, "PagedAdamW8bit"),
    "ademamix": (_BNB, "AdEMAMix32bit"),
    "ademamix_8bit": (_BNB, "AdEMAMix8bit"),
    "paged_ademamix_32bit": (_BNB, "PagedAdEMAMix32bit"),
    "paged_ademamix_8bit": (_BNB, "PagedAdEMAMix8bit"),
    "lion_32bit": (_BNB, "Lion32bit"),
    "lion_8bit": (_BNB, "Lion8bit"),
    "paged_lion_32bit": (_BNB, "PagedLion32bit"),
    "paged_lion_8bit": (_BNB, "PagedLion8bit"),
    "rmsprop": (_TORCH, "RMSprop"),
    "rmsprop_bnb": (_BNB, "RMSprop"),
    "rmsprop_bnb_8bit": (_BNB, "RMSprop8bit"),
    "rmsprop_bnb_32bit": (_BNB, "RMSprop32bit"),
    "sgd": (_TORCH, "SGD"),
    "adagrad": (_TORCH, "Adagrad"),
    "adafactor": (_TORCH, "Adafactor"),
}
LOGGERS = ("wandb", "mlflow", "swanlab", "trackio", "clearml")
KERNELS = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
# What the chat templates of a family hold, by the beginning of their template's name there.
MARKS = {
    "qwen": "<|im_start|>",
    "chatml": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "llama2": "[INST]",
    "mistral": "[INST]",
    "gemma": "<start_of_turn>",
    "glm4": "<|user|>",
    "phi4_mini": "<|end|>",
    "deepseek3": "<\uff5cAssistant\uff5c>",
    "deepseekr1": "<\uff5cAssistant\uff5c>",
    "gpt_oss": "<|channel|>",
}
# Their argument -> our key, the value as it is.
SAME = {
    "model_name_or_path": "model.partial_pretrain",
    "trust_remote_code": "model.trust_remote_code",
    "enable_liger_kernel": "model.use_liger",
    "use_liger_kernel": "model.use_liger",
    "use_rslora": "model.use_rslora",
    "use_dora": "model.use_dora",
    "neftune_noise_alpha": "model.neftune_noise_alpha",
    "loraplus_lr_ratio": "optim.loraplus_lr_ratio",
    "cutoff_len": "data.max_length",
    "mask_history": "data.mask_history",
    "preprocessing_num_workers": "data.num_workers",
    "val_size": "data.val_size",
    "torch_compile": "engine.use_torch_compile",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip_grad",
    "warmup_ratio": "optim.lr_warmup_steps_ratio",
    "save_total_limit": "trainer.max_ckpt_to_keep",
    "logging_steps": "trainer.log_freq",
    "early_stopping_steps": "trainer.early_stop_patience",
    "load_best_model_at_end": "trainer.export_best",
    "run_name": "trainer.experiment_name",
    "seed": "trainer.seed",
    "output_dir": "trainer.default_local_dir",
}
# Arguments that say the same in other words, and what they become.
READ = {
    "stage": "sft is what this command does; every other stage is refused",
    "dataset": "data.train_files, looked up in dataset_info.json",
    "eval_dataset": "data.val_files, looked up in dataset_info.json",
    "dataset_dir": "where dataset_info.json is: a folder, ONLINE (names on the hub), or a mapping",
    "eval_on_each_dataset": "data.val_files={name: files}",
    "max_samples": "max_rows of each source",
    "train_on_prompt": "data.prompt_weight=1",
    "preserve_thinking": "data.history_thinking=keep",
    "disable_shuffling": "data.shuffle=false",
    "finetuning_type": "full: model.lora_rank=0; lora; others are refused",
    "adapter_name_or_path": "model.lora_adapter_path; several are refused",
    "lora_rank": "model.lora_rank (8)",
    "lora_alpha": "model.lora_alpha (twice the rank)",
    "lora_dropout": "model.lora_dropout",
    "lora_target": "model.target_modules (all-linear)",
    "pissa_init": "model.lora_init=pissa",
    "quantization_bit": "4: model.quantization=nf4, 8: int8; others are refused",
    "quantization_method": "bnb is what model.quantization does; others are refused",
    "quantization_type": "nf4 is what model.quantization does; fp4 is refused",
    "disable_gradient_checkpointing": "model.enable_gradient_checkpointing=false",
    "gradient_checkpointing": "model.enable_gradient_checkpointing",
    "activation_checkpointing": "model.enable_gradient_checkpointing",
    "flash_attn": "model.attn_implementation",
    "per_device_train_batch_size": "data.micro_batch_size_per_gpu",
    "optim": "optim.optimizer and optim.optimizer_impl",
    "optim_args": "optim.override_optimizer_config",
    "use_muon": "optim.optimizer=Muon",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "lr_scheduler_type": "optim.lr_scheduler",
    "lr_scheduler_kwargs": "optim.min_lr_ratio, where it names a least rate",
    "warmup_steps": "optim.lr_warmup_steps; below 1 a share",
    "max_steps": "trainer.total_training_steps",
    "bf16": "engine.dtype=bf16",
    "pure_bf16": "engine.model_dtype=bf16, engine.dtype=bf16",
    "use_cpu": "trainer.device=cpu",
    "no_cuda": "trainer.device=cpu",
    "save_strategy": "trainer.save_freq",
    "save_steps": "trainer.save_freq",
    "eval_strategy": "trainer.test_freq",
    "evaluation_strategy": "trainer.test_freq",
    "eval_steps": "trainer.test_freq",
    "report_to": "trainer.logger; metrics.jsonl and TensorBoard are always written",
    "use_swanlab": "swanlab in trainer.logger",
    "resume_from_checkpoint": "trainer.resume_mode; true is ours by default",
}
# Arguments that mean something else here, and what.
CHANGED = {
    "template": "the model's own chat template is used; one that does not look like it is told",
    "enable_thinking": "handed to the chat template; no empty thought is put into answers",
    "gradient_accumulation_steps": "data.train_batch_size counts samples of all processes, not "
    "batches of padded or packed rows",
    "packing": "samples are always packed, and never see each other; batches count samples",
    "neat_packing": "samples are always packed, and never see each other; batches count samples",
    "num_train_epochs": "trainer.total_epochs, rounded up to whole epochs",
    "fp16": "engine.dtype=bf16: there is no fp16 here",
    "deepspeed": "the stage as FSDP2: 3 is engine.reshard_after_forward=true, below it false; "
    "offloading is engine.offload",
    "fsdp": "full_shard: engine.reshard_after_forward=true, shard_grad_op: false; offload: "
    "engine.offload",
    "fsdp_config": "layers are one unit each; the rest decides nothing here",
    "metric_for_best_model": "trainer.best_metric; val/loss for what is not measured here",
    "overwrite_output_dir": "a run in that directory goes on, another one is refused; nothing is "
    "overwritten",
    "split_special_tokens": "special tokens in texts are always split (data."
    "special_tokens_in_content), unless it is set to allow",
    "pissa_iter": "the decomposition is exact",
    "save_only_model": "checkpoints hold what a resume needs; the export is the model alone",
    "data_seed": "trainer.seed decides the order",
    "average_tokens_across_devices": "the loss is the mean over all learned tokens of a step",
    "group_by_length": "packing balances lengths; the order stays random",
    "train_sampling_strategy": "packing balances lengths; the order stays random",
    "logging_first_step": "every step is in metrics.jsonl; trainer.log_freq is of the console",
}


def _named(reasons: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in reasons.items() for name in names.split()}


# Arguments without a counterpart that change nothing that is learned, by the reason.
IDLE = _named(
    {
        "this command trains": "do_train do_predict ray_run_name task task_dir lang n_shot "
        "batch_size save_dir download_mode",
        "validation runs wherever there are validation rows": "do_eval eval_delay eval_on_start "
        "eval_accumulation_steps prediction_loss_only include_for_metrics "
        "include_inputs_for_metrics batch_eval_metrics eval_do_concat_batches "
        "eval_use_gather_object compute_accuracy label_names greater_is_better bf16_full_eval "
        "fp16_full_eval",
        "validation has the micro-batches of training": "per_device_eval_batch_size "
        "per_gpu_eval_batch_size",
        "only generation uses it": "predict_with_generate generation_max_length "
        "generation_num_beams generation_config sortish_sampler eval_num_beams do_sample "
        "temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty "
        "length_penalty skip_special_tokens infer_backend infer_dtype use_kv_cache use_cache "
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config "
        "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        "only other stages use it": "pref_beta pref_ftx pref_bco_weight pref_loss "
        "dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size "
        "ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters "
        "ref_model_quantization_bit reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type ld_alpha",
        "only a way of training that is refused uses it": "freeze_trainable_layers "
        "freeze_trainable_modules freeze_extra_modules module_dropout oft_rank oft_block_size "
        "oft_target galore_target galore_rank galore_update_interval galore_scale "
        "galore_proj_type galore_layerwise apollo_target apollo_rank apollo_update_interval "
        "apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise "
        "apollo_scale_front badam_mode badam_start_block badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose asft_alpha "
        "eaft_alpha optim_target_modules fp8_backend fp8_enable_fsdp_float8_all_gather "
        "init_special_tokens hyper_parallel_args",
        "a token cache is never used for other data or settings": "overwrite_cache "
        "tokenized_path data_shared_file_system",
        "rows are streamed, and tokenised once": "streaming buffer_size preprocessing_batch_size "
        "remove_unused_columns length_column_name ignore_pad_token_for_loss",
        "training is on text": "media_dir image_max_pixels image_min_pixels "
        "image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps "
        "video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector",
        "batches are read from a mapped file, without workers": "dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order accelerator_config "
        "split_batches dispatch_batches",
        "the last batch of an epoch is never dropped": "dataloader_drop_last",
        "tools are rendered by the chat template": "tool_format",
        "interleaving is refused": "interleave_probs",
        "adapters are exported as PEFT or merged": "pissa_convert",
        "embeddings get no adapter": "loraplus_lr_embedding",
        "a tokenizer that does not fit the model is refused": "resize_vocab",
        "only fast tokenizers are read": "use_fast_tokenizer",
        "the compiler's defaults are used": "torch_compile_backend torch_compile_mode torchdynamo",
        "layers are recomputed without reentrance": "use_reentrant_gc "
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_unsloth_gc",
        "attention, norms and loss have kernels of their own": "use_unsloth use_v1_kernels "
        "liger_kernel_config upcast_layernorm upcast_lmhead_output",
        "engine.meta_start decides": "low_cpu_mem_usage device_map offload_folder "
        "quantization_device_map",
        "model.quantization is always double": "double_quantization",
        "engine.fp32_matmul decides": "tf32",
        "training is by torch FSDP2 alone": "use_mca use_hyper_parallel parallelism_config "
        "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ddp_backend sharded_ddp xpu_backend tpu_num_cores tpu_metrics_debug "
        "mp_parameters use_ipex use_mps_device half_precision_backend fp16_backend "
        "fp16_opt_level jit_mode_eval past_index use_legacy_prediction_loop",
        "no rank waits for another one's preprocessing": "ddp_timeout",
        "torchrun decides": "ray_num_workers ray_init_kwargs ray_scope master_addr master_port "
        "ray_storage_path ray_storage_filesystem resources_per_worker placement_strategy",
        "torch's own profilers can be attached from outside": "enable_torch_profiler "
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
        "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack "
        "profile_modules debug skip_memory_metrics",
        "loss.png and metrics.jsonl are always written": "plot_loss include_num_input_tokens_seen "
        "include_tokens_per_second include_effective_tokens_per_second logging_strategy "
        "logging_dir logging_nan_inf_filter log_level log_level_replica log_on_each_node "
        "disable_tqdm print_param_status",
        "the tracker's own environment variables decide": "swanlab_project swanlab_workspace "
        "swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url "
        "swanlab_lark_secret project trackio_space_id trackio_bucket_id trackio_static_space_id",
        "a checkpoint is of all ranks, and resumes exactly": "save_on_each_node save_safetensors "
        "ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint",
        "runs are repeatable on the CPU; on GPUs kernels decide": "full_determinism",
        "memory is planned for the longest sample": "auto_find_batch_size torch_empty_cache_steps",
        "HF_HOME and HF_TOKEN decide": "cache_dir hf_hub_token ms_hub_token om_hub_token hub_token",
        "trainer.upload_uri decides": "push_to_hub hub_model_id hub_strategy hub_private_repo "
        "hub_always_push hub_revision push_to_hub_model_id push_to_hub_organization "
        "push_to_hub_token",
        "trainer.export and verl-sft export write the model": "export_dir export_size "
        "export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format "
        "export_hub_model_id",
        "the trainer sets it itself": "compute_dtype model_max_length block_diag_attn "
        "adapter_folder kt_weight_path kt_expert_checkpoint_path "
        "kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size",
    }
)
# Arguments that would make it another training, and what to do instead.
REFUSED = {
    "mix_strategy": "Concatenate, and say shares: data.train_files=[{path: ..., fraction: ...}]",
    "default_system": "Write the system prompt into the rows",
    "model_revision": "Download that revision, and give its folder",
    "rope_scaling": "Write rope_scaling into the model's config.json",
    "shift_attn": "Take it out: attention is over the whole sample",
    "mixture_of_depths": "Take it out",
    "moe_aux_loss_coef": "Take it out: the loss is the cross entropy alone",
    "train_from_scratch": "Start from weights; verl-sft make-model writes small random ones",
    "add_tokens": "Add them to model and tokenizer beforehand",
    "add_special_tokens": "Add them to model and tokenizer beforehand",
    "new_special_tokens_config": "Add them to model and tokenizer beforehand",
    "additional_target": "Take it out: beside adapters no other layer is trained",
    "create_new_adapter": "Merge the old adapter first: verl-sft export",
    "use_llama_pro": "Use finetuning_type: full or lora",
    "use_galore": "Use optim: adamw_8bit to save memory",
    "use_apollo": "Use optim: adamw_8bit to save memory",
    "use_badam": "Use finetuning_type: lora to save memory",
    "use_adam_mini": "Use optim: adamw_8bit to save memory",
    "use_dft_loss": "Take it out: the loss is the cross entropy",
    "use_asft_loss": "Take it out: the loss is the cross entropy",
    "use_eaft_loss": "Take it out: the loss is the cross entropy",
    "label_smoothing_factor": "Take it out: the loss is the cross entropy",
    "freeze_language_model": "Take it out: it would leave nothing to train",
    "use_kt": "Take it out: experts are not placed in host memory",
    "fp8": "Use bf16",
    "per_gpu_train_batch_size": "Use per_device_train_batch_size",
    "adafactor": "Use optim: adafactor",
}
_KINDS = {
    "mapped": {**{name: f"`{key}`" for name, key in SAME.items()}, **READ},
    "changes meaning": CHANGED,
    "no counterpart": IDLE,
    "refused": REFUSED,
}


def arguments() -> Iterator[tuple[str, str, str]]:
    """Name, kind and what becomes of it, for every argument that is known."""
    for kind, table in _KINDS.items():
        for name, text in table.items():
            yield name, kind, text


def asks_for(name: str, value: Any) -> bool:
    """Whether a value of a refused argument asks for anything."""
    harmless: dict[str, Any] = {"mix_strategy": "concat", "model_revision": "main"}
    return bool(value) and str(value).lower() != "none" and value != harmless.get(name)
