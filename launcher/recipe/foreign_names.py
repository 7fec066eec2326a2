"""Words that people bring from other trainers and from their scripts, and what to write instead.

The words are arguments of the Hugging Face Trainer, Lightning, DeepSpeed and Accelerate, and those
that argparse scripts commonly have. Only messages use them: none is read as a setting.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from launcher.errors import did_you_mean
from launcher.printable import printable_line

_LONGEST_VALUE = 40
"""Characters of the longest value that a hint repeats."""

_OFF = ("false", "no", "off", "0", "none", "null")


@dataclass(frozen=True, kw_only=True)
class _Advice:
    """What to write instead of a word."""

    words: str
    """The words, separated by spaces."""

    write: str = ""
    """The setting or option, with `{value}` in place of the value; empty if there is none."""

    remark: str = ""
    """A sentence that says more, or why there is no setting."""

    values_of: str = ""
    """A setting in `_VALUES`, if the values of the word can be translated to its values."""

    switch: bool = False
    """Whether the word switches something on, which is off if it is left out."""


_NAMES = (
    _Advice(
        words="learning_rate base_lr max_lr initial_lr init_lr peak_lr lrate",
        write="lr={value}",
        remark="It is the peak, at a batch of lr_batch_size samples.",
    ),
    _Advice(
        words="train_batch_size global_batch_size total_batch_size batch bs",
        write="batch_size={value}",
        remark="It counts the samples of an optimizer step over all GPUs.",
    ),
    _Advice(
        words=(
            "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu "
            "micro_batch_size_per_gpu micro_batch_size_per_device micro_batch micro_bs mbs "
            "local_batch_size per_device_batch_size device_batch_size per_gpu_batch_size"
        ),
        write="micro_batch_size={value}",
        remark=(
            "It limits what passes through a GPU at once; batch_size counts the samples of an "
            "optimizer step over all GPUs and accumulation steps."
        ),
    ),
    _Advice(
        words=(
            "gradient_accumulation_steps accumulate_grad_batches grad_accumulation_steps "
            "gradient_accumulation grad_accum grad_accum_steps accumulation_steps accum_steps "
            "accum_iter update_freq iter_size"
        ),
        remark=(
            "The number of accumulation steps follows from batch_size, the samples of an optimizer "
            "step over all GPUs, and micro_batch_size, the most that pass through a GPU at once."
        ),
    ),
    _Advice(
        words=(
            "per_device_eval_batch_size eval_batch_size val_batch_size test_batch_size "
            "validation_batch_size"
        ),
        remark="Evaluations use the size of the training's micro-batches: micro_batch_size=...",
    ),
    _Advice(
        words="num_epochs num_train_epochs max_epochs n_epochs nepochs train_epochs epoch",
        write="epochs={value}",
    ),
    _Advice(
        words=(
            "max_steps total_steps num_steps n_steps max_train_steps num_train_steps train_steps "
            "num_training_steps total_num_steps iterations num_iterations max_iterations iters "
            "max_iters num_iters train_iters training_steps"
        ),
        write="steps={value}",
        remark="These are optimizer steps, instead of epochs.",
    ),
    _Advice(
        words=(
            "max_duration time_limit time_budget max_train_time max_hours max_minutes max_seconds "
            "walltime wall_time"
        ),
        remark="max_time=30min plans as many steps as fit in that time.",
    ),
    _Advice(
        words="fast_dev_run limit_train_batches overfit_batches debug dry_run",
        write="steps=10",
        remark="`launcher check` tries a recipe on one batch.",
    ),
    _Advice(words="bf16 bfloat16 use_bf16 bf16_training", write="precision=bf16", switch=True),
    _Advice(words="fp16 float16 half use_fp16 use_half", write="precision=fp16", switch=True),
    _Advice(
        words="mixed_precision amp use_amp autocast dtype torch_dtype amp_dtype compute_dtype",
        write="precision=bf16",
        remark="The precisions are fp32, bf16, fp16 and fp64.",
        values_of="precision",
    ),
    _Advice(words="allow_tf32 use_tf32", write="tf32=true", switch=True),
    _Advice(
        words="weight_decay wd l2 l2_reg decay",
        write='"optimizer=adamw(weight_decay={value})"',
        remark="sgd() takes a weight_decay as well.",
    ),
    _Advice(words="momentum mom", write='"optimizer=sgd(momentum={value})"'),
    _Advice(words="nesterov", write='"optimizer=sgd(nesterov={value})"'),
    _Advice(words="adam_beta1 beta1", write='"optimizer=adamw(beta1={value})"'),
    _Advice(words="adam_beta2 beta2", write='"optimizer=adamw(beta2={value})"'),
    _Advice(words="adam_epsilon eps epsilon", write='"optimizer=adamw(eps={value})"'),
    _Advice(words="betas adam_betas", write='"optimizer=adamw(beta1=..., beta2=...)"'),
    _Advice(
        words="optim opt optimizer_type optimizer_name optimizers",
        write='"optimizer=adamw()"',
        values_of="optimizer",
        remark="`launcher settings optimizer` lists what there is.",
    ),
    _Advice(
        words="ema_decay model_ema_decay ema_beta ema_rate",
        write='"averaging=ema({value})"',
    ),
    _Advice(
        words="ema use_ema model_ema ema_model ema_weights weight_averaging polyak averaged_model",
        write='"averaging=ema()"',
        switch=True,
    ),
    _Advice(
        words="swa use_swa stochastic_weight_avg swa_start swa_epoch_start",
        write='"averaging=tail()"',
        remark="Its start is the part of the run after which the average begins.",
    ),
    _Advice(
        words=(
            "scheduler lr_scheduler lr_scheduler_type scheduler_type lr_schedule lr_policy sched "
            "lr_decay_style lr_scheduler_kwargs"
        ),
        write='"schedule=cosine()"',
        values_of="schedule",
        remark="`launcher settings schedule` lists what there is.",
    ),
    _Advice(
        words=(
            "warmup_steps num_warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters "
            "warmup_num_steps"
        ),
        write='"schedule=warmup(cosine(), steps={value})"',
    ),
    _Advice(
        words="warmup warmup_ratio warmup_fraction warmup_epochs",
        write='"schedule=warmup(cosine(), fraction=0.05)"',
        remark="The fraction is one of all steps.",
    ),
    _Advice(
        words="min_lr lr_min eta_min end_lr final_lr",
        write='"schedule=cosine(final_factor=...)"',
        remark="The factor is a fraction of lr.",
    ),
    _Advice(
        words="milestones lr_milestones lr_decay_epochs lr_steps step_size lr_step_size gamma",
        write='"schedule=multi_step(milestones=(0.5, 0.75), gamma=0.1)"',
        remark="The milestones are fractions of the run.",
    ),
    _Advice(
        words=(
            "gradient_clip_val gradient_clipping grad_clip grad_clipping clip_grad clip_grad_norm "
            "clip_gradients grad_clip_norm gradient_clip clip_norm clip max_norm grad_norm"
        ),
        write="max_grad_norm={value}",
    ),
    _Advice(
        words="random_seed manual_seed rng_seed data_seed random_state seed_everything torch_seed",
        write="seed={value}",
    ),
    _Advice(
        words="deepspeed use_deepspeed deepspeed_config ds_config zero zero_stage zero_optim",
        write="strategy=zero2",
        remark="zero1, zero2 and zero3 are DeepSpeed's stages.",
        values_of="strategy",
    ),
    _Advice(
        words="fsdp use_fsdp fsdp2 fsdp_config sharding_strategy fully_shard",
        write="strategy=fsdp",
        switch=True,
    ),
    _Advice(
        words="tp tp_size tp_degree tensor_parallel_size tensor_model_parallel_size "
        "tensor_parallel_degree tensor_parallelism model_parallel_size",
        write="tensor_parallel={value}",
        remark="It needs strategy=fsdp.",
    ),
    _Advice(
        words=(
            "hybrid_shard use_hsdp hsdp dp_shard_size data_parallel_shard_degree dp_shard "
            "fsdp_size device_mesh num_shards"
        ),
        write="strategy=fsdp shard={value}",
        remark="It is the number of ranks that share each weight; node and all are others.",
    ),
    _Advice(
        words="fsdp_reshard_after_forward fsdp_no_reshard reshard",
        write="reshard_after_forward={value}",
    ),
    _Advice(words="fsdp_no_sync no_sync", write="accumulate_unsharded=true", switch=True),
    _Advice(
        words="mixed_precision_reduce gradient_reduce_dtype grad_reduce_dtype reduction_dtype",
        write="reduce_dtype={value}",
    ),
    _Advice(words="ddp use_ddp data_parallel distributed", write="strategy=ddp", switch=True),
    _Advice(
        words="cpu_offload offload_optimizer offload_param offload_params",
        write="offload=cpu",
        switch=True,
    ),
    _Advice(
        words="dist_backend distributed_backend ddp_backend process_group_backend",
        remark="GPUs communicate by NCCL and CPU ranks by gloo; device=cpu trains on CPU ranks.",
    ),
    _Advice(
        words="dataloader_num_workers workers n_workers nworkers loader_workers num_data_workers",
        write="num_workers={value}",
    ),
    _Advice(words="dataloader_pin_memory pin_mem", write="pin_memory={value}"),
    _Advice(words="dataloader_prefetch_factor prefetch", write="prefetch_factor={value}"),
    _Advice(
        words="drop_last dataloader_drop_last",
        remark=(
            "Every epoch visits each sample once, in an order that seed=... determines; the last "
            "batch of an epoch may be smaller."
        ),
    ),
    _Advice(
        words=(
            "gradient_checkpointing grad_checkpointing use_gradient_checkpointing recompute "
            "activation_checkpoint checkpoint_activations use_checkpoint grad_checkpoint"
        ),
        write="activation_checkpointing=true",
        switch=True,
    ),
    _Advice(
        words="torch_compile use_compile compile_model dynamo dynamo_backend",
        write="compile=true",
        switch=True,
    ),
    _Advice(
        words="sync_bn sync_batch_norm syncbn use_sync_bn convert_sync_batchnorm",
        write="sync_batchnorm=true",
        switch=True,
    ),
    _Advice(words="memory_format channel_last", write="channels_last=true", switch=True),
    _Advice(words="benchmark cudnn", write="cudnn_benchmark=true", switch=True),
    _Advice(
        words="numa_binding numa_affinity cpu_affinity bind_cores bind_cores_to_rank",
        write="numa=auto",
        switch=True,
    ),
    _Advice(
        words=(
            "devices num_devices num_gpus gpus ngpus n_gpu n_gpus gpu gpu_ids world_size "
            "num_processes nproc nprocs nproc_per_node gpus_per_node num_gpus_per_node ranks"
        ),
        remark=(
            "`launcher run` starts one rank for each GPU; its option -n, nproc_per_node in Python, "
            "takes another number of ranks. It is not a setting, because it changes no step."
        ),
    ),
    _Advice(
        words="num_nodes nnodes num_machines n_nodes",
        remark="The option --nodes of `launcher run` takes the number of nodes.",
    ),
    _Advice(
        words="quiet silent verbose verbosity disable_tqdm enable_progress_bar progress_bar",
        remark=(
            "The option --quiet of `launcher run`, output in Python, says what is printed while a "
            "run trains."
        ),
    ),
    _Advice(words="no_cuda use_cpu cpu", write="device=cpu", switch=True),
    _Advice(words="cuda use_cuda use_gpu", write="device=cuda", switch=True),
    _Advice(words="accelerator device_type", write="device=cuda", values_of="device"),
    _Advice(
        words=(
            "save_steps save_every save_interval save_freq ckpt_every ckpt_interval "
            "checkpoint_interval checkpointing_steps every_n_train_steps checkpoint_freq"
        ),
        write="checkpoint_every={value}",
    ),
    _Advice(
        words="save_total_limit keep_last max_checkpoints checkpoints_total_limit save_top_k",
        write="keep_checkpoints={value}",
    ),
    _Advice(
        words="save_best load_best_model_at_end metric_for_best_model monitor best_model",
        write="keep_best=accuracy:max",
        remark="The run then ends with the weights of the best evaluation.",
    ),
    _Advice(
        words=(
            "output_dir out_dir output outdir save_dir save_path log_dir logdir logging_dir "
            "work_dir workdir run_dir default_root_dir checkpoint_dir ckpt_dir exp_dir"
        ),
        write="--out {value}",
        remark="It is an option: the run folder to make.",
    ),
    _Advice(
        words="resume resume_from resume_from_checkpoint ckpt_path load_checkpoint checkpoint",
        remark="`launcher resume RUN_DIR` resumes a run from its newest checkpoint.",
    ),
    _Advice(
        words=(
            "eval_steps eval_every eval_interval eval_freq evaluation_strategy eval_strategy "
            "val_check_interval check_val_every_n_epoch val_interval val_every validate_every "
            "validation_steps eval_iters"
        ),
        write="evaluate_every=100",
        remark="These are optimizer steps; without it, an evaluation follows each epoch.",
    ),
    _Advice(
        words="report_to logger loggers log_with tracker use_wandb",
        write="trackers=tensorboard",
        remark="`launcher settings trackers` lists the others.",
        values_of="trackers",
    ),
    _Advice(
        words=(
            "logging_steps log_every log_interval log_every_n_steps log_freq print_freq "
            "print_every steps_per_print logging_strategy logging_interval"
        ),
        remark="Every step is recorded in metrics.jsonl of the run folder.",
    ),
    _Advice(
        words=(
            "timeout ddp_timeout nccl_timeout dist_timeout distributed_timeout init_timeout "
            "process_group_timeout watchdog_timeout"
        ),
        write="hang_timeout={value}",
        remark="`launcher settings hang_timeout` shows how to limit other phases.",
    ),
    _Advice(
        words=(
            "early_stopping early_stop early_stopping_patience early_stopping_threshold patience "
            "stop_patience"
        ),
        write="stop_after={value}",
        remark="It counts evaluations without a better value of keep_best, such as accuracy:max.",
    ),
    _Advice(
        words=(
            "dropout drop_rate label_smoothing hidden hidden_size hidden_dim num_layers n_layers "
            "depth width model_name model_name_or_path arch num_classes image_size img_size "
            "data_dir data_path data_root dataset dataset_name root max_length seq_len block_size"
        ),
        remark=(
            "If the recipe is to take it, declare it as a keyword parameter of the recipe's "
            "function: def mine(*, {name}: ... = ...)."
        ),
    ),
)

_VALUES: Mapping[str, Mapping[str, str]] = {
    "strategy": {
        "zero2": (
            "deepspeed deepspeed_stage_2 deepspeed_stage_2_offload zero zero_stage_2 stage2 2 true"
        ),
        "zero1": "deepspeed_stage_1 zero_stage_1 stage1 1",
        "zero3": "deepspeed_stage_3 deepspeed_stage_3_offload zero_stage_3 stage3 3",
        "fsdp": "fsdp1 fsdp2 full_shard hybrid_shard shard_grad_op fully_shard fsdp_native",
        "ddp": (
            "ddp_spawn ddp_fork ddp_notebook ddp_find_unused_parameters_true dp auto none "
            "single_device data_parallel distributed_data_parallel horovod 0 false"
        ),
    },
    "precision": {
        "bf16": "bf16_mixed bf16_true bfloat16 bf16_amp torch.bfloat16 true mixed amp",
        "fp16": "fp16_mixed 16_mixed 16_true 16 float16 half torch.float16",
        "fp32": "32 32_true float32 float full no false none single tf32 torch.float32",
        "fp64": "64 64_true float64 double torch.float64",
    },
    "device": {
        "cuda": "gpu gpus cuda:0 nvidia 0 1 auto",
        "cpu": "cpu:0 gloo",
    },
    "optimizer": {
        "adamw": ("adam adam_w adamw_torch adamw_torch_fused adamw_hf fused_adam torch_adam"),
        'adamw(state_dtype="int8")': "adamw8bit adamw_8bit adamw_bnb_8bit adam8bit",
        "schedule_free": "schedulefree schedule_free_adamw adamwschedulefree",
        "sgd(momentum=0)": "gd vanilla_sgd",
    },
    "schedule": {
        "one_cycle": "onecyclelr 1cycle onecycle_lr super_convergence",
        "cosine": "cosineannealing cosineannealinglr cosine_annealing cosine_decay cos",
        "constant": "constantlr none const fixed",
        "linear": "linearlr linear_decay polynomial polynomiallr",
        "multi_step": "multisteplr steplr step piecewise",
        "exponential": "exponentiallr",
        "warmup(cosine())": "cosine_with_warmup warmupcosinelr cosine_with_restarts",
        "warmup(linear())": "linear_with_warmup warmupdecaylr",
        "warmup(constant())": "constant_with_warmup warmuplr",
    },
    "averaging": {
        "ema()": "true exponential polyak ema_model exponentialmovingaverage",
        "tail()": "swa mean uniform stochastic_weight_averaging",
        "none": "false off",
    },
    "shard": {"node": "hybrid hybrid_shard auto true", "all": "full full_shard world none false"},
    "reduce_dtype": {"bf16": "bfloat16 torch.bfloat16", "fp32": "float32 torch.float32 none 32"},
    "offload": {"cpu": "true nvme disk optimizer param parameters on host ram"},
    "compile": {"true": "inductor default max_autotune reduce_overhead"},
    "trackers": {
        "tensorboard": "tb tensorboardx",
        "wandb": "weights_and_biases true",
        "mlflow": "",
        "none": "false",
    },
    "lr_rule": {"linear": "true auto scale", "sqrt": "square_root", "none": "false constant off"},
}
"""Values of other trainers, by the setting and by the value to write instead."""


def hint_for_unknown(name: str, known: Iterable[str], value: Any = None) -> str:
    """Return what to write instead of a name that does not exist.

    That is what `hint_for_name` returns if other trainers have the name, the known names that
    resemble it, or what is to be written instead of the word that resembles it.

    Args:
        name: The unknown name, of a setting (`learning_rate`) or an option (`--learning-rate`).
        known: The names that exist.
        value: The value that was given to it, if any.

    Returns:
        Sentences after a space; empty if nothing is similar.
    """
    return hint_for_name(name, value) or did_you_mean(name, known) or _hint_near_name(name, value)


def hint_for_name(name: str, value: Any = None) -> str:
    """Return ` Write lr=0.1 instead. ...`, what to write instead of a word of another trainer.

    Args:
        name: The word, as a setting (`learning_rate`) or an option (`--learning-rate`).
        value: The value that was given to it, if any.

    Returns:
        One or two sentences after a space; empty if the word is not known.
    """
    advice = _by_word().get(_plain(name.rpartition(".")[2]))
    if advice is None:
        return ""
    shown = "..." if value is None else printable_line(str(value))
    if not 0 < len(shown) <= _LONGEST_VALUE:
        shown = "..."
    if advice.switch and shown.lower() in _OFF:
        return f" Leave it out: it is off unless {advice.write} is given."
    write = _write(advice, shown)
    write = write and f"Write {write} instead."
    remark = advice.remark.replace("{name}", printable_line(name.lstrip("-").replace("-", "_")))
    return "".join(f" {text}" for text in (write, remark) if text)


def setting_for(name: str, value: Any) -> str:
    """Return the setting that a word of another trainer becomes: `lr=0.1`; empty if none.

    Args:
        name: The word, or the name of a setting.
        value: Its value.
    """
    advice = _by_word().get(_plain(name))
    if advice is None or advice.write.startswith("--"):
        return ""
    if advice.switch and str(value).lower() in _OFF:
        return ""
    return _write(advice, printable_line(str(value)))


def _write(advice: _Advice, shown: str) -> str:
    """Return the setting or option to write instead of a word; empty if there is none."""
    if advice.values_of and (value := _translated(advice.values_of, _name_of(shown))):
        return _assigned(advice.values_of, value)
    return advice.write.replace("{value}", shown)


def _hint_near_name(name: str, value: Any = None) -> str:
    """Return the hint for the known word that is most similar to `name`; empty if none is."""
    matches = get_close_matches(_plain(name), list(_by_word()), n=1, cutoff=0.85)
    return hint_for_name(matches[0], value) if matches else ""


def hint_for_value(setting: str, value: Any) -> str:
    """Return ` Write precision=bf16 instead.`, what to write instead of a value of another trainer.

    Args:
        setting: The setting that the value was given to.
        value: The value; of a call such as `CosineAnnealingLR(...)`, the name counts.

    Returns:
        A sentence after a space; empty if the value is not known, or is itself to be written.
    """
    given = _name_of(value)
    if setting == "precision" and "fp8" in _plain(given):
        return " Write precision=bf16 fp8=true instead."
    write = _translated(setting, given)
    return f" Write {_assigned(setting, write)} instead." if write not in ("", given) else ""


def _translated(setting: str, given: str) -> str:
    """Return the value of a setting that a value of another trainer becomes; empty if none."""
    word = _plain(given)
    for write, words in _VALUES.get(setting, {}).items():
        if word and word in map(_plain, (write, *words.split())):
            return write
    return ""


def _name_of(value: Any) -> str:
    return re.split(r"[(,]", str(value)[:200], maxsplit=1)[0].strip()


def _assigned(setting: str, value: str) -> str:
    """Return an assignment as it is typed in a shell."""
    return f'"{setting}={value}"' if "(" in value else f"{setting}={value}"


@functools.cache
def _by_word() -> Mapping[str, _Advice]:
    return {_plain(word): advice for advice in _NAMES for word in advice.words.split()}


def _plain(word: str) -> str:
    """Return a word without case, dashes, underscores and spaces: `learningrate`."""
    return re.sub(r"[-_\s]+", "", word.lower())
