"""The command line: settings, the run, exit codes, and the table at its end.

    python grpo_lora.py --help

Exit status: 0 done, or stopped on request; 1 the run failed; 2 bad input.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser

from grpo_lora import VARIANTS, GRPOConfig, GRPOTrainer, gather, rank_and_world
from lora import LoRAConfig, apply_lora, check_choice, check_settings, load_lora, setting
from rewards import REWARDS, RewardError, accuracy_reward, reward_function
from runner import demo, fast
from runner.checkpoints import Checkpoints, ResumeError, check_output_dir
from runner.processes import (
    InStep,
    PeerError,
    choose_device,
    exit_process,
    join_processes,
    peers_answer,
    say,
    shard_base,
)
from runner.report import TokenTraces, printable, read_lines, write_report
from runner.watch import EarlyWarnings, SkippedUpdates, memory_advice, with_time_limit

# ---------------------------------------------------------------------------------------- settings


# fmt: off
@dataclasses.dataclass
class RunConfig:
    """Settings of a run. Those of the algorithm are in GRPOConfig."""

    model: str | None = setting(None, "Model folder or hub id. None: the built-in demo.")
    data: str | None = setting(
        None, "JSONL: a `prompt` (text, or chat messages) and any columns the rewards use.")
    prompt_column: str = setting("prompt", "The column of the data that holds the prompt.")
    eval_data: str | None = setting(None, "JSONL of held-out problems.")
    eval_size: int = setting(0, "Without eval_data: hold out so many of the last rows of data.")
    rewards: str = setting(
        "accuracy", "Comma-separated: names (see rewards.py), file.py:function, module:function.")
    dtype: str = setting("float32", "Of the base weights; adapters are float32.",
                         choices=("float32", "bfloat16", "float16"))
    load_in_4bit: bool = setting(False, "Base weights in 4 bits (NF4), by bitsandbytes.")
    load_in_8bit: bool = setting(False, "Base weights in 8 bits, by bitsandbytes.")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one.")
    adapter: str | None = setting(None, "Saved adapter to go on training. None: a new one.")
    variant: str | None = setting(
        None, f"A paper's settings, which flags then override: {', '.join(VARIANTS)}.")
    tune: str | None = setting(None, "Instead of one run, find this by short ones.",
                               choices=("learning_rate", "learning_rate,r"))
    resume: bool = setting(False, "Go on from the newest intact checkpoint in output_dir.")
    save_steps: int = setting(
        50, "Checkpoint every so many updates, and at the end. 0: where it is stopped.", at_least=0)
    save_total_limit: int | None = setting(2, "Checkpoints to keep. None: all.", above=0)
    num_completions_to_log: int = setting(
        8, "Rows of each batch that go into completions.jsonl.", at_least=0)
    log_tokens_steps: int | None = setting(
        None, "Every so many updates, record what they did to each token of these rows.", above=0)
    reward_timeout: float = setting(
        600.0, "Seconds that a reward function may take for a batch.", above=0, at_most=1e6)
    ddp_timeout: float = setting(
        1800.0, "Seconds that one process waits for the others (torchrun).", above=0, at_most=1e6)
    fsdp: bool = setting(False, "Spread the frozen weights over the processes (FSDP2).")
    # fmt: on

    def __post_init__(self) -> None:
        check_settings(self)
        if self.load_in_4bit or self.load_in_8bit:
            if self.load_in_4bit and self.load_in_8bit:
                raise ValueError("load_in_4bit, load_in_8bit: choose one")
            if not importlib.util.find_spec("bitsandbytes"):
                raise ValueError("load_in_4bit, load_in_8bit: need: pip install bitsandbytes")
            if self.fsdp:
                raise ValueError("load_in_4bit, load_in_8bit: fsdp spreads dense weights alone")


CONCERNS = {  # how --help groups the settings; what is not named here is the last group's
    "the usual": [
        "model", "data", "eval_size", "rewards", "output_dir", "resume", "max_steps", "seed",
        "prompts_per_step", "num_generations", "max_completion_length", "learning_rate", "variant",
        "tune",
    ],
    "data and model": [
        "prompt_column", "eval_data", "system_prompt", "chat_template_kwargs", "dtype",
        "load_in_4bit", "load_in_8bit", "device",
    ],
    "adapter": ["adapter", *(f.name for f in dataclasses.fields(LoRAConfig))],
    "objective": [
        "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta",
        "sapo_temperature_pos", "sapo_temperature_neg", "scale_rewards", "reward_weights",
        "multi_objective_aggregation", "beta", "kl_estimator", "use_bias_correction_kl",
        "opmd_tau", "top_entropy_quantile", "sampler_correction", "sampler_correction_clip_min",
        "sampler_correction_clip_max", "off_policy_mask_threshold", "merge_half_precision",
        "mask_truncated_completions", "temperature",
    ],
    "optimiser": [
        "num_iterations", "lora_plus_ratio", "modules_to_save_learning_rate", "lr_scheduler_type",
        "warmup_steps", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
        "gradient_checkpointing",
    ],
    "run": [],
}  # fmt: skip
OTHERS = {  # settings of TRL's, transformers' and PEFT's that are not ours, by what to do here
    "it is called --model here": "model_name_or_path base_model_name_or_path",
    "it is called --r here": "lora_r",
    "it is called --modules_to_save here": "lora_modules_to_save",
    "it is called --target_modules here": "lora_target_modules",
    "it is called --rewards here": "reward_funcs",
    "it is called --resume here, and takes no value": "resume_from_checkpoint",
    "data are JSONL files: --data, --eval_data, --eval_size": "dataset_name dataset_config "
    "dataset_train_split dataset_test_split dataset_streaming",
    "use --dtype bfloat16 or --dtype float16 (adapters stay float32)": "bf16 fp16 tf32 "
    "bf16_full_eval fp16_full_eval cast_lm_head_to_fp32",
    "4 bits are NF4, plain": "bnb_4bit_quant_storage bnb_4bit_quant_type use_bnb_nested_quant",
    "adapters are always trained; their settings are --r, --lora_alpha, ...": "use_peft",
    "every run writes metrics.jsonl and report.html into --output_dir": "report_to logging_steps "
    "logging_strategy logging_first_step run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id logging_nan_inf_filter log_level log_level_replica log_on_each_node "
    "include_num_input_tokens_seen disable_tqdm debug skip_memory_metrics",
    "completions.jsonl has them; --num_completions_to_log says how many": "log_completions "
    "num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo",
    "the length of a run is --max_steps; an epoch is rows / prompts_per_step": "num_train_epochs",
    "checkpoints are set by --save_steps, evaluations by --eval_steps": "save_strategy "
    "eval_strategy eval_on_start eval_delay do_eval do_train do_predict save_only_model "
    "load_best_model_at_end metric_for_best_model greater_is_better",
    "the optimiser is AdamW with torch's own betas and eps": "optim optim_args adam_beta1 "
    "adam_beta2 adam_epsilon optim_target_modules lr_scheduler_kwargs neftune_noise_alpha "
    "label_smoothing_factor",
    "the batch is --prompts_per_step times --num_generations, and --per_device_train_batch_size "
    "splits it exactly": "gradient_accumulation_steps generation_batch_size auto_find_batch_size "
    "per_device_eval_batch_size average_tokens_across_devices",
    "each batch of completions is used --num_iterations times": "steps_per_generation",
    "sampling is built in; serve the saved adapter with vLLM": "use_vllm vllm_mode "
    "vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout vllm_group_port "
    "vllm_gpu_memory_utilization vllm_max_model_length vllm_model_impl vllm_enable_sleep_mode "
    "vllm_structured_outputs_regex vllm_tensor_parallel_size use_transformers_paged "
    "use_transformers_continuous_batching transformers_continuous_batching_config "
    "cache_implementation use_cache ds3_gather_for_generation",
    "it is --sampler_correction none, or one of its modes": "vllm_importance_sampling_correction",
    "sampling is untruncated, so that what is sampled is what is trained": "top_p top_k min_p "
    "generation_kwargs",
    "use the reward repetition_penalty, which changes the policy itself": "repetition_penalty",
    "there is no entropy bonus; --top_entropy_quantile and --epsilon_high keep entropy up":
    "entropy_coef entropy_coef_delta entropy_coef_min entropy_coef_max entropy_target "
    "use_adaptive_entropy",
    "there is no router loss; routers stay frozen": "router_aux_loss_coef",
    "vespo's are fixed: k = 2, 3 and lambda = 3, 2": "vespo_k_pos vespo_k_neg vespo_lambda_pos "
    "vespo_lambda_neg",
    "the reference is the policy that training starts from, and stays so": "sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps",
    "prompts are never cut: a row that does not fit is refused by its line": "max_prompt_length",
    "the order of rows is a function of --seed, new in each epoch": "shuffle_dataset data_seed "
    "full_determinism train_sampling_strategy ignore_data_skip",
    "a base model's own dropout never acts; the adapter's is --lora_dropout": "disable_dropout",
    "use --device cpu": "use_cpu",
    "activations are dropped by --gradient_checkpointing true": "activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    "code from model repositories is never run": "trust_remote_code",
    "only the layers of target_modules are adapted": "target_parameters lora_target_parameters "
    "layers_to_transform layers_pattern exclude_modules layer_replication trainable_token_indices "
    "lora_bias",
    "it has no counterpart here": "max_tool_calling_iterations model_init_kwargs model_revision "
    "pad_to_multiple_of num_generations_eval attn_implementation lora_task_type task_type "
    "peft_type inference_mode fan_in_fan_out loftq_config eva_config corda_config megatron_config "
    "megatron_core alora_invocation_tokens arrow_config qalora_group_size use_qalora use_bdlora "
    "ensure_weight_tying kasa_config lora_ga_config monteclora_config velora_config "
    "runtime_config auto_mapping revision peft_version deepspeed fsdp_config accelerator_config "
    "parallelism_config ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters "
    "ddp_broadcast_buffers ddp_static_graph local_rank dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context "
    "remove_unused_columns label_names length_column_name torch_compile torch_compile_backend "
    "torch_compile_mode torch_empty_cache_steps use_liger_kernel use_liger_loss "
    "liger_kernel_config push_to_hub hub_model_id hub_token hub_private_repo hub_revision "
    "hub_strategy hub_always_push batch_eval_metrics eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object include_for_metrics prediction_loss_only "
    "save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint "
    "ignore_bias_buffers reward_model_name_or_path",
}
ALIASES = {  # TRL's names of settings that we have
    "vllm_importance_sampling_mode": "sampler_correction",
    "vllm_importance_sampling_clip_min": "sampler_correction_clip_min",
    "vllm_importance_sampling_clip_max": "sampler_correction_clip_max",
    "vllm_importance_sampling_cap": "sampler_correction_clip_max",
}
LEFT_OUT = {name: advice for advice, names in OTHERS.items() for name in names.split()}


class Parser(HfArgumentParser):
    """Raises ValueError where argparse would print pages of usage. Reads @FILE with shlex."""

    def error(self, message: str) -> Any:
        raise ValueError(message)

    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        # argparse would cut a file into lines, and so a quoted value of several lines
        words: list[str] = []
        for word in arg_strings:
            if not word.startswith("@"):
                words.append(word)
                continue
            try:
                text = Path(word[1:]).read_bytes().decode("utf-8-sig", "surrogateescape")
                words += self._read_args_from_files(shlex.split(text))
            except RecursionError:
                raise ValueError(f"{word}: not a file of settings: it names itself") from None
            except (OSError, ValueError) as error:
                if "not a file of settings" in str(error):
                    raise
                hint = f"a value that begins with @ is written --setting={word}"
                raise ValueError(f"{word}: not a file of settings: {error}; {hint}") from None
        return words


def make_parser() -> Parser:
    """A parser of all settings, grouped by concern."""
    fields = {}  # name -> its type and field
    for kind in (RunConfig, LoRAConfig, GRPOConfig):
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            fields[f.name] = hints[f.name], f
    fields["init_lora_weights"] = str, fields["init_lora_weights"][1]  # a switch could only fail
    named = {name for names in CONCERNS.values() for name in names}
    groups: Any = []
    for concern, names in CONCERNS.items():
        members = []
        for name in names or [name for name in fields if name not in named]:
            hint, f = fields[name]
            about = {k: v for k, v in f.metadata.items() if k in ("help", "choices")}
            if "choices" in about:
                about["choices"] = list(about["choices"])
            options: dict[str, Any] = {"metadata": about}
            given = f.default_factory is not dataclasses.MISSING
            options |= {"default_factory": f.default_factory} if given else {"default": f.default}
            members.append((name, hint, dataclasses.field(**options)))
        group = dataclasses.make_dataclass(concern.replace(" ", "_"), members)
        group._argument_group_name = concern  # type: ignore[attr-defined]
        groups.append(group)
    parser = Parser(
        groups,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        usage="grpo_lora.py [@FILE_OF_SETTINGS] [--model MODEL --data FILE] [--SETTING VALUE ...]",
        description="GRPO with LoRA. Without --model: a demo.",
    )
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = f"Turns --{action.dest} off."
        if action.dest in ("rank_pattern", "alpha_pattern", "chat_template_kwargs"):
            action.type = json_object
        elif action.dest == "save_total_limit":
            action.type = lambda text: None if text == "None" else int(text)
        elif action.dest == "tune":
            action.nargs, action.const = "?", "learning_rate"
        elif action.dest == "init_lora_weights":
            action.type = lambda text: text.lower() == "true" or text
        elif action.dest == "target_modules":
            action.nargs, action.type = None, parse_target_modules
    parser.set_defaults(target_modules="all-linear", r=16, lora_alpha=32.0)
    # argparse knows negative numbers by their form, and not that -1e-5 is one
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    return parser


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def parse_target_modules(text: str) -> str | list[str]:
    """q_proj,v_proj are names; anything else is a shorthand or a regular expression."""
    return text.split(",") if text.replace(",", "").isidentifier() else text


def parse(argv: Sequence[str]) -> tuple[RunConfig, LoRAConfig, GRPOConfig]:
    """Command line -> settings. A flag beats the variant, which beats the demo and the defaults."""
    parser, argv = make_parser(), list(argv)
    for theirs, ours in ALIASES.items():
        argv = [re.sub(rf"^--{theirs}(?==|$)", f"--{ours}", word) for word in argv]
    first, unknown = parser.parse_known_args(argv)
    for name in ("model", "data", "eval_data", "output_dir", "adapter"):
        if getattr(first, name) == "":
            raise ValueError(f"--{name}: is empty; leave it out, or say which")
    for flag in (word[2:].partition("=")[0] for word in unknown if word.startswith("--")):
        flag = flag.replace("-", "_")
        if flag in LEFT_OUT:
            raise ValueError(f"--{flag}: {LEFT_OUT[flag]}")
        check_choice(flag, sorted(action.dest for action in parser._actions), "command line")
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not expected here (--help shows all settings)")
    if first.model is None:
        if first.data:
            raise ValueError("--data needs --model, a model folder or hub id")
        if first.eval_data or first.eval_size:
            needs = "need --model and --data: the demo has its own problems"
            raise ValueError(f"--eval_data and --eval_size {needs}")
        parser.set_defaults(**demo.SETTINGS)
    elif not first.data:
        raise ValueError("--model needs --data, a JSONL file with a `prompt` in each line")
    elif first.eval_data and first.eval_size:
        raise ValueError("--eval_data, --eval_size: choose one of them")
    elif first.eval_steps and not (first.eval_data or first.eval_size):
        raise ValueError("--eval_steps needs problems: --eval_data, or --eval_size")
    if first.variant:
        check_choice(first.variant, VARIANTS, "--variant")
        parser.set_defaults(**VARIANTS[first.variant].settings)
    values = vars(parser.parse_args(argv))
    theirs = VARIANTS[first.variant].settings if first.variant else {}
    if theirs and all(values[name] != value for name, value in theirs.items()):
        given = ", ".join(f"--{name} {values[name]}" for name in theirs)
        warnings.warn(f"--variant {first.variant} has no effect beside {given}", stacklevel=2)
    pick = lambda kind: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})
    run, lora, args = pick(RunConfig), pick(LoRAConfig), pick(GRPOConfig)
    own = LoRAConfig(r=parser.get_default("r"), lora_alpha=parser.get_default("lora_alpha"))
    if run.adapter and lora != own:
        names = (f.name for f in dataclasses.fields(own))
        changed = next(name for name in names if getattr(own, name) != getattr(lora, name))
        raise ValueError(f"--{changed}: has no effect with --adapter, whose own file says it")
    return run, lora, args


def write_settings(path: Path, *settings: Any, **changed: Any) -> Path:
    """A file that makes the run again: python grpo_lora.py @FILE. One setting a line, resolved."""
    lines = []
    values = {f.name: getattr(s, f.name) for s in settings for f in dataclasses.fields(s)}
    for name, value in (values | changed).items():
        if name in ("output_dir", "resume", "tune", "variant"):
            continue
        if value is None and name != "save_total_limit":  # where None is a choice: keep all
            continue
        if name == "target_modules" and not isinstance(value, str):
            value = ",".join(value)
        if isinstance(value, list):
            words = [f"--{name}", *map(str, value)]
        else:  # in one word, as a value may begin with - or @
            value = json.dumps(value) if isinstance(value, dict) else value
            words = [f"--{name}={value}"]
        lines.append(shlex.join(words) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(lines)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # names may be any bytes
    return path


# ------------------------------------------------------------------------------------ what to train


class Row(dict[str, Any]):
    """A row of data that knows its file and line, for error messages."""

    origin: str


LOOKS_LIKE = [  # how a file that is not JSONL begins, what it is, and how to make JSONL of it
    (b"\x1f\x8b", "gzip", "gunzip it"),
    (b"PAR1", "parquet", "pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"[", "a JSON array", "pandas.read_json(FILE).to_json(NEW, orient='records', lines=True)"),
]


def read_jsonl(path: str | Path, prompt_column: str = "prompt") -> list[Row]:
    """The rows of a JSONL file. Raises ValueError with file, line and reason."""
    rows: list[Row] = []
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if number == 1:
                        check_is_jsonl(line.removeprefix(b"\xef\xbb\xbf").strip())
                    value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(value, dict):
                        kind = type(value).__name__
                        raise ValueError(f"is a {kind}, must be an object with a 'prompt'")
                    if prompt_column in value:
                        value["prompt"] = value.pop(prompt_column)
                    elif prompt_column != "prompt":
                        has = ", ".join(value) or "no column"
                        raise ValueError(f"--prompt_column {prompt_column}: the row has {has}")
                    rows.append(Row(value))
                    rows[-1].origin = f"{path}:{number}"
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows; each line must be an object with a 'prompt'")
    return rows


def check_is_jsonl(line: bytes) -> None:
    """Raises ValueError for the first line of a file of another kind, saying what to do with it."""
    for start, kind, how in LOOKS_LIKE:
        if line.startswith(start):
            raise ValueError(f"looks like {kind}, not JSONL: {how}")
    if not line.startswith((b"{", b'"')) and re.search(rb"[,;\t]", line) and not line[:1].isdigit():
        how = "pandas.read_csv(FILE).to_json(NEW, orient='records', lines=True)"
        raise ValueError(f"looks like CSV, not JSONL: {how}")


def read_datasets(run: RunConfig) -> tuple[list[Any], list[Any] | None]:
    """The rows to train on, and those held out."""
    if run.model is None:
        problems = demo.sum_problems()
        return problems[: -demo.HELD_OUT], problems[-demo.HELD_OUT :]
    train = read_jsonl(str(run.data), run.prompt_column)
    if run.eval_data:
        return train, read_jsonl(run.eval_data, run.prompt_column)
    if not run.eval_size:
        return train, None
    if not 0 < run.eval_size < len(train):
        have = f"{run.data} has {len(train)} rows; some must be left to train on"
        raise ValueError(f"--eval_size {run.eval_size}: {have}")
    return train[: -run.eval_size], train[-run.eval_size :]


def load_reward(spec: str) -> Callable[..., Any]:
    """A reward by name (see rewards.REWARDS), or as `file.py:function` or `module:function`.

    Raises ValueError, with the nearest name there is, if it cannot be found. This imports, and so
    runs, the file named.
    """
    source, colon, function = spec.strip().rpartition(":")
    if not colon:
        if function.endswith(".py"):
            raise ValueError(f"rewards: {function} is a file: write {function}:FUNCTION")
        name = function if function in REWARDS else function.removesuffix("_reward")
        check_choice(name, REWARDS, "rewards")
        return reward_function(name)
    try:
        if source.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(found.name, module)  # where dataclasses and pickles look for it
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except (Exception, SystemExit) as error:
        problem = f"{source} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(f"rewards: {problem}") from error
    if not callable(getattr(module, function, None)):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        there = ", ".join(own) or "none"
        raise ValueError(f"rewards: {source} has no function {function!r}; it has {there}")
    return getattr(module, function)


def prepare(run: RunConfig, lora: LoRAConfig, args: GRPOConfig) -> GRPOTrainer:
    """Everything up to the first update. Raises ValueError for bad input, as early as it shows."""
    join_processes(run.ddp_timeout)
    specs = [spec for spec in run.rewards.split(",") if spec.strip()]
    funcs = [with_time_limit(load_reward(spec), run.reward_timeout) for spec in specs]
    check_output_dir(args.output_dir, run.resume)
    device = choose_device(run.device, run.fsdp)
    train, held_out = read_datasets(run)
    folder = run.model or str(Path("runs") / "demo-base-model")
    if run.model is None:
        if rank_and_world()[0] == 0 and not Path(folder).exists():
            demo.make_demo_model(Path(folder))
        gather("the model is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        options: dict[str, Any] = {"dtype": getattr(torch, run.dtype)}
        if run.load_in_4bit or run.load_in_8bit:
            bits = {"load_in_8bit": True} if run.load_in_8bit else {"load_in_4bit": True}
            nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": options["dtype"]}
            options["quantization_config"] = BitsAndBytesConfig(**bits, **nf4)
            options["device_map"] = {"": device}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"--model {folder}: {type(error).__name__}: {error}") from None
    transformers.set_seed(args.seed)
    if not run.fsdp and "device_map" not in options:  # fsdp spreads it before it moves it
        model.to(device)
    model = load_lora(model, run.adapter) if run.adapter else apply_lora(model, lora)
    if run.fsdp:
        shard_base(model)
    engine = InStep(fast) if run.fsdp else fast
    trainer = GRPOTrainer(
        model, funcs, args, train, held_out, tokenizer, callbacks=make_callbacks(run), engine=engine
    )
    if args.output_dir is None:
        name = "demo" if run.model is None else Path(run.model).name
        new = new_run_folder(name) if trainer.rank == 0 else None
        trainer.args.output_dir = gather(new)[0]
    return trainer


def make_callbacks(run: RunConfig) -> list[Callable[[GRPOTrainer, dict[str, Any]], None]]:
    """What is done after each update, in order."""
    checkpoints = Checkpoints(run.save_steps, run.save_total_limit, run.resume)
    checkpoints.shown = run.num_completions_to_log
    traces = TokenTraces(run.log_tokens_steps, run.num_completions_to_log)
    skipped = SkippedUpdates(save=checkpoints.save)
    return [EarlyWarnings(), traces, grade_evaluation, checkpoints, skipped]


def new_run_folder(name: str) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = Path("runs") / f"{name}-{stamp}{suffix}"
        try:
            path.mkdir(parents=True)
            return str(path)
        except FileExistsError:
            continue
    raise OSError("runs/: no free folder name")


def grade_evaluation(trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
    """A callback: adds the accuracy of an evaluation, where every row has an answer, and the share
    of its completions with a <think> tag."""
    if not trainer.eval_samples or trainer.eval_dataset is None:
        return
    texts = [sample["completion"] for sample in trainer.eval_samples]
    rows = [trainer.eval_dataset[i] for i in range(len(texts))]
    metrics["eval_think_rate"] = sum("<think>" in text for text in texts) / len(texts)
    graded = accuracy_reward(None, texts, [row.get("answer", row.get("solution")) for row in rows])
    if None not in graded:
        metrics["eval_accuracy"] = sum(map(float, graded)) / len(graded)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- the run


def print_table(folder: Path, seed: int, seconds: float) -> None:
    """The table at the end of a run, from its files; and summary.json."""
    files = [folder / f"{name}.jsonl" for name in ("metrics", "completions")]
    rows, samples = (read_lines(file) if file.exists() else [] for file in files)
    updates = rows[-1]["step"] if rows else 0
    summary: dict[str, Any] = {"seed": seed, "seconds": round(seconds, 1), "updates": updates}
    evaluated = [row for row in rows if "eval_reward" in row]
    shown = [sample for sample in samples if sample.get("split") == "eval"]
    if len(evaluated) > 1:
        print(f"\n{'on held-out problems':<22}    before     after")
        names = {"accuracy": ".1%", "think_rate": ".1%", "reward": ".3f"}
        for name, form in (names | {"completions/mean_length": ".1f"}).items():
            before, after = (evaluated[i].get(f"eval_{name}") for i in (0, -1))
            if before is not None and after is not None:
                name = name.rpartition("/")[2]
                summary |= {f"{name}_before": before, f"{name}_after": after}
                print(f"{name:<22} {format(before, form):>9} {format(after, form):>9}")
    if len(evaluated) > 1 and shown:
        prompt = shown[0]["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        last = next(sample for sample in shown if sample["step"] == shown[-1]["step"])
        print(f"\nprompt   {printable(text)[:500]}")
        print(f"before   {printable(shown[0]['completion'])[:500]}")
        print(f"after    {printable(last['completion'])[:500]}")
    text = json.dumps(summary, indent=2) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    print(f"\n{updates} updates in {seconds:.0f} s; adapter, metrics and report.html: {folder}/")


def refuse(error: Exception | str, status: int) -> int:
    """One line, whatever the message was made from. Returns the exit status."""
    sys.stdout.flush()
    print("error:", " ".join(printable(str(error)).split())[:1000], file=sys.stderr)
    return exit_process(status)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # one bar is enough: ours
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack a letter, and the run must not end
            stream.reconfigure(errors="backslashreplace")
    try:
        run, lora, args = parse(sys.argv[1:] if argv is None else argv)
        with memory_advice(), peers_answer():
            if run.tune:
                from runner.tune import tune

                tune(run, lora, args)
                return exit_process(0)
            trainer = prepare(run, lora, args)
    except (ValueError, OSError) as error:
        return refuse(error, 2)
    except (RewardError, PeerError, MemoryError, FloatingPointError, KeyboardInterrupt) as error:
        return refuse(str(error) or "interrupted", 1)

    def stop(signum: int, frame: Any) -> None:
        trainer.stop = True
        signal.signal(signum, signal.SIG_DFL)  # a second one ends at once

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    folder = Path(str(trainer.args.output_dir))
    say(f"writing to {folder}/")
    try:
        with memory_advice(), peers_answer():
            for callback in trainer.callbacks:
                if isinstance(callback, Checkpoints):  # refuses another run, whose settings stay
                    callback.begin(trainer)
            if trainer.rank == 0:
                write_settings(folder / "settings.args", run, lora, trainer.args)
            trainer.train()
        if trainer.rank == 0:
            if trainer.stop and trainer.step < trainer.args.max_steps:
                go_on = f"the same command and --output_dir {folder} --resume"
                print(f"stopped after update {trainer.step}; go on with {go_on}")
            else:
                print_table(folder, trainer.args.seed, time.perf_counter() - started)
            if (folder / "metrics.jsonl").exists():  # not after --max_steps 0
                write_report(folder, trainer.args)
    except ResumeError as error:
        return refuse(error, 2)
    except (RewardError, FloatingPointError, MemoryError, PeerError, OSError) as error:
        return refuse(error, 1)
    except SafetensorError as error:  # a full disk
        return refuse(f"{folder / 'adapter'} could not be written: {error}", 1)
    return exit_process(0)
