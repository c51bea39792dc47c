"""What `train` can be told: the legacy verl keys are canonical, `dialects.py` maps the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl_sft.config.checks import (
    above,
    at_least,
    between,
    file_size,
    fraction,
    one_of,
    rows_or_all,
)
from verl_sft.config.secrets import hide, hide_all
from verl_sft.config.sources import AgentRLConfig, MongoConfig, RawConfig
from verl_sft.errors import UsageError


@dataclass
class MultiturnConfig:
    """Train whole conversations instead of prompt/response pairs."""

    enable: bool = False  # false: prompt and response columns
    messages_key: str = "messages"  # column of the conversation
    tools_key: str = "tools"  # of the rows: their tool definitions
    enable_thinking_key: str = "enable_thinking"  # of the rows: whether the template thinks


@dataclass
class MaskConfig:
    """Weight of each part of a learned assistant message."""

    reasoning: float = 1.0  # thoughts
    tool_call: float = 1.0  # tool calls
    content: float = 1.0  # the rest

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            at_least(f"data.mask.{name}", weight, 0)


@dataclass
class DataConfig:
    """Rows in, micro-batches out."""

    train_files: Any = None  # a path, a list, a glob or an sft_data directory
    val_files: Any = None  # also {name: files}; default: val.parquet beside train.parquet, or none
    val_size: float = 0.0  # rows of train_files held out, by group: below 1 a share, else a count
    val_seed: int = 1  # of what val_size holds out
    format: str = "auto"  # of the rows: a name (convert --help lists them) or file.py:function
    mask_history: bool | None = None  # learn last answers only; null: as the format has it
    train_batch_size: int = 256  # samples per optimizer step, over all ranks
    micro_batch_size_per_gpu: int = 4  # samples; packed, of max_length tokens each
    max_token_len_per_gpu: int | None = None  # default: micro_batch_size_per_gpu * max_length
    max_length: int = 1024  # tokens of one sample
    truncation: str = "error"  # error | left | right | drop | oldest_turns
    prompt_key: str = "prompt_data"  # column of the prompt, if not multiturn
    response_key: str = "response_data"  # column of what is learned
    prompt_dict_keys: list[str] | None = None  # path walked into a struct column
    response_dict_keys: list[str] | None = None  # the same for the response
    multiturn: MultiturnConfig = field(default_factory=MultiturnConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    agentrl: AgentRLConfig = field(default_factory=AgentRLConfig)
    raw: RawConfig = field(default_factory=RawConfig)
    mongo: MongoConfig = field(default_factory=MongoConfig)
    prompt_weight: float = 0.0  # of the tokens outside assistant messages; 0: context only
    turn_view: str = "auto"  # auto | single_pass | per_turn | last | indices
    history_thinking: str = "template"  # template | keep | strip
    train_on_eot_newline: bool = True  # learn what the template prints behind a stop token
    special_tokens_in_content: str = "escape"  # escape | error | allow
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the template
    train_max_samples: int = -1  # -1: all
    val_max_samples: int = -1  # -1: all
    shuffle: bool = True  # a new order in each epoch
    shuffle_unit: str = "conversation"  # conversation | neighbours that share half their tokens
    prefix_sharing: str = "auto"  # auto | true | false: common prefixes in a row computed once
    max_reject_fraction: float = 0.05  # of unusable rows; beyond it the run is refused
    num_workers: int | None = None  # tokenising processes; default: the number of cores
    cache_dir: str | None = None  # token cache; default <run directory>/token_cache
    token_cache: str = "build"  # build | require: a missing or stale one is refused with a diff

    def __post_init__(self) -> None:
        self.train_files, self.val_files = hide_all(self.train_files), hide_all(self.val_files)
        one_of("data.truncation", self.truncation, _TRUNCATION)
        one_of("data.shuffle_unit", self.shuffle_unit, ("conversation", "neighbours"))
        self.prefix_sharing = str(self.prefix_sharing).lower()  # YAML reads true and false
        one_of("data.prefix_sharing", self.prefix_sharing, ("auto", "true", "false"))
        one_of("data.token_cache", self.token_cache, ("build", "require"))
        one_of("data.turn_view", self.turn_view, _TURN_VIEW)
        one_of("data.history_thinking", self.history_thinking, ("template", "keep", "strip"))
        one_of("data.special_tokens_in_content", self.special_tokens_in_content, _SPECIAL)
        at_least("data.train_batch_size", self.train_batch_size, 1)
        at_least("data.micro_batch_size_per_gpu", self.micro_batch_size_per_gpu, 1)
        if self.max_token_len_per_gpu is not None:
            at_least("data.max_token_len_per_gpu", self.max_token_len_per_gpu, 2)
        at_least("data.max_length", self.max_length, 2)
        fraction("data.max_reject_fraction", self.max_reject_fraction)
        at_least("data.val_size", self.val_size, 0)
        if self.val_size and (
            self.val_files not in (None, "", "none", []) or self.mongo.val_filter is not None
        ):
            raise UsageError(
                f"data.val_size={self.val_size:g} beside data.val_files",
                why="Validation rows come from one of the two",
                fix="Take one out",
            )
        at_least("data.prompt_weight", self.prompt_weight, 0)
        if self.num_workers is not None:
            at_least("data.num_workers", self.num_workers, 0)
        for key in ("train_max_samples", "val_max_samples"):
            rows_or_all(f"data.{key}", getattr(self, key))

    @property
    def token_budget(self) -> int:
        """Most tokens that one micro-batch may hold."""
        return self.max_token_len_per_gpu or self.micro_batch_size_per_gpu * self.max_length


_TRUNCATION = ("error", "left", "right", "drop", "oldest_turns")
_TURN_VIEW = ("auto", "single_pass", "per_turn", "last", "indices")
_SPECIAL = ("escape", "error", "allow")


@dataclass
class ModelConfig:
    """Which model, which of its parameters learn, with which kernels."""

    partial_pretrain: str | None = None  # HF folder or hub name
    tokenizer_path: str | None = None  # default: that of the model
    custom_chat_template: str | None = None  # jinja text, or a file that holds it
    lora_rank: int = 0  # 0: full fine-tuning
    lora_alpha: int = 16  # adapters are scaled by alpha / rank
    lora_dropout: float = 0.0  # on the inputs of adapters
    target_modules: Any = "all-linear"  # names or a pattern that get an adapter
    exclude_modules: Any = None  # names or a pattern that get no adapter
    target_parameters: list[str] | None = None  # parameters that are no layer: merged experts
    lora_adapter_path: str | None = None  # start from this adapter in PEFT's format
    lora_init: str = "default"  # default | pissa | olora
    use_rslora: bool = False  # scale by alpha / sqrt(rank)
    use_dora: bool = False  # learn the magnitude of each row apart from its direction
    quantization: str = "none"  # of the frozen base beside adapters: none | nf4 | int8
    neftune_noise_alpha: float | None = None  # noise on the embeddings while training
    enable_gradient_checkpointing: bool = False  # recompute layers in the backward pass
    checkpoint_policy: str = "full"  # what is recomputed then: full | selective
    enable_activation_offload: bool = False  # activations wait in host memory
    learned_rows_only: bool = True  # the last layer's MLP sees no row that is not learned
    vocab_parallel: str = "auto"  # auto | true | false: head and embedding divided over the ranks
    attn_implementation: str = "auto"  # auto | sdpa | eager | flash_attention_2 | varlen
    use_liger: bool = False  # Triton kernels; GPU, extra liger
    trust_remote_code: bool = False  # run code that lies in the model's folder

    def __post_init__(self) -> None:
        at_least("model.lora_rank", self.lora_rank, 0)
        self.vocab_parallel = str(self.vocab_parallel).lower()  # YAML reads true and false
        one_of("model.vocab_parallel", self.vocab_parallel, ("auto", "true", "false"))
        one_of("model.lora_init", self.lora_init, ("default", "pissa", "olora"))
        one_of("model.quantization", self.quantization, ("none", "nf4", "int8"))
        one_of("model.checkpoint_policy", self.checkpoint_policy, ("full", "selective"))
        if self.neftune_noise_alpha is not None:
            at_least("model.neftune_noise_alpha", self.neftune_noise_alpha, 0)
        at_least("model.lora_alpha", self.lora_alpha, 1)
        at_least("model.lora_dropout", self.lora_dropout, 0)
        if self.lora_dropout >= 1:
            raise UsageError(
                f"model.lora_dropout={self.lora_dropout}: would drop all that an adapter reads",
                fix="Use a number from 0 to below 1",
            )


@dataclass
class EngineConfig:
    """How parameters are sharded and in which precision they compute."""

    strategy: str = "fsdp2"  # fsdp is read as fsdp2
    model_dtype: str = "fp32"  # of parameters and optimizer states: fp32 | bf16
    dtype: str = "auto"  # of compute: auto (bf16 where the device has it) | bf16 | fp32
    fsdp_size: int = -1  # ranks that hold one copy of the parameters; -1: all
    reshard_after_forward: bool = True  # false: less communication, more memory
    offload: bool = False  # parameters and optimizer states in host memory
    use_torch_compile: bool = False  # compile the decoder layers
    fp32_matmul: str = "highest"  # auto | highest | high | medium: precision of fp32 products
    meta_start: str = "auto"  # auto | true | false: no rank holds the whole model while loading

    def __post_init__(self) -> None:
        self.meta_start = str(self.meta_start).lower()  # YAML reads true and false
        one_of("engine.meta_start", self.meta_start, ("auto", "true", "false"))
        spellings = {"bfloat16": "bf16", "float32": "fp32"}
        self.dtype = spellings.get(self.dtype, self.dtype)
        self.model_dtype = spellings.get(self.model_dtype, self.model_dtype)
        one_of("engine.strategy", self.strategy, ("fsdp2", "fsdp"))
        one_of("engine.model_dtype", self.model_dtype, ("fp32", "bf16"))
        one_of("engine.dtype", self.dtype, ("auto", "fp32", "bf16"))
        one_of("engine.fp32_matmul", self.fp32_matmul, ("auto", "highest", "high", "medium"))


# Other tools' names; ours all warm up.
_SCHEDULES = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: str = "AdamW"  # a class of optimizer_impl, in any case
    optimizer_impl: str = "torch.optim"  # torchao.optim | bitsandbytes.optim | pytorch_optimizer
    override_optimizer_config: dict[str, Any] | None = field(default_factory=dict)  # more arguments
    fused: bool = True  # one kernel for the whole update, where the class has it
    loraplus_lr_ratio: float | None = None  # LoRA+: B matrices learn so many times as fast
    lr: float = 1e-5  # the peak of the schedule
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of Adam's kind
    eps: float = 1e-8  # of Adam's kind
    weight_decay: float = 0.01  # not of norms and biases
    decay_norms_and_biases: bool = False  # verl decays them; most others do not
    clip_grad: float = 1.0  # largest norm of the gradient; 0: never clipped
    lr_scheduler: str = "cosine"  # cosine | linear | constant | wsd
    lr_warmup_steps_ratio: float = 0.1  # of all steps
    lr_warmup_steps: int = -1  # -1: by ratio
    min_lr_ratio: float = 0.0  # of the peak, at the end

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optim.betas={self.betas}: must be two numbers from 0 to below 1")
        for key in ("lr", "eps", "weight_decay", "clip_grad"):
            at_least(f"optim.{key}", getattr(self, key), 0)
        if self.loraplus_lr_ratio is not None:
            above("optim.loraplus_lr_ratio", self.loraplus_lr_ratio, 0)
        fraction("optim.min_lr_ratio", self.min_lr_ratio)
        at_least("optim.lr_warmup_steps", self.lr_warmup_steps, -1)
        self.lr_scheduler = _SCHEDULES.get(self.lr_scheduler, self.lr_scheduler)
        one_of("optim.lr_scheduler", self.lr_scheduler, ("cosine", "linear", "constant", "wsd"))
        fraction("optim.lr_warmup_steps_ratio", self.lr_warmup_steps_ratio)


@dataclass
class TrainerConfig:
    """How long, where to, how often."""

    default_local_dir: str = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    project_name: str = "verl_sft"  # for trackers and the default directory
    experiment_name: str = "default"  # for trackers and the default directory
    total_epochs: int = 4  # passes over the data
    total_training_steps: int | None = None  # ends the run before its epochs do
    save_freq: Any = "after_each_epoch"  # steps | after_each_epoch | -1: only at the end
    test_freq: Any = "after_each_epoch"  # as save_freq, and behind the last step
    logger: Any = field(default_factory=lambda: ["console", "file", "tensorboard"])
    log_freq: int | None = None  # steps per console line; default: all, or 500 lines of a long run
    loss_breakdown: bool = True  # loss by kind of token, by turn and by source
    peak_flops: float | None = None  # FLOP/s of one device, for the MFU; default: by its name
    best_metric: str = "val/loss"  # judges the best model; also val/NAME/loss, env/...
    save_best: bool = False  # also save wherever best_metric is better than ever
    export_best: bool = False  # export the best checkpoint, not the last
    early_stop_patience: int | None = None  # validations in a row without a better one; null: never
    early_stop_min_delta: float = 0.0  # a smaller gain is none
    env_eval_freq: Any = -1  # play games with the current weights: as test_freq
    env_eval_data_dir: str | None = None  # of the games; default: the environment's own
    env_eval: list[str] = field(default_factory=list)  # words for `verl-sft evaluate`
    env_eval_timeout: float = 1800.0  # seconds for one evaluation
    seed: int = 1  # of order, dropout and new adapters
    resume_mode: str = "auto"  # auto | disable | resume_path
    resume_from_path: str | None = None  # a global_step_N folder, for resume_path
    max_ckpt_to_keep: int | None = None  # null: all; the best one stays as well
    async_save: bool = False  # write checkpoints while the next steps run; needs memory for a copy
    on_save_error: str = "stop"  # stop | warn: go on without a save that failed, but for the last
    on_corrupt: str = "fallback"  # fallback | stop: resume from the one before a damaged checkpoint
    nan_policy: str = "stop"  # stop | skip: a NaN or infinite step makes no update, on any rank
    max_skipped_steps: int = 10  # of a whole run, with nan_policy=skip
    step_timeout_s: float = 600.0  # a step or a save that takes longer has lost a rank; 0: never
    export: bool = True  # write an HF folder at the end
    max_shard_size: str = "5GB"  # of one safetensors file of the export
    upload_uri: str | None = None  # copy the export there: file://, s3://, ..., hf://user/repo
    device: str = "auto"  # auto | cuda | cpu

    def __post_init__(self) -> None:
        self.upload_uri = hide(self.upload_uri) if self.upload_uri else None
        one_of("trainer.resume_mode", self.resume_mode, ("auto", "disable", "resume_path"))
        one_of("trainer.on_save_error", self.on_save_error, ("stop", "warn"))
        one_of("trainer.on_corrupt", self.on_corrupt, ("fallback", "stop"))
        one_of("trainer.nan_policy", self.nan_policy, ("stop", "skip"))
        at_least("trainer.max_skipped_steps", self.max_skipped_steps, 0)
        at_least("trainer.step_timeout_s", self.step_timeout_s, 0)
        one_of("trainer.device", self.device, ("auto", "cuda", "cpu"))
        at_least("trainer.total_epochs", self.total_epochs, 1)
        between("trainer.seed", self.seed, 0, 2**63 - 1)
        file_size("trainer.max_shard_size", self.max_shard_size)
        if self.total_training_steps is not None:
            at_least("trainer.total_training_steps", self.total_training_steps, 1)
        if self.max_ckpt_to_keep is not None:
            at_least("trainer.max_ckpt_to_keep", self.max_ckpt_to_keep, 1)
        for name in ("log_freq", "early_stop_patience"):
            if getattr(self, name) is not None:
                at_least(f"trainer.{name}", getattr(self, name), 1)
        if self.peak_flops is not None:
            at_least("trainer.peak_flops", self.peak_flops, 1)
        at_least("trainer.early_stop_min_delta", self.early_stop_min_delta, 0)
        at_least("trainer.env_eval_timeout", self.env_eval_timeout, 1)
        for key in ("save_freq", "test_freq", "env_eval_freq"):
            value = getattr(self, key)
            if value in (None, "after_each_epoch"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < -1:
                raise UsageError(
                    f"trainer.{key}={value}: must be a number of steps, after_each_epoch or -1"
                )


@dataclass
class TrainConfig:
    """`verl-sft train`, and `python -m verl_sft.trainer.fsdp_sft_trainer` under torchrun."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ulysses_sequence_parallel_size: int = 1  # ranks that share a micro-batch, each with a slice
    use_remove_padding: bool = True  # pack samples into rows without padding
