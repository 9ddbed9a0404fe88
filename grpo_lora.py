"""GRPO with LoRA, whole: the objective, the rollout, the trainer and a demo, on plain transformers models.

    python grpo_lora.py                                         the demo: two CPU cores, no network, about a minute
    python grpo_lora.py --model M --data FILE.jsonl --rewards accuracy,format        your own model and data
    python grpo_lora.py --model M --data FILE.jsonl --tune                           find a learning rate first
    torchrun --nproc-per-node 4 grpo_lora.py ...                                     several processes
    from grpo_lora import group_advantages, grpo_loss, generate, completion_logps     or copy them out

GRPO (Shao et al. 2024, DeepSeekMath) samples G completions of each prompt, scores them, and pushes each one up or down by
how it compares with its own group: no value network. GRPOTrainer.update is the algorithm, in full; the rest serves it.
With LoRA (lora.py) the reference policy is the same model with the adapter off: no second model either.

Left out, and refused rather than ignored: vLLM and other servers, tools and multi-turn, images, entropy bonus,
off-policy masking, router losses, learned reward models. (TRL and verl have them.)
"""

import asyncio
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, LlamaConfig, get_scheduler
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora import (
    LoRAConfig,
    LoRALinear,
    TrainedCopy,
    apply_lora,
    linear,
    load_lora,
    lora_disabled,
    lora_merged,
    lora_snapshot,
    param_groups,
    save_lora,
)
from rewards import accuracy_reward, load_reward, sum_completion, sum_problems

# ------------------------------------------------------------------------------------------- the family, as a table

# fmt: off
AGGREGATION = {  # loss_type -> how per-token losses become one number; see grpo_loss
    "grpo": "sequence", "sapo": "sequence", "dapo": "token", "bnpo": "token", "cispo": "token", "vespo": "token",
    "dr_grpo": "constant", "luspo": "row_sum",
}
# fmt: on


class Variant(NamedTuple):
    """A paper's objective as values of the settings, and where it says so. Use: GRPOConfig(**VARIANTS["dapo"].settings)."""

    settings: dict[str, Any]
    source: str


_SEQUENCE = {"importance_sampling_level": "sequence"}
# fmt: off
VARIANTS = {
    "grpo": Variant({"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}, "DeepSeekMath, arXiv 2402.03300"),
    "dr_grpo": Variant({"loss_type": "dr_grpo", "scale_rewards": "none"}, "Dr. GRPO, arXiv 2503.20783"),
    "dapo": Variant({"loss_type": "dapo", "epsilon_high": 0.28}, "DAPO, arXiv 2503.14476"),
    "gspo": Variant({"loss_type": "grpo", **_SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4}, "GSPO, arXiv 2507.18071, 5.1"),
    "cispo": Variant({"loss_type": "cispo", "epsilon_high": 5.0}, "MiniMax-M1, arXiv 2506.13585; cap: 2510.13786"),
    "sapo": Variant({"loss_type": "sapo"}, "Soft Adaptive Policy Optimization, arXiv 2511.20347"),
    "luspo": Variant({"loss_type": "luspo", **_SEQUENCE, "epsilon": 2e-3, "epsilon_high": 2.5e-3}, "arXiv 2602.05261, 5.1"),
    "vespo": Variant({"loss_type": "vespo"}, "VESPO, arXiv 2602.10693"),
    "gdpo": Variant({"multi_objective_aggregation": "normalize_then_sum"}, "GDPO, arXiv 2601.05242"),
    "lite_ppo": Variant({"loss_type": "dapo", "scale_rewards": "batch"}, "Lite PPO, arXiv 2508.08221"),
    "top_entropy": Variant({"top_entropy_quantile": 0.2}, "Beyond the 80/20 Rule, arXiv 2506.01939"),
}
# fmt: on


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt")  # they need nothing but a warm-up


def _setting(default: Any, help: str, choices: Sequence[Any] = ()) -> Any:
    return field(default=default, metadata={"help": help, **({"choices": list(choices)} if choices else {})})


@dataclass
class GRPOConfig:
    """Settings of a run. A name that TRL has means the same here; the default values are our own.

    ValueError, in one line, for a value that cannot work.
    """

    output_dir: str | None = _setting(
        None, "Folder for the run's files. None: no files (command line: a new one in runs/)."
    )
    resume: bool = _setting(False, "Go on from the newest intact checkpoint in output_dir.")
    seed: int = _setting(0, "Seed of everything random: data order, adapter, sampling.")
    max_steps: int = _setting(100, "Optimiser updates.")
    # the batch
    prompts_per_step: int = _setting(8, "Prompts in one optimiser batch.")
    num_generations: int = _setting(8, "Completions of each prompt: the group, G.")
    per_device_train_batch_size: int = _setting(
        8, "Rows per micro-batch, in whole groups. Changes memory, not gradients."
    )
    max_completion_length: int = _setting(256, "Longest completion, in tokens.")
    temperature: float = _setting(1.0, "Of sampling and of scoring: the policy is softmax(logits / temperature).")
    system_prompt: str | None = _setting(None, "Put before every prompt; a text prompt then becomes a chat message.")
    # the objective
    loss_type: str = _setting("dapo", "Surrogate and aggregation; see grpo_loss.", tuple(AGGREGATION))
    importance_sampling_level: str = _setting("token", "One ratio a token, or one a row.", ("token", "sequence"))
    epsilon: float = _setting(0.2, "The ratio is clipped below at 1 - epsilon.")
    epsilon_high: float | None = _setting(
        None, "And above at 1 + epsilon_high (None: epsilon); cispo: the absolute cap."
    )
    delta: float | None = _setting(None, "Upper bound of the unclipped ratio (two-sided clipping, INTELLECT-2).")
    sapo_temperature_pos: float = _setting(1.0, "sapo's tau where the advantage is positive.")
    sapo_temperature_neg: float = _setting(1.05, "sapo's tau elsewhere.")
    scale_rewards: str = _setting(
        "group", "What advantages are divided by: a std, or nothing.", ("group", "batch", "none")
    )
    reward_weights: list[float] | None = _setting(None, "A weight for each reward function. None: all 1.")
    multi_objective_aggregation: str = _setting(
        "sum_then_normalize", "Order of the two with several rewards.", ("sum_then_normalize", "normalize_then_sum")
    )
    beta: float = _setting(0.0, "Weight of the KL penalty towards the reference policy.")
    kl_estimator: str = _setting("k3", "See kl_penalty.", ("k1", "k2", "k3"))
    use_bias_correction_kl: bool = _setting(True, "Multiply the KL term by the importance ratio.")
    num_iterations: int = _setting(1, "Optimiser updates made with each batch of completions.")
    mask_truncated_completions: bool = _setting(False, "Leave completions without an EOS out of the loss.")
    top_entropy_quantile: float = _setting(1.0, "Share of tokens, the most uncertain, that the policy term trains on.")
    # the optimiser: AdamW
    learning_rate: float | None = _setting(None, "Peak learning rate. None: see default_learning_rate; or --tune.")
    lora_plus_ratio: float = _setting(1.0, "LoRA+: B's learning rate over A's.")
    modules_to_save_learning_rate: float | None = _setting(None, "For parameters trained in full. None: learning_rate.")
    lr_scheduler_type: str = _setting("constant_with_warmup", "Schedule of the learning rate.", SCHEDULES)
    warmup_steps: int = _setting(0, "Updates over which the learning rate rises to its peak.")
    weight_decay: float = _setting(0.0, "AdamW's.")
    max_grad_norm: float = _setting(1.0, "Gradients are scaled down to this norm.")
    gradient_checkpointing: bool = _setting(False, "Recompute activations in backward: less memory, more time.")
    fsdp: bool = _setting(
        False, "Spread the frozen weights over the processes (FSDP2), for a base too big for one device."
    )
    # faults and processes
    reward_timeout: float = _setting(600.0, "Seconds that a reward function may take for a batch.")
    ddp_timeout: float = _setting(1800.0, "Seconds that one process waits for the others (torchrun).")
    # the record
    eval_steps: int | None = _setting(None, "Evaluate every so many updates, besides before and after.")
    save_steps: int = _setting(50, "Checkpoint every so many updates, and at the end. 0: never.")
    save_total_limit: int | None = _setting(2, "Checkpoints to keep. None: all.")
    num_completions_to_log: int = _setting(8, "Rows of each batch that go into completions.jsonl.")
    log_tokens_steps: int | None = _setting(
        None, "Every so many updates, record what they did to each token of these rows (benchmarks/report.py shows it)."
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if "choices" in f.metadata:
                known(getattr(self, f.name), f.metadata["choices"], f.name)
        at_least = {
            0: "max_steps epsilon beta learning_rate lora_plus_ratio warmup_steps weight_decay save_steps "
            "num_completions_to_log",
            1: "prompts_per_step per_device_train_batch_size max_completion_length num_iterations",
            2: "num_generations",
        }
        above_0 = "temperature max_grad_norm sapo_temperature_pos sapo_temperature_neg epsilon_high delta"
        above_0 += " top_entropy_quantile eval_steps save_total_limit modules_to_save_learning_rate log_tokens_steps"
        above_0 += " reward_timeout ddp_timeout"
        why = {
            "num_generations": " (an advantage compares completions of one prompt)",
            "temperature": " (greedy sampling gives a group of equal completions)",
        }
        checks = [(name, low, f"at least {low}") for low, names in at_least.items() for name in names.split()]
        for name, low, words in [*checks, *((name, 0, "above 0") for name in above_0.split())]:
            value = getattr(self, name)
            if value is not None and not (low < value < math.inf or (value == low and words != "above 0")):
                raise ValueError(f"{name} = {value}: must be finite and {words}{why.get(name, '')}")
        if self.epsilon > 1 and self.loss_type not in ("cispo", "sapo", "vespo"):
            raise ValueError(f"epsilon = {self.epsilon}: 1 - epsilon bounds a ratio, so at most 1")
        if self.top_entropy_quantile > 1:
            raise ValueError(f"top_entropy_quantile = {self.top_entropy_quantile}: a share of the tokens, at most 1")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("epsilon_high: cispo needs its cap on the ratio, which is absolute (ScaleRL uses 5.0)")
        if self.delta is not None and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"delta: has no meaning with loss_type {self.loss_type!r}, which does not clip")
        if self.max_steps % self.num_iterations:
            raise ValueError(
                f"max_steps = {self.max_steps}: must be a multiple of num_iterations = {self.num_iterations}"
            )


def known(value: Any, allowed: Iterable[str], what: str) -> None:
    """ValueError, naming the nearest allowed value, for one that is not allowed."""
    if value not in (allowed := list(allowed)):
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
        raise ValueError(f"{what}: {value!r} is not known, did you mean {near!r}? (all: {', '.join(allowed):.200})")


# ----------------------------------------------------------------------------------------------------- the objective


def group_advantages(rewards: Tensor, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """How much better each completion is than its group.    A = (R - mean_g) / (std + eps)

    rewards: (P, G), NaN where there is none. Returns (P, G). scale: "group" (GRPO, std of each group), "batch" (std of
    all rewards) or "none" (R - mean_g, Dr. GRPO). Every std has ddof 1. A row without reward leaves the statistics and
    gets 0; a group whose rewards are all equal, or that has only one, gets exactly 0. ValueError for other shapes, scales.
    Where a whole group has rewards, std(A) = s/(s + eps), s its std. (Shao et al. 2024, section 4.1.2)

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale = {scale!r}: must be 'group', 'batch' or 'none'")
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, must be (P, G): a row for each prompt's group")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    valid = ~rewards.isnan()
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(rewards, dim=1) + eps)
    elif scale == "batch":
        centred = centred / (_nanstd(rewards.flatten(), dim=0) + eps)
    low = rewards.masked_fill(~valid, math.inf).amin(dim=1, keepdim=True)
    high = rewards.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)
    return torch.where(valid & (low < high), centred, 0.0)  # a mean of equal numbers may differ from them by rounding


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """Standard deviation of what is not NaN, ddof 1, keeping the dimension; NaN for fewer than two values."""
    n = (~x.isnan()).sum(dim=dim, keepdim=True)
    squares = (x - x.nanmean(dim=dim, keepdim=True)) ** 2
    return (squares.nansum(dim=dim, keepdim=True) / (n - 1)).sqrt()


def combine_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """R = Σ_k w_k r_k over the functions that gave one; NaN where none did.    rewards: (P, G, K), weights: (K,) -> (P, G)

    The weights are not renormalised where one is missing.

    >>> combine_rewards(torch.tensor([[[1.0, 4.0], [1.0, math.nan], [math.nan, math.nan]]]), torch.tensor([1.0, 0.5]))
    tensor([[3., 1., nan]])
    """
    return torch.where(rewards.isnan().all(dim=-1), math.nan, (rewards * weights).nansum(dim=-1))


def multi_objective_advantages(
    rewards: Tensor,
    weights: Tensor,
    *,
    aggregation: str = "sum_then_normalize",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages from several reward functions.    rewards: (P, G, K), weights: (K,) -> (P, G)

    sum_then_normalize: group_advantages(Σ_k w_k r_k). normalize_then_sum (GDPO, arXiv 2601.05242): each function's rewards
    are normalised within the group, summed by weight, then centred and scaled over the batch; `scale` has no part in it.
    """
    if aggregation == "sum_then_normalize":
        return group_advantages(combine_rewards(rewards, weights), scale=scale, eps=eps)
    each = torch.stack([group_advantages(r, eps=eps) for r in rewards.unbind(-1)], dim=-1)
    total = combine_rewards(torch.where(rewards.isnan(), math.nan, each), weights)
    return group_advantages(total.view(1, -1), eps=eps).view_as(total)


def completion_mask(completion_ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """True up to and including the first EOS.    (B, T) token ids -> (B, T) bool

    Never made from padding: where pad and EOS are one token, that would mask the EOS the policy chose, and it would
    not learn to stop. `eos_token_ids`: all of them (a model may have several), or [] for none.

    >>> completion_mask(torch.tensor([[5, 2, 2], [5, 6, 7]]), [2])
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    is_eos = torch.isin(
        completion_ids, torch.tensor(list(eos_token_ids), dtype=torch.long, device=completion_ids.device)
    )
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0  # no EOS before this token


def kl_penalty(logps: Tensor, ref_logps: Tensor, *, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from samples of π.

        d = log π_ref - log π        k1 = -d        k2 = d²/2        k3 = exp(d) - d - 1

    logps, ref_logps: (B, T), nats. Returns (B, T). ValueError for another estimator. k3 (Schulman 2020; GRPO eq. 4)
    is never negative. As losses, on-policy: k1's gradient is 0 on average, k2's the reverse KL's, k3's the forward KL's.

    >>> [kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), estimator=k).item() for k in ("k1", "k2")]
    [1.0, 0.5]
    """
    d = ref_logps - logps
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return d.expm1() - d
    raise ValueError(f"kl_estimator = {estimator!r}: must be 'k1', 'k2' or 'k3'")


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    policy_mask: Tensor | None = None,
    max_completion_length: int | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The GRPO family: one loss, four switches. The fourth, the scale of the advantages, is in group_advantages.

    sg: stop-gradient. N: mask tokens. Everything of a token is (B, T), everything of a row is broadcast to it.

    1. ratio level    token: ρ_t = exp(logp_t - old_t)        sequence (GSPO): ρ = exp(mean_t(logp_t - old_t)), one a row
    2. surrogate      clip:  l_t = -min(min(ρ, δ) A, clip(ρ, 1-ε, 1+ε_high) A)                       (PPO; δ where given)
                      cispo: l_t = -sg(min(ρ, ε_high)) A logp_t
                      sapo:  l_t = -(4/τ) σ(τ(ρ - 1)) A             τ = τ_pos where A > 0, else τ_neg
                      vespo: l_t = -sg(φ(w)) A logp_t               φ = w^k e^{λ(1-w)}, w = Π_t ρ_t between 1e-8 and e^20,
                                                                    (k, λ) = (2, 3) where A >= 0, else (3, 2)
       then           l_t += β KL_t   (times ρ with use_bias_correction_kl: k1 and k3 then have the reverse KL's
                                      gradient; k2 has it without, and with ρ another one)
    3. aggregation    sequence (grpo, sapo): Σ_rows mean_t(l_t) / rows        token (dapo, bnpo, cispo, vespo): Σ l_t / N
                      constant (dr_grpo): Σ l_t / (rows · max_completion_length)        row_sum (luspo): Σ l_t / rows

    logps, old_logps, ref_logps: (B, T), nats; only logps carries gradients. advantages: (B,). mask: (B, T) bool, the tokens
    up to and including the first EOS; what lies outside it has no influence, whatever it is. policy_mask: (B, T), tokens
    that the policy term trains on (KL and N ignore it). normalizer: rows or tokens (N) of the whole optimiser batch, so
    that micro-batch losses sum to the loss of the batch; None: those of this call. Returns the loss, a scalar, and
    diagnostics, means over the tokens of this call. ValueError for shapes that do not fit and settings that lack a value.

    On the first update ρ = 1, yet the loss has a gradient: d/dθ exp(logp - sg(logp)) = d/dθ logp.
    """
    B, T = logps.shape
    for name, tensor, shape in [
        ("old_logps", old_logps, (B, T)),
        ("advantages", advantages, (B,)),
        ("mask", mask, (B, T)),
        ("ref_logps", ref_logps, (B, T)),
        ("policy_mask", policy_mask, (B, T)),
    ]:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape} to fit logps")
    if loss_type not in AGGREGATION:
        raise ValueError(f"loss_type = {loss_type!r}: must be one of {', '.join(AGGREGATION)}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level = {importance_sampling_level!r}: must be 'token' or 'sequence'")
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("epsilon_high: cispo needs its cap on the ratio, which is absolute (ScaleRL uses 5.0)")
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError("max_completion_length: dr_grpo divides by it")
    if beta and ref_logps is None:
        raise ValueError("ref_logps: needed for a KL penalty (beta > 0)")

    mask = mask.bool()
    logps, old_logps = torch.where(mask, logps, 0.0), torch.where(mask, old_logps, 0.0)  # not 0·NaN: nothing gets in
    m, A = mask.to(logps.dtype), advantages.unsqueeze(1)  # (B, T), (B, 1)
    lengths = m.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    high = epsilon if epsilon_high is None else epsilon_high

    log_ratio = (logps - old_logps).clamp(max=80)  # where exp is finite in float32: 0·inf would make the gradient NaN
    if importance_sampling_level == "sequence":
        ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).exp().expand(B, T)
    else:
        ratio = log_ratio.exp()

    if loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * A * logps
    elif loss_type == "sapo":
        tau = torch.where(A > 0, A.new_tensor(sapo_temperature_pos), A.new_tensor(sapo_temperature_neg))
        loss = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * A
    elif loss_type == "vespo":
        log_w = log_ratio.clamp(-20, 20).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)
        lam, k = torch.where(A >= 0, 3.0, 2.0), torch.where(A >= 0, 2.0, 3.0)
        phi = (lam + k * log_w - lam * log_w.exp()).exp().detach()
        loss = -phi * A * logps
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.min(bounded * A, ratio.clamp(1 - epsilon, 1 + high) * A)  # min for both signs of A: pessimistic
    if policy_mask is not None:
        loss = loss * policy_mask

    stats = {}
    if beta:
        assert ref_logps is not None
        kl = kl_penalty(logps, torch.where(mask, ref_logps, 0.0), estimator=kl_estimator)
        if use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + beta * kl
        stats["kl"] = kl
    if loss_type == "cispo":
        stats["cispo_clip_ratio"] = (ratio > high) & (A > 0)
    elif loss_type == "vespo":
        stats["vespo/phi_seq_mean"] = phi.expand(B, T)
    elif loss_type != "sapo":
        stats["clip_ratio/low_mean"] = (ratio < 1 - epsilon) & (A < 0)
        stats["clip_ratio/high_mean"] = (ratio > 1 + high) & (A > 0)
        stats["clip_ratio/region_mean"] = stats["clip_ratio/low_mean"] | stats["clip_ratio/high_mean"]

    loss, tokens = loss * m, m.sum().clamp(min=1)
    aggregation = AGGREGATION[loss_type]
    count = (tokens if aggregation == "token" else B) if normalizer is None else max(normalizer, 1)
    if aggregation == "sequence":
        loss = loss / lengths
    elif aggregation == "constant":
        loss = loss / (max_completion_length or 1)
    return loss.sum() / count, {key: ((x.detach() * m).sum() / tokens).item() for key, x in stats.items()}


# --------------------------------------------------------------------------------------- the model, seen as two parts


class _Stub(nn.Module):
    """Stands where the decoder was and returns given hidden states, so that the family's own forward is its head alone."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["decoder"] = decoder  # not as a submodule: its parameters are not the head's
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _StubOutput([self.hidden])


class _StubOutput(tuple):
    """A decoder's output, by position or by name; all but the hidden states (caches, router logits, ...) are None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _RoomyLayer(DynamicLayer):
    """Keys and values with room to grow, which a prompt gets when it is repeated: from then on a token is written where
    DynamicLayer would copy all that went before it."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []  # of keys and of values, each (rows, heads, tokens + room, width)

    def batch_repeat_interleave(self, repeats: int) -> None:
        old: Any  # Tensor
        for old in (self.keys, self.values) if self.get_seq_length() else ():
            rows, heads, tokens, width = old.shape
            buffer = old.new_empty(rows, repeats, heads, tokens + self.room, width)
            buffer[..., :tokens, :] = old.unsqueeze(1)
            self.buffers.append(buffer.flatten(0, 1))
        self._fill_to(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._fill_to(self.get_seq_length())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.buffers:
            return super().update(key_states, value_states, *args, **kwargs)
        past, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:end] = new
        return self._fill_to(end)

    def _fill_to(self, end: int) -> tuple[Tensor, Tensor]:
        if self.buffers:
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values  # type: ignore[return-value]


class _ShownLayer(_RoomyLayer):
    """Shows all of its room once the prompt is repeated, so that no shape changes and a decode step can be recorded.

    place (), on the device: how many tokens there are, so where the next one goes. The attention mask must hide the places
    after it and, as nothing slides out, those before a window.
    """

    def __init__(self, room: int, place: Tensor, is_sliding: bool) -> None:
        super().__init__(room)
        self.place, self.is_sliding = place, is_sliding

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for buffer in self.buffers:
            buffer[:, :, -self.room :] = 0  # NaN would spread, hidden or not

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.buffers:
            return super().update(key_states, value_states, *args, **kwargs)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.place, new)
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> Any:
        return self.place if self.buffers else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.buffers[0].shape[2], 0) if self.buffers else super().get_mask_sizes(query_length)

    def _fill_to(self, end: Any) -> tuple[Tensor, Tensor]:
        return super()._fill_to(self.buffers[0].shape[2] if self.buffers else end)


class _FasterHead(TorchFunctionMode):
    """F.linear is lora.linear within. (Not for a whole forward: it would cost what it saves, being asked about every call.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (linear if func is nn.functional.linear else func)(*args, **(kwargs or {}))


GRAPHS = {"cuda"}  # kinds of device where decode steps are recorded as CUDA graphs (see _decode); {} for none


class CausalLM:
    """A causal language model taken apart: `hidden` maps tokens to hidden states, `logits` maps these to logits.

    Every family has its own head (soft-capping in Gemma 2, a scale in Cohere and Granite, ...). `logits` runs the model's
    own forward with its decoder swapped for a stub that returns the hidden states given, so that no family needs a case
    of its own. ValueError for models that this cannot be right for.
    """

    def __init__(self, model: Any) -> None:
        wrapped = hasattr(model, "get_base_model")  # a peft.PeftModel
        self.core: Any = model.get_base_model() if wrapped else model
        kind = type(self.core).__name__
        for name, config in getattr(model, "peft_config", {}).items():
            if config.is_prompt_learning:
                raise ValueError(
                    f"peft adapter {name!r} adds virtual tokens outside the inner model; use LoRA or the like"
                )
        config = self.core.config
        if getattr(config, "is_decoder", True) is False and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(f"{kind} is an encoder, whose tokens see later ones; a causal (decoder) model is needed")
        if getattr(self.core.config, "is_encoder_decoder", False):
            raise ValueError(f"{kind} is an encoder-decoder; a causal (decoder-only) model is needed")
        if getattr(self.core.config.get_text_config(), "use_bidirectional_attention", False) in (True, "all"):
            raise ValueError(f"{kind} attends to later tokens (use_bidirectional_attention); a causal model is needed")
        self.decoder = self._first_called()
        modules = list(self.core.modules())
        self.places = [m._modules for m in modules for child in m._modules.values() if child is self.decoder]
        accepted = inspect.signature(self.decoder.forward).parameters
        self.takes_positions = "position_ids" in accepted
        names = ("cache", "past_key_values")  # transformers from 5.24, and before
        self.cache_name = next((name for name in names if name in accepted), "")
        self.takes_cache = bool(self.cache_name) and not getattr(self.core, "_is_stateful", False)
        if self.takes_cache:  # recurrent states cannot be repeated or dropped row by row, keys and values can
            kinds = {type(layer) for layer in DynamicCache(config=self.core.config).layers}
            self.takes_cache = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        self.sharded = hasattr(self.decoder, "unshard")  # FSDP: all processes must make the same number of forwards
        # transformers' word for a forward that asks the host nothing, and for which the mask says all about the cache
        fixed = getattr(self.core, "_can_compile_fullgraph", False) and self.takes_cache and self.takes_positions
        devices = {p.device for p in self.core.parameters()}
        self.records = fixed and not self.sharded and len(devices) == 1 and self.core.device.type in GRAPHS

    def _first_called(self) -> nn.Module:
        """The submodule that the model's forward calls first: its decoder, whatever the family calls it. A hook raises when
        it is reached, and the exception carries it here."""

        class Found(Exception):
            pass

        def stop(module: nn.Module, args: Any) -> None:
            if module is not self.core:
                raise Found(module)

        hook = nn.modules.module.register_module_forward_pre_hook(stop)
        try:
            self.core(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.core.device))
        except Found as found:
            return found.args[0]
        finally:
            hook.remove()
        raise ValueError(f"{type(self.core).__name__} calls no submodule: is it a causal language model?")

    def blocks(self, P: int, together: bool = True) -> list[slice]:
        """Which prompts go through the model at once: all, or where left padding is not safe, one at a time.

        It is unsafe where the model counts positions itself, padding included; where a recurrent state runs through
        the padding; and with eager attention in float64, where rows that see nothing become NaN (-1.8e308 is -inf to
        its float32 softmax) and spread.
        """
        eager64 = self.core.dtype == torch.float64 and self.core.config._attn_implementation == "eager"
        together = together and self.takes_cache and self.takes_positions and not eager64
        return [slice(0, P)] if together else [slice(p, p + 1) for p in range(P)]

    def new_cache(self, room: int = 0, place: Tensor | None = None) -> DynamicCache:
        """Of the model's own kinds of layers; room: tokens that it will grow by, one at a time; place: see _ShownLayer."""
        cache = DynamicCache(config=self.core.config)
        if place is not None:
            cache.layers = [_ShownLayer(room, place, getattr(layer, "is_sliding", False)) for layer in cache.layers]
        elif room:
            cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def hidden(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Hidden states of `ids` (B, t) -> (B, t, H). mask: (B, past + t), False where padding is.

        Positions are counted over the mask: with left padding they would otherwise start too late (wrong for
        learned positions, as in GPT-2; rotary models hide it).
        """
        kwargs: dict[str, Any] = {"use_cache": cache is not None, "attention_mask": mask.long()}
        if cache is not None:
            kwargs[self.cache_name] = cache
        if self.takes_positions:
            kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.decoder(input_ids=ids, **kwargs)[0]

    @contextmanager
    def _headless(self) -> Iterator[_Stub]:
        stub = _Stub(self.decoder)
        names = [next(name for name, child in place.items() if child is self.decoder) for place in self.places]
        try:
            for place, name in zip(self.places, names, strict=True):
                place[name] = stub
            yield stub
        finally:
            for place, name in zip(self.places, names, strict=True):
                place[name] = self.decoder

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V), by the model's own head, whatever it does to them; at least float32."""
        with self._headless() as stub, _FasterHead():
            stub.hidden = hidden.unsqueeze(0)
            dummy = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
            logits = self.core(input_ids=dummy, use_cache=False).logits.squeeze(0)  # where [0] fills zeros in backward
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def head_is_trained(self) -> bool:
        with self._headless():
            return any(p.requires_grad for p in self.core.parameters())


# ---------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """P prompts and the G completions of each, B = P·G rows; the G rows of a prompt are adjacent."""

    prompt_ids: Tensor  # (P, L), left-padded
    prompt_mask: Tensor  # (P, L) bool
    completion_ids: Tensor  # (B, T), right-padded; T is the longest row
    completion_mask: Tensor  # (B, T) bool, True up to and including the first EOS
    logps: Tensor  # (B, T), the sampler's own, at its temperature; 0 where masked

    def __post_init__(self) -> None:  # a mask of numbers would be taken for indices
        self.prompt_mask, self.completion_mask = self.prompt_mask.bool(), self.completion_mask.bool()

    @property
    def num_generations(self) -> int:
        return len(self.completion_ids) // len(self.prompt_ids)

    def select(self, prompts: Sequence[int]) -> "Rollout":
        """The groups of some prompts, without the padding that only the others need."""
        at = torch.as_tensor(prompts, device=self.prompt_ids.device)
        G = self.num_generations
        rows = (at.unsqueeze(1) * G + torch.arange(G, device=at.device)).flatten()
        L = int(self.prompt_mask[at].sum(dim=1).max())
        T = max(1, int(self.completion_mask[rows].sum(dim=1).max()))
        ids, mask, logps = self.completion_ids[rows, :T], self.completion_mask[rows, :T], self.logps[rows, :T]
        return Rollout(self.prompt_ids[at, -L:], self.prompt_mask[at, -L:], ids, mask, logps)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample G completions of each prompt from softmax(logits / temperature), untruncated: the policy that is scored.

    prompt_ids, prompt_mask: (P, L), left-padded. eos_token_ids: any of them ends a row; [] for full length. Each prompt
    is read once and its keys and values repeated; rows that ended leave the batch. Recurrent models, whose state cannot
    be repeated, take the slow plain path: one group at a time, everything recomputed for each token.

    The draws, (B, max_completion_length) uniforms, are made first and belong to their rows, so that what one row does
    changes no other. A token is drawn by inverting the cumulative distribution, in float64. Runs in eval mode.
    """
    P, G = len(prompt_ids), num_generations
    place = generator.device if generator else "cpu"  # the same draws wherever the model is
    draws = torch.rand(P * G, max_completion_length, generator=generator, dtype=torch.float64, device=place)
    draws = draws.to(prompt_ids.device)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=prompt_ids.device)
    lm = CausalLM(model)
    ids, logps = [], []
    with evaluating(model):
        for block in lm.blocks(P):
            columns = prompt_mask[block].any(dim=0)
            prompt, mask = prompt_ids[block][:, columns], prompt_mask[block][:, columns].bool()
            own = draws[block.start * G : block.stop * G]
            for row_ids, row_logps in zip(*_decode(lm, prompt, mask, own, temperature, eos, pad_token_id), strict=True):
                ids.append(row_ids)
                logps.append(row_logps)
    completion_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    mask = completion_mask(completion_ids, eos_token_ids)
    completion_ids = completion_ids.masked_fill(~mask, pad_token_id)  # rows may have gone on after their end
    sampled_logps = pad_sequence(logps, batch_first=True).masked_fill(~mask, 0)
    return Rollout(prompt_ids, prompt_mask, completion_ids, mask, sampled_logps)


def _recorded(step: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """step as a CUDA graph: it takes inputs like these, and the next call overwrites what this one returned. Where step asks
    the host something on its way, which cannot be recorded: step itself, and a warning."""
    with torch.cuda.device(inputs[0].device):  # nothing that runs on another one would be recorded
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        step(*inputs)  # what libraries set up at their first call is no part of a graph
        try:
            with torch.cuda.graph(graph):
                outputs = step(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            # until a recording ends well, torch gives no random numbers: a small one
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                inputs[0].clone()
            why = str(error.__context__ or error).partition("\n")[0]
            warnings.warn(f"decoding takes longer, as no CUDA graph of a step can be recorded: {why}", stacklevel=2)
            return step

    def replay(*new: Tensor) -> Any:
        for x, place in zip(new, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return outputs

    return replay


def _decode(
    lm: CausalLM, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor, temperature: float, eos: Tensor, pad: int
) -> tuple[Tensor, Tensor]:
    """The decode loop for one block of prompts. Returns token ids and their log-probs, both (B, T).

    On a GPU a step is a thousand small kernels, and to launch them takes longer than to run them. So it is recorded once, as
    a CUDA graph, and replayed for each token: the same kernels, one launch. Shapes may not change then: what is not written
    yet is masked, and rows that ended stay until three in four have.
    """
    (B, steps), (P, L), device = draws.shape, prompt_ids.shape, prompt_ids.device
    G = B // P
    alive = torch.arange(B, device=device)  # the rows in the batch,
    going = torch.ones(B, dtype=torch.bool, device=device)  # and those of them that are still being written
    ids = torch.full((B, steps), pad, dtype=torch.long, device=device)
    logps = torch.zeros(B, steps, dtype=torch.float64, device=device)
    place = torch.tensor(L, device=device) if lm.records else None
    cache = lm.new_cache(steps, place) if lm.takes_cache else None

    def draw(hidden: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, H), (n, 1) -> tokens and their log-probs, (n, 1) each, and whether the rows go on, (n,)."""
        log_probs = (lm.logits(hidden) / temperature).log_softmax(dim=-1)  # (n, V)
        cdf = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
        # inverse CDF: the first token with cdf > u; the draw is scaled because rounding leaves the last entry near 1
        tokens = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        tokens = tokens.clamp(max=cdf.shape[1] - 1)  # a draw within rounding of 1
        return tokens, log_probs.gather(1, tokens), (tokens != eos).all(dim=1)

    def step(context: Tensor, seen: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return draw(lm.hidden(context, seen, cache)[:, -1], u)

    hidden = lm.hidden(prompt_ids, prompt_mask, cache)[:, -1].repeat_interleave(G, dim=0)  # (B, H)
    context = prompt_ids.repeat_interleave(G, dim=0)  # (B, L)
    seen = prompt_mask.repeat_interleave(G, dim=0)  # (B, L), and room for the completions:
    seen = nn.functional.pad(seen, (0, steps))  # (B, L + steps), False where no token is yet
    if cache is not None:
        cache.batch_repeat_interleave(G)
    tokens, logp, more = draw(hidden, draws[:, :1])
    next_step: Any = None
    for t in range(steps):
        ids[alive, t] = tokens.squeeze(1)
        logps[alive, t] = logp.squeeze(1).double()
        going = going & more
        left = int(going.sum())  # the one number that is asked of the device for each token
        if t + 1 == steps or not left:
            break
        context = torch.cat([context, tokens], dim=1) if cache is None else tokens
        seen[:, L + t] = True
        if left < len(alive) if place is None else left <= len(alive) // 4:
            rows = going.nonzero().squeeze(1)
            alive, going, seen, context = alive[rows], going[rows], seen[rows], context[rows]
            if cache is not None:
                cache.batch_select_indices(rows)
            next_step = None
        u = draws[alive, t + 1 : t + 2]
        if place is None:
            tokens, logp, more = step(context, seen[:, : L + t + 1], u)
        else:
            place.fill_(L + t)
            next_step = next_step or _recorded(step, (context, seen, u))
            tokens, logp, more = next_step(context, seen, u)
    for _ in range(t + 1, steps if lm.sharded else 0):  # the other processes may still be writing
        lm.hidden(prompt_ids[:1], prompt_mask[:1])
    return ids[:, : t + 1], logps[:, : t + 1].to(logp.dtype)


# ------------------------------------------------------------------------------------------------ log-probabilities


class _TokenLogps(torch.autograd.Function):
    """log p(target) and entropy from hidden states, in chunks, under a head that is not trained.

    d logp_t / d h_t = headᵀ (onehot(y_t) - p_t) / temperature is one vector per token, whatever the loss will be. So it is
    taken while the chunk's logits exist and only scaled in backward: no logits are kept, and nothing is computed twice.
    hidden: (n, H), targets: (n,). Buffers of size (chunk, V) are used again once what they held is no longer needed.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], T: float, chunk: int
    ) -> Any:
        with_slope = ctx.needs_input_grad[0]

        def of_chunk(h: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # a function, so that its buffers go when it returns
            with torch.set_grad_enabled(with_slope):
                h = h.detach().requires_grad_(with_slope)
                logits = head(h)
            z = (logits.detach() / T).log_softmax(dim=-1)  # (n, V)
            logp, p = z.gather(1, y.unsqueeze(1)).squeeze(1), z.exp()
            entropy = -torch.einsum("nv,nv->n", p, z.clamp_(min=-1e4))  # 0 log 0 = 0
            if not with_slope:
                return logp, entropy
            # d logp / d logits = (onehot - p) / T
            slope = p.mul_(-1 / T).scatter_add_(1, y.unsqueeze(1), p.new_full((len(y), 1), 1 / T))
            return logp, entropy, torch.autograd.grad(logits, h, slope)[0]

        chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        logp, entropy, *slope = (torch.cat(parts) for parts in zip(*(of_chunk(h, y) for h, y in chunks), strict=True))
        ctx.save_for_backward(*slope)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return (grad_logps.unsqueeze(1) * slopes).to(slopes.dtype), None, None, None, None


def _chunk_logps(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], T: float) -> tuple[Tensor, Tensor]:
    log_probs = (head(hidden) / T).log_softmax(dim=-1)
    entropy = torch.special.entr(log_probs.detach().exp()).sum(dim=-1)
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def completion_logps(
    model: nn.Module, rollout: Rollout, *, temperature: float, share_prompt: bool = True, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """log π(token | what is before it) of each completion token, and the entropy there, of softmax(logits / temperature).

    Returns logps (B, T), with gradients, and entropies (B, T), without, in nats; both 0 where masked. With share_prompt each
    prompt is read once and its keys and values are repeated for its G rows; gradients flow back through the repeat.
    Otherwise, and for models without such a cache, and under activation checkpointing (where transformers drops
    the cache), each group is read whole, without padding on the left. Both give the same values and gradients. The head
    sees chunk_size tokens at a time, and only those inside the mask: no tensor has the size B·T·V.
    """
    lm, mask, G = CausalLM(model), rollout.completion_mask, rollout.num_generations
    checkpointed = any(getattr(m, "gradient_checkpointing", False) and m.training for m in lm.core.modules())
    share = share_prompt and lm.takes_cache and not (checkpointed and torch.is_grad_enabled())
    width = max(
        mask.shape[1] - 1, int(lm.sharded)
    )  # sharded: as many forwards for rows of one token as for longer ones
    rows = []
    for block in lm.blocks(len(rollout.prompt_ids), together=share):
        columns = rollout.prompt_mask[block].any(dim=0)
        prompt, prompt_mask = rollout.prompt_ids[block][:, columns], rollout.prompt_mask[block][:, columns]  # (p, L)
        inputs = rollout.completion_ids[block.start * G : block.stop * G, :width]  # (p·G, T - 1), what predicts a token
        seen = torch.cat([prompt_mask.repeat_interleave(G, dim=0), torch.ones_like(inputs, dtype=torch.bool)], dim=1)
        if share:
            cache = lm.new_cache()
            first = lm.hidden(prompt, prompt_mask, cache)[:, -1:]  # predicts the first token
            hidden = first.repeat_interleave(G, dim=0)
            if width:
                cache.batch_repeat_interleave(G)
                hidden = torch.cat([hidden, lm.hidden(inputs, seen, cache)], dim=1)
        else:
            whole = torch.cat([prompt.repeat_interleave(G, dim=0), inputs], dim=1)
            hidden = lm.hidden(whole, seen)[:, prompt.shape[1] - 1 :]
        rows.append(hidden[:, : mask.shape[1]])
    hidden = torch.cat(rows)  # (B, T, H)

    h, y = hidden[mask], rollout.completion_ids[mask]  # (n, H), (n,)
    if not len(y):
        zero = hidden.sum() * 0.0  # keeps the graph, so that backward works and gives zeros
        return zero + torch.zeros_like(mask, dtype=h.dtype), torch.zeros_like(mask, dtype=h.dtype)
    if torch.is_grad_enabled() and lm.head_is_trained():
        chunks = zip(h.split(chunk_size), y.split(chunk_size), strict=True)
        parts = [checkpoint(_chunk_logps, hc, yc, lm.logits, temperature, use_reentrant=False) for hc, yc in chunks]
        logps, entropies = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    else:
        logps, entropies = _TokenLogps.apply(h, y, lm.logits, temperature, chunk_size)
    blank = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
    return blank.masked_scatter(mask, logps), blank.masked_scatter(mask, entropies)


# ------------------------------------------------------------------------------------------------------- the trainer


class RewardError(RuntimeError):
    """A reward function failed, or returned what cannot be used. The message names it."""


class ResumeError(ValueError):
    """The run in output_dir cannot be resumed with these settings. The message names the one that differs."""


@dataclass
class MicroBatch:
    """Some groups of a rollout, and what stays fixed about them while the policy moves."""

    prompts: list[int]  # which of the whole rollout's
    rollout: Rollout
    advantages: Tensor  # (B,)
    old_logps: Tensor | None = None  # (B, T), like the rest; None: the policy itself, before its update
    ref_logps: Tensor | None = None
    policy_mask: Tensor | None = None


@contextmanager
def memory_advice() -> Iterator[None]:
    """MemoryError, naming the settings that need less, for whatever torch raises when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(
                "out of memory: lower per_device_train_batch_size (it changes no gradient), then max_completion_length or "
                "num_generations; gradient_checkpointing and --dtype bfloat16 need less too"
            ) from error
        raise


class GRPOTrainer:
    """GRPO on whatever parameters of `model` require gradients: our adapters, peft's, whole modules, or all of it.

    model: a causal LM of transformers, with lora.apply_lora or wrapped by peft, or fully trainable. reward_funcs: functions
    (see rewards.py) or their names. train_dataset, eval_dataset: sequences of dicts with `prompt` (text or chat messages) and
    any columns the rewards use. processing_class: the tokenizer (None: the model's own). reference: a callable that returns a
    context manager within which the model is the reference policy; None: lora_disabled where that is where training
    starts from, else a snapshot taken now. ValueError for what cannot work, in one line.
    """

    def __init__(
        self,
        model: nn.Module,
        reward_funcs: Any,
        args: GRPOConfig,
        train_dataset: Sequence[dict[str, Any]],
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        processing_class: Any = None,
        reference: Callable[[], Any] | None = None,
    ) -> None:
        funcs = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self.reward_funcs = [load_reward(f) if isinstance(f, str) else f for f in funcs]
        names = [getattr(f, "__name__", type(f).__name__) for f in self.reward_funcs]
        self.reward_names = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
        self.reward_weights = torch.tensor(reward_weights(args, self.reward_funcs), dtype=torch.float64)
        self.rank, self.world = rank_and_world()
        if args.prompts_per_step % self.world:
            raise ValueError(
                f"prompts_per_step = {args.prompts_per_step}: must be a multiple of the {self.world} processes"
            )
        self.model: Any = model
        args = dataclasses.replace(args)  # ours: the caller's stays as it is
        if args.learning_rate is None:
            args.learning_rate = default_learning_rate(model)
        self.args, self.train_dataset, self.eval_dataset = args, train_dataset, eval_dataset
        lm = CausalLM(model)  # refuses models that it cannot be right for
        if not lm.takes_cache:
            say(
                f"{type(lm.core).__name__} has no cache of keys and values alone: each token recomputes its past, slowly"
            )
        name = getattr(lm.core.config, "_name_or_path", "")
        if processing_class is None and not name:
            raise ValueError("processing_class: the model was not loaded from a folder or hub, so pass its tokenizer")
        self.tokenizer = processing_class or AutoTokenizer.from_pretrained(name)
        for rows in (train_dataset, eval_dataset):
            if rows is not None:
                check_rows(rows, self.reward_funcs)
                check_lengths(rows, self.tokenizer, args, lm.core.config)
        self.eos_token_ids = eos_token_ids(lm.core, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_ids[0] if pad is None else pad

        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("the model has no trainable parameter: call apply_lora (or peft's get_peft_model) first")
        dropout = [m for name, m in model.named_modules() if "lora_dropout" in name and getattr(m, "p", 0) > 0]
        if dropout and args.num_iterations > 1:
            raise ValueError("lora_dropout with num_iterations > 1: old and new log-probs would differ by it; use 0")
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.base_fingerprint = fingerprint(frozen)
        same_on_all(self.params.values())
        self.reference = reference or default_reference(model)
        if args.gradient_checkpointing:
            lm.core.activation_checkpointing_enable({"use_reentrant": False})
        if args.fsdp:
            if not dist.is_initialized() or not frozen:
                raise ValueError("fsdp: spreads frozen weights over processes; start with torchrun, and train adapters")
            shard_base(model)
        keep_freed_memory()
        if next(iter(self.params.values())).device.type == "cpu":  # where sdpa would copy keys for each query head
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        groups = param_groups(model, args.learning_rate, args.lora_plus_ratio, args.modules_to_save_learning_rate)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
        self.scheduler = get_scheduler(args.lr_scheduler_type, self.optimizer, args.warmup_steps, args.max_steps)
        dense = [m.base_layer.weight.dtype for m in model.modules() if isinstance(m, LoRALinear)]
        self.merges = bool(dense) and min(torch.finfo(d).bits for d in dense) >= 32  # half precision would round
        self.merges &= not args.fsdp
        self.objective = {
            name: getattr(args, name) for name in inspect.signature(grpo_loss).parameters if hasattr(args, name)
        }
        self.generator: torch.Generator | None = None  # of the rollouts; train and evaluate seed it
        self.reward_metrics = WeightedMeans()  # what reward functions log
        self.step = 0  # optimiser updates made
        self.tokens = 0  # prompt and completion tokens trained on
        self.last_batch: tuple[Rollout, list[MicroBatch]]
        self.stop = False  # set from outside (a signal): finish the update in hand, save, return

    # ---- the algorithm

    def update(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """GRPO, in full: one batch of prompts, and the num_iterations optimiser updates made with it. Returns metrics."""
        args, means = self.args, WeightedMeans()
        rollout = self.sample(rows, args.num_generations)  # P prompts, B = P·G completions
        rewards, samples = self.score(rows, rollout)  # (P, G, K), of all processes
        advantages = multi_objective_advantages(
            rewards, self.reward_weights, aggregation=args.multi_objective_aggregation, scale=args.scale_rewards
        )  # (P, G)
        if args.mask_truncated_completions:
            rollout.completion_mask = rollout.completion_mask & self.ended(rollout).unsqueeze(1)
        per_token = AGGREGATION[args.loss_type] == "token"
        normalizer = sum(gather(int(rollout.completion_mask.sum()) if per_token else len(rollout.completion_mask)))
        micro_batches = self.micro_batches(rollout, advantages.to(rollout.logps))

        for _ in range(args.num_iterations):
            for parameter in self.params.values():
                parameter.grad = torch.zeros_like(parameter)  # zero and not None, also if no group has an advantage
            if args.top_entropy_quantile < 1:
                self.mark_uncertain(micro_batches)
            total = 0.0 if rollout.logps.isfinite().all() else math.nan  # also where no group needs a forward
            for batch in micro_batches:
                mask = batch.rollout.completion_mask
                with adapter_dropout(self.model):
                    logps, entropies = completion_logps(self.model, batch.rollout, temperature=args.temperature)
                # with one iteration the old policy is this very one, and the ratio exactly 1
                old_logps = logps.detach() if batch.old_logps is None else batch.old_logps
                loss, stats = grpo_loss(
                    logps,
                    old_logps,
                    batch.advantages,
                    mask,
                    ref_logps=batch.ref_logps,
                    policy_mask=batch.policy_mask,
                    normalizer=normalizer,
                    **self.objective,
                )
                loss.backward()
                total += loss.item()
                gap = (old_logps - batch.rollout.logps).abs()[mask]
                stats |= {"entropy": entropies[mask].mean().item(), GAP: gap.mean().item()}
                means.add(int(mask.sum()), **stats)
            total, grad_norm = self.reduce_and_clip(total)
            finite = math.isfinite(total) and math.isfinite(grad_norm)
            if finite:
                self.optimizer.step()
            means.add(1, loss=total, grad_norm=grad_norm, learning_rate=self.scheduler.get_last_lr()[0])
            means.add(1, skipped_updates=not finite)
            self.scheduler.step()
        self.tokens += sum(s["prompt_length"] + s["length"] for s in samples)
        self.last_batch = rollout, micro_batches  # for token_changes
        return self.summarize(samples, rewards, advantages) | means.result() | {"num_tokens": self.tokens}

    def sample(self, rows: Sequence[dict[str, Any]], num_generations: int) -> Rollout:
        """Completions from the policy as it is. Adapters are merged into dense weights meanwhile, where that is exact.

        Of the draws each process takes those of its own rows, so that what is sampled does not depend on their number.
        """
        prompts = [torch.tensor(encode_prompt(row["prompt"], self.tokenizer, self.args.system_prompt)) for row in rows]
        ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")  # (P, L)
        ids = ids.to(next(iter(self.params.values())).device)

        def skip(processes: int) -> None:  # as many draws as so many processes make
            B, T = processes * len(rows) * num_generations, self.args.max_completion_length
            torch.rand(B, T, generator=self.generator, dtype=torch.float64)

        skip(self.rank)
        with lora_merged(self.model) if self.merges else contextlib.nullcontext():
            rollout = generate(
                self.model,
                ids.masked_fill(ids < 0, self.pad_token_id),
                ids >= 0,
                num_generations=num_generations,
                max_completion_length=self.args.max_completion_length,
                temperature=self.args.temperature,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                generator=self.generator,
            )
        skip(self.world - 1 - self.rank)
        return rollout

    def score(self, rows: Sequence[dict[str, Any]], rollout: Rollout) -> tuple[Tensor, list[dict[str, Any]]]:
        """Every reward function on every completion: (P, G, K) float64, NaN for None; and a record of each completion.

        Each process scores its own; what is returned is of all processes.
        """
        G = rollout.num_generations
        rows = [row for row in rows for _ in range(G)]  # each row G times, as the completions lie; not all rows G times
        ids = [row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        keys = dict.fromkeys(key for row in rows for key in row)
        columns: dict[str, Any] = {key: [row.get(key) for row in rows] for key in keys}
        if "solution" in columns:
            columns["answer"] = [row.get("answer", row.get("solution")) for row in rows]
        prompts = columns["prompts"] = columns.pop("prompt")
        columns["completions"] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns["completion_ids"] = ids
        columns["trainer_state"] = SimpleNamespace(
            global_step=self.step, max_steps=self.args.max_steps, max_completion_length=self.args.max_completion_length
        )
        extra: dict[str, list[Any]] = {}
        columns |= {
            "log_extra": extra.__setitem__,
            "log_metric": lambda n, value: self.reward_metrics.add(1, **{n: value}),
        }
        scores = [call_reward(f, len(rows), columns, self.args.reward_timeout) for f in self.reward_funcs]
        for name, values in extra.items():
            if len(values) != len(rows):
                raise RewardError(f"log_extra({name!r}): {len(values)} values for {len(rows)} completions")
        ended, prompt_lengths = self.ended(rollout).tolist(), rollout.prompt_mask.sum(dim=1).tolist()
        samples = [
            {name: values[i] for name, values in extra.items()}  # whose names must not stand in for ours
            | {"prompt": prompts[i], "completion": texts[i], "length": len(ids[i]), "ended": ended[i]}
            | {"prompt_length": prompt_lengths[i // G]}
            | {f"rewards/{name}": score[i] for name, score in zip(self.reward_names, scores, strict=True)}
            for i in range(len(rows))
        ]
        by_row = [[math.nan if r is None else r for r in row] for row in zip(*scores, strict=True)]
        everywhere = torch.tensor([row for part in gather(by_row) for row in part], dtype=torch.float64)
        return everywhere.view(-1, G, len(scores)), [sample for part in gather(samples) for sample in part]

    def ended(self, rollout: Rollout) -> Tensor:
        """(B,) bool: which rows chose an EOS, rather than being cut off."""
        eos = torch.tensor(self.eos_token_ids, device=rollout.completion_ids.device)
        return (torch.isin(rollout.completion_ids, eos) & rollout.completion_mask).any(dim=1)

    @torch.no_grad()
    def micro_batches(self, rollout: Rollout, advantages: Tensor) -> list[MicroBatch]:
        """This process's groups, whole, sorted by length to save padding, with their old and reference log-probs where
        these are needed. A group without advantage has no gradient, and needs no forward, unless something else looks at it.
        """
        args, G, P = self.args, rollout.num_generations, len(rollout.prompt_ids)
        advantages = advantages[self.rank * P :][:P]
        everything = args.beta or args.top_entropy_quantile < 1 or args.fsdp  # FSDP: as many forwards on each process
        groups = [p for p in range(len(advantages)) if everything or advantages[p].any()]
        lengths = rollout.completion_mask.sum(dim=1).view(-1, G).amax(dim=1).tolist()
        groups.sort(key=lambda p: lengths[p])
        size = max(1, args.per_device_train_batch_size // G)
        chosen = [groups[i : i + size] for i in range(0, len(groups), size)]
        batches = [MicroBatch(some, rollout.select(some), advantages[some].flatten()) for some in chosen]
        with evaluating(self.model):
            for batch in batches:
                if args.num_iterations > 1:
                    batch.old_logps, _ = completion_logps(self.model, batch.rollout, temperature=args.temperature)
                if args.beta:
                    with self.reference():
                        batch.ref_logps, _ = completion_logps(self.model, batch.rollout, temperature=args.temperature)
        return batches

    @torch.no_grad()
    def mark_uncertain(self, batches: list[MicroBatch]) -> None:
        """policy_mask: the tokens in the top quantile of the policy's entropy, over the whole optimiser batch."""
        with evaluating(self.model):
            temperature = self.args.temperature
            entropies = [completion_logps(self.model, b.rollout, temperature=temperature)[1] for b in batches]
        own = [x for e, b in zip(entropies, batches, strict=True) for x in e[b.rollout.completion_mask].tolist()]
        seen = torch.tensor([x for part in gather(own) for x in part], dtype=torch.float64)
        threshold = seen.quantile(1 - self.args.top_entropy_quantile) if len(seen) else math.inf
        for batch, entropy in zip(batches, entropies, strict=True):
            batch.policy_mask = entropy >= threshold

    def reduce_and_clip(self, loss: float) -> tuple[float, float]:
        """Sum loss and gradients over the processes, in one all-reduce, and clip. Returns the loss and the norm before."""
        gradients: list[Any] = [p.grad for p in self.params.values()]
        if self.world > 1:
            dtype = functools.reduce(torch.promote_types, [g.dtype for g in gradients], torch.float32)
            flat = torch.cat(
                [gradients[0].new_tensor([loss], dtype=dtype), *(g.flatten().to(dtype) for g in gradients)]
            )
            with peers_answer():
                dist.all_reduce(flat)
            loss = flat[0].item()
            for gradient, summed in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        return loss, nn.utils.clip_grad_norm_(self.params.values(), self.args.max_grad_norm).item()

    # ---- running

    @memory_advice()
    def train(self, until: int | None = None) -> dict[str, Any]:
        """Run to max_steps, to update `until`, or till `stop` is set. Returns the last metrics. Writes the run's files if
        output_dir is set."""
        args, metrics, stopping = self.args, dict[str, Any](), False
        end = args.max_steps if until is None else min(until, args.max_steps)
        if self.rank == 0:
            check_output_dir(args)
        if args.resume:
            self.step = load_checkpoint(self)
        record = RunRecord(args.output_dir if self.rank == 0 else None, keep_to=self.step if args.resume else None)
        watch = EarlyWarnings(record.history)
        sound = [i for i, row in enumerate(record.history, 1) if row["skipped_updates"] < 1]
        skipped = len(record.history) - max(sound, default=0)  # in a row, up to now
        if self.eval_dataset and self.step == 0:
            record.write({"step": 0, **self.evaluate()}, self.samples[: args.num_completions_to_log])
        off = None if self.rank == 0 else True  # None: off where there is no terminal
        bar = tqdm(total=end, initial=self.step, desc="GRPO", unit="update", disable=off)
        while self.step < end and not stopping:
            started, index = time.perf_counter(), self.step // args.num_iterations
            self.seed("update", index)
            metrics = self.update(self.batch(index))
            self.step += args.num_iterations
            epoch = (index + 1) * args.prompts_per_step / len(self.train_dataset)
            own = {"step": self.step, "epoch": epoch, "step_time": time.perf_counter() - started}
            metrics = own | metrics | own  # in front; and again, so that nothing a reward logs replaces them
            warnings = watch.check(metrics | {"idle": self.idle_adapters()})
            samples, done = self.samples[: args.num_completions_to_log], self.step >= end
            if args.output_dir and self._due(args.log_tokens_steps):
                changes = self.token_changes()  # of this process's first rows, which on the first are the first of all
                samples[: len(changes)] = [s | change for s, change in zip(samples, changes, strict=False)]
            if self.eval_dataset and (done or self._due(args.eval_steps)):
                metrics |= self.evaluate()
                samples += self.samples[: args.num_completions_to_log]
            record.write(metrics | ({"warnings": warnings} if warnings else {}), samples)
            bar.update(args.num_iterations)
            bar.set_postfix_str(f"reward {metrics['reward']:.3f}, length {metrics['completions/mean_length']:.0f}")
            for text in warnings if self.rank == 0 else ():
                bar.write(f"warning: update {self.step}: {text}", file=sys.stderr)
            stopping = any(gather(self.stop))  # asked of one, all processes stop at the same update
            self.stop = self.stop or stopping
            skipped = skipped + 1 if metrics["skipped_updates"] == 1 else 0
            broken = skipped >= MAX_SKIPPED
            saving = stopping or broken or (args.save_steps and (done or self._due(args.save_steps)))
            if args.output_dir and saving and self.rank == 0 and self.finite():
                record.sync()
                save_checkpoint(self)
            if broken:
                raise FloatingPointError(
                    f"update {self.step}: {skipped} updates in a row had a loss or gradient that is not finite, and were "
                    f"skipped; lower learning_rate (now {args.learning_rate}), or go on from an earlier checkpoint"
                )
        bar.close()
        if args.output_dir and self.rank == 0:
            save_policy(self.model, Path(args.output_dir) / "adapter")
        return metrics

    def evaluate(self) -> dict[str, Any]:
        """One completion of each evaluation problem, with the same draws every time. Returns metrics named eval_...

        Besides the rewards: accuracy, where every row has an answer, and the share of completions with a <think> tag.
        """
        data = self.eval_dataset
        if not data:
            raise ValueError("evaluate needs an eval_dataset")
        self.seed("evaluate")
        size, rewards, samples = self.args.prompts_per_step * self.args.num_generations, [], []
        for start in range(0, len(data), size):
            rows = [data[i] for i in range(start, min(start + size, len(data)))]
            mine = self.share(rows)
            scores, some = self.score(mine, self.sample(mine, 1))
            rewards.append(scores[: len(rows)])
            samples += some[: len(rows)]
        metrics = self.summarize(samples, torch.cat(rewards))
        texts = [sample["completion"] for sample in samples]
        metrics["think_rate"] = sum("<think>" in text for text in texts) / len(texts)
        gold = [data[i].get("answer", data[i].get("solution")) for i in range(len(data))]
        graded = [score for score in accuracy_reward(None, texts, gold) if score is not None]
        if len(graded) == len(texts):
            metrics["accuracy"] = sum(graded) / len(graded)
        self.samples = [{"split": "eval", **sample} for sample in samples]
        return {f"eval_{key}": value for key, value in metrics.items()}

    def token_changes(self) -> list[dict[str, Any]]:
        """What the last update did to the tokens of its first groups, as many as num_completions_to_log asks for.

        Per token: its text, its log-prob when it was sampled and now, and whether it was in the policy term of the loss.
        """
        args, (rollout, micro_batches), G = self.args, self.last_batch, self.args.num_generations
        trained = rollout.completion_mask.clone()
        for batch in micro_batches:
            if batch.policy_mask is not None:
                for p, kept in zip(batch.prompts, batch.policy_mask.split(G), strict=True):
                    trained[p * G : (p + 1) * G, : kept.shape[1]] &= kept
        # all that was written, also where mask_truncated_completions took it out of the loss
        written = dataclasses.replace(
            rollout, completion_mask=completion_mask(rollout.completion_ids, self.eos_token_ids)
        )
        rows = []
        for p in range(min(-(-args.num_completions_to_log // G), len(rollout.prompt_ids))):
            shown = written.select([p])
            with torch.no_grad(), evaluating(self.model):
                logps, _ = completion_logps(self.model, shown, temperature=args.temperature)
            for i, n in enumerate(shown.completion_mask.sum(dim=1).tolist()):
                row = {"tokens": token_texts(self.tokenizer, shown.completion_ids[i, :n].tolist())}
                row |= {"logps_sampled": shown.logps[i, :n].tolist(), "logps_after": logps[i, :n].tolist()}
                rows.append(row | {"trained": trained[p * G + i, :n].tolist()})
        return rows

    def batch(self, index: int) -> list[dict[str, Any]]:
        """This process's prompts of optimiser batch `index`: a new permutation each epoch, a function of the seed alone."""
        n, size, rows = len(self.train_dataset), self.args.prompts_per_step, []
        for position in range(index * size, (index + 1) * size):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.args.seed + position // n))
            rows.append(self.train_dataset[int(order[position % n])])
        return self.share(rows)

    def share(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """This process's part of some rows: as many for each, the last row being repeated where they do not divide."""
        each = -(-len(rows) // self.world)
        padded = rows + rows[-1:] * (each * self.world - len(rows))
        return padded[self.rank * each :][:each]

    def seed(self, *what: Any) -> None:
        """Reseed everything from the run's seed and `what`: an update's randomness follows from its number, so that a
        resumed run goes on as the run would have."""
        digest = hashlib.sha256(repr((self.args.seed, *what)).encode()).digest()
        transformers.set_seed((int.from_bytes(digest[:4], "big") + self.rank) % 2**32)
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[4:8], "big"))

    def idle_adapters(self) -> list[str]:
        """Adapters that do nothing so far: B is 0. Some families read a layer's weight past its adapter (Mamba's dt_proj)."""
        return [name for name, p in self.params.items() if "lora_B" in name and not p.any()]

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.params.values())

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.step % every < self.args.num_iterations  # type: ignore[operator]

    def summarize(
        self, samples: list[dict[str, Any]], rewards: Tensor, advantages: Tensor | None = None
    ) -> dict[str, Any]:
        """TRL's metrics of a batch of completions and their rewards (P, G, K). Keeps the completions in self.samples."""
        total = combine_rewards(rewards, self.reward_weights)  # (P, G)
        lengths = torch.tensor([float(s["length"]) for s in samples])
        ended = lengths[torch.tensor([s["ended"] for s in samples])]
        metrics = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
        for name, values in (("", lengths), ("terminated_", ended if len(ended) else torch.zeros(1))):
            metrics |= {f"completions/{f}_{name}length": getattr(values, f)().item() for f in ("mean", "min", "max")}
        for name, values in zip(self.reward_names, rewards.unbind(-1), strict=True):
            metrics[f"rewards/{name}/mean"] = values.nanmean().item()
            metrics[f"rewards/{name}/std"] = _nanstd(values.flatten(), dim=0).item()
        metrics = self.reward_metrics.result() | metrics | {"reward": total.nanmean().item()}
        self.reward_metrics = WeightedMeans()
        if advantages is not None:
            metrics["reward_std"] = _nanstd(total.flatten(), dim=0).item()
            metrics["frac_reward_zero_std"] = (~advantages.any(dim=1)).double().mean().item()
            given, G = advantages.flatten().tolist(), advantages.shape[1]
            samples = [s | {"advantage": given[i], "group": i // G} for i, s in enumerate(samples)]
        self.samples = samples
        return metrics


GAP = "sampling/sampling_logp_difference/mean"  # TRL's name: |log-prob while sampling - log-prob while scoring|


class WeightedMeans:
    """Means of named numbers over parts of different weight, such as micro-batches and their tokens."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, weight: float, **values: float) -> None:
        for name, value in values.items() if weight else ():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0] += weight * float(value)
            total[1] += weight

    def result(self) -> dict[str, float]:
        """Over all processes."""
        everywhere: dict[str, list[float]] = {}
        for sums in gather(self.sums):
            for name, (total, weight) in sums.items():
                before = everywhere.get(name, [0.0, 0.0])
                everywhere[name] = [before[0] + total, before[1] + weight]
        return {name: total / weight for name, (total, weight) in everywhere.items()}


@contextmanager
def adapter_dropout(model: nn.Module) -> Iterator[None]:
    """For the loss forward: eval mode, but for adapter dropout and activation checkpointing. A base model's own dropout
    would make the policy that is scored differ from the one that sampled."""
    with evaluating(model):
        for name, module in model.named_modules():
            module.training = "lora_dropout" in name or getattr(module, "gradient_checkpointing", False)
        yield


def default_learning_rate(model: nn.Module) -> float:
    """Where to start when nothing is tuned.    10·c·(2000/H)^0.78 · 32/(s·r) for adapters, c·(2000/H)^0.78 for all weights

    H: the model's width; c = 1.25e-5. The form is Schulman et al.'s (2025, "LoRA Without Regret"; constants:
    tinker-cookbook), fitted to Llama at α = 32, where s·r = α. Their c, 5e-5, is for supervised learning; at four times
    ours GRPO collapsed on SmolLM2 (README). Adam moves each number of B by the rate, so s·B A by s·r times that: with
    s = α/r the rank cancels, with rsLoRA it does not. Adapters other than ours count as s·r = 32. Two significant
    digits. ValueError for a model that does not tell its width.
    """
    width = getattr(CausalLM(model).core.config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError("learning_rate: the model's config has no hidden_size to derive one from; give one")
    rate = 1.25e-5 * (2000 / width) ** 0.78  # for training all weights; of these two ten times is the published ratio
    reach = [m.scaling * m.lora_A.out_features for m in model.modules() if isinstance(m, LoRALinear)]  # s·r of each
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if reach or 2 * trained < sum(p.numel() for p in model.parameters()):
        rate *= 10 * 32 / max(reach, default=32.0)
    return float(f"{rate:.2g}")


def default_reference(model: nn.Module) -> Callable[[], Any]:
    """lora_disabled where switching adapters off gives the policy that training starts from, else a snapshot of it."""
    covered = {id(p) for m in model.modules() if isinstance(m, LoRALinear | TrainedCopy) for p in m.parameters()}
    fresh = all(not m.lora_B.weight.any() for m in model.modules() if isinstance(m, LoRALinear))
    copies = [m for m in model.modules() if isinstance(m, TrainedCopy)]
    fresh &= all(
        torch.equal(a, b) for m in copies for a, b in zip(m.trained.parameters(), m.original.parameters(), strict=True)
    )
    if fresh and covered and all(id(p) in covered for p in model.parameters() if p.requires_grad):
        return lambda: lora_disabled(model)
    return lora_snapshot(model)


def reward_weights(args: GRPOConfig, funcs: Sequence[Any]) -> list[float]:
    if not funcs:
        raise ValueError("rewards: at least one reward function is needed")
    weights = args.reward_weights or [1.0] * len(funcs)
    if len(weights) != len(funcs) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"reward_weights: {weights} for {len(funcs)} reward functions; one finite number each is needed"
        )
    return list(weights)


def call_reward(
    function: Callable[..., Any], count: int, columns: dict[str, Any], seconds: float
) -> list[float | None]:
    """Call one reward function, async or not, and check what it returns. RewardError if that cannot be used."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        with time_limit(seconds, f"reward {name}"):
            scores = function(**columns)
            if inspect.isawaitable(scores):
                scores = wait_for(scores)
            scores = [
                None if score is None else float(score) for score in scores
            ]  # it may be lazy, and do its work here
    except TimeIsUp:
        raise RewardError(f"reward {name} took longer than reward_timeout = {seconds:g} s") from None
    except Exception as error:
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
    if len(scores) != count:
        raise RewardError(f"reward {name} returned {len(scores)} values for {count} completions; one each is needed")
    if any(score is not None and math.isinf(score) for score in scores):
        raise RewardError(f"reward {name} returned an infinite value; use a finite one, or None for 'not applicable'")
    return [None if score is None or math.isnan(score) else score for score in scores]


class TimeIsUp(BaseException):
    """Not an Exception, so that no `except Exception` in a reward function swallows it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """TimeIsUp after so many seconds, in the main thread. In another one, where no signal can raise it, the process ends
    with one line that says what hung; the run can be resumed from its newest checkpoint."""

    def raise_it(*_: Any) -> None:
        raise TimeIsUp

    def end_it() -> None:
        print(f"error: {what} took longer than {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM"):
        handler = signal.signal(signal.SIGALRM, raise_it)
        timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again each second, if it was swallowed
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
    else:
        watchdog = threading.Timer(seconds, end_it)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()


def wait_for(awaitable: Any) -> Any:
    """The result of an awaitable; in a thread of its own where an event loop already runs (a notebook's)."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    return concurrent.futures.ThreadPoolExecutor(1).submit(asyncio.run, wait()).result()


def keep_freed_memory() -> None:
    """On Linux: malloc is not to hand freed memory back, only to ask for it again, page by page, at the next update."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a libc other than glibc
            for option, size in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD; M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, size)


# ------------------------------------------------------------------------------------------------------ early warnings

MAX_SKIPPED = 3  # updates in a row whose gradient is not finite, before the run ends
WARNINGS = {  # what is said of a metric that looks wrong: what it means, and what to change
    "frac_reward_zero_std": "in most groups all completions get one reward, and teach nothing; choose problems that are "
    "neither too easy nor too hard, or grade finer",
    "reward": "no higher than at first; is learning_rate high enough (an adapter needs about ten times the rate of full "
    "training), and does the reward tell completions apart?",
    "kl": "doubled within five updates: the policy runs away from its reference; lower learning_rate or raise beta",
    "entropy/first": "the policy hardly explores any more; lower learning_rate or raise epsilon_high, if the task is unsolved",
    "completions/clipped_ratio": "most completions are cut off; raise max_completion_length or ask for shorter answers",
    "clip_ratio/region_mean": "so many tokens have no gradient left; lower learning_rate or num_iterations",
    "grad_norm": "nothing is learnt; do rewards differ within a group, and does anything require gradients?",
    "grad_norm/usual": "the gradient has jumped; lower learning_rate",
    "skipped_updates": "the loss or gradient was not finite, and no step was taken; lower learning_rate",
    "adapters at zero": "B does not move, so nothing is learnt there; leave these layers out of target_modules (some "
    "families read a layer's weight past its adapter), or raise learning_rate",
    GAP: "completions are not sampled from the policy that is scored; use float32, and look for what differs between the two",
}


class EarlyWarnings:
    """Plain words when the metrics say that a run goes wrong, each once. The thresholds are rules of thumb.

    history: the metrics of a run that is resumed, so that it says what the unbroken run would.
    """

    def __init__(self, history: Sequence[dict[str, Any]] = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self.said: set[str] = set()
        for row in history:
            self.check(row)

    def check(self, row: dict[str, Any]) -> list[str]:
        """Take in an update's metrics; return what there is to say now."""
        self.rows.append(row := json.loads(to_json(row)))  # as it will be read back
        self.said |= {text.partition(" is ")[0] for text in row.get("warnings", ())}
        signs = {name: value for name, value in self.signs().items() if name not in self.said}
        self.said |= signs.keys()
        return [
            f"{name} is {value if isinstance(value, str) else format(value, '.3g')}: {WARNINGS[name]}"
            for name, value in signs.items()
        ]

    def signs(self) -> dict[str, Any]:
        """The metrics that look wrong now, and their values."""
        n, now = len(self.rows), self.rows[-1]
        kl, kl_before = self.mean_of_five("kl", n - 5), self.mean_of_five("kl", n - 10)
        entropy = self.mean_of_five("entropy", n - 5) / (self.mean_of_five("entropy", 0) or math.nan)
        norms = sorted(row["grad_norm"] or 0.0 for row in self.rows[-10:])
        jump = (now["grad_norm"] or 0.0) / (norms[len(norms) // 2] or math.nan)
        # adapters that are still zero after three updates that had a gradient
        idle = [name for name in now.get("idle", ()) if sum(bool(row["grad_norm"]) for row in self.rows) >= 3]
        looks_wrong = {
            "frac_reward_zero_std": (
                x := self.mean_of_five("frac_reward_zero_std", n - 5),
                x > 0.7 and not self.learnt(),
            ),
            "reward": (now["reward"], n >= 40 and now["reward"] is not None and not self.learnt()),
            "kl": (kl, kl > 0.2 and kl > 2 * kl_before),
            "entropy/first": (entropy, n >= 10 and entropy < 0.05),
            "completions/clipped_ratio": (x := self.mean_of_five("completions/clipped_ratio", n - 5), x > 0.5),
            "clip_ratio/region_mean": (x := self.mean_of_five("clip_ratio/region_mean", n - 5), x > 0.2),
            "grad_norm": (0.0, self.mean_of_five("grad_norm", n - 5) == 0 and not self.learnt()),
            "grad_norm/usual": (jump, n >= 10 and jump > 30),
            "skipped_updates": (now["skipped_updates"], now["skipped_updates"] > 0),
            "adapters at zero": (", ".join(idle[:3]) + f" ({len(idle)} in all)", bool(idle)),
            GAP: (x := self.mean_of_five(GAP, n - 5), x > 0.1),
        }
        return {name: value for name, (value, wrong) in looks_wrong.items() if wrong}

    def mean_of_five(self, name: str, start: int) -> float:
        """Over five updates; NaN, which is neither above nor below anything, where the metric is missing."""
        values = [row.get(name) for row in self.rows[start : start + 5]] if start >= 0 else []
        return math.nan if len(values) < 5 or None in values else sum(values) / 5  # type: ignore[arg-type]

    def learnt(self) -> bool:
        """Whether the reward is above that of the first updates by more than two standard errors."""
        rewards = torch.tensor([row["reward"] for row in self.rows if row["reward"] is not None])
        size = min(20, len(rewards) // 2)
        first, last = rewards[:size], rewards[-size:]
        return size > 1 and bool(last.mean() - first.mean() > 2 * ((first.var() + last.var()) / size).sqrt())


# -------------------------------------------------------------------------------------------------- data and tokenizer


def encode_prompt(prompt: Any, tokenizer: Any, system_prompt: str | None = None) -> list[int]:
    """Token ids of a prompt: messages through the chat template, text as it is, unless a system prompt makes it a chat."""
    if isinstance(prompt, str):
        if system_prompt is None:
            return tokenizer(prompt).input_ids
        prompt = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        prompt = [{"role": "system", "content": system_prompt}, *prompt]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompt is a chat, and the tokenizer has no chat template: use text prompts with this model"
        )
    goes_on = prompt[-1]["role"] == "assistant"  # an answer begun in the data is continued
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token. Some tokenizers drop a space at the start of a text: so each is read after the one before."""
    texts = [tokenizer.decode(ids[:1])] if ids else []
    for before, pair in ((ids[i - 1 : i], ids[i - 1 : i + 1]) for i in range(1, len(ids))):
        first, both = tokenizer.decode(before), tokenizer.decode(pair)
        texts.append(both.removeprefix(first) if both.startswith(first) else tokenizer.decode(pair[1:]))
    return texts


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the tokenizer's, and all that the model's generation config names."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, *configured]) if i is not None]
    if not ids:
        raise ValueError("the tokenizer has no EOS token, so no completion could end: set tokenizer.eos_token")
    return ids


def read_jsonl(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a JSONL file and their line numbers. ValueError with file, line and reason."""
    rows, lines = [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
                    lines.append(number)
                    if not isinstance(rows[-1], dict):
                        raise ValueError(f"is a {type(rows[-1]).__name__}, must be an object with a 'prompt'")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows; each line must be an object with a 'prompt'")
    return rows, lines


def check_rows(
    rows: Sequence[dict[str, Any]], reward_funcs: Sequence[Any], where: Callable[[int], str] | None = None
) -> None:
    """ValueError for the first row whose prompt cannot be used, or that lacks a column a reward needs."""
    where = where or (lambda i: f"dataset row {i}")
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    needed = {}  # column -> the reward that needs it
    for function in reward_funcs:
        for p in inspect.signature(function).parameters.values():
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given:
                needed[p.name] = getattr(function, "__name__", type(function).__name__)
    if not len(rows):
        raise ValueError("the data set is empty")
    for i in range(len(rows)):
        row = rows[i]
        prompt = row.get("prompt")
        messages = isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
        if not prompt or not (isinstance(prompt, str) or messages):
            raise ValueError(f"{where(i)}: 'prompt' must be text or a list of messages with 'role' and 'content'")
        for column, name in needed.items():
            if column not in row and not (column == "answer" and "solution" in row):
                has = ", ".join(key for key in row if key != "prompt") or "no other column"
                raise ValueError(f"{where(i)}: no column {column!r}, which reward {name} needs; it has {has}")


def check_lengths(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    args: GRPOConfig,
    config: Any,
    where: Callable[[int], str] | None = None,
) -> None:
    """ValueError for the first prompt that is empty, or leaves no room for a completion in the model's window."""
    where = where or (lambda i: f"dataset row {i}")
    window = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    for i in range(len(rows)):
        try:
            length = len(encode_prompt(rows[i]["prompt"], tokenizer, args.system_prompt))
        except Exception as error:  # a chat template is a program of the tokenizer's author: it may raise anything
            raise ValueError(f"{where(i)}: the prompt cannot be encoded: {error}") from error
        if not 0 < length <= window - args.max_completion_length:
            room = f"max_completion_length = {args.max_completion_length} and the model's window of {window} tokens"
            raise ValueError(f"{where(i)}: the prompt has {length} tokens; it must have some, and fit {room}")


# ------------------------------------------------------------------------------------------- a run's files, checkpoints

MAY_CHANGE = set(  # on resuming: rounding, at most
    "output_dir resume max_steps eval_steps save_steps save_total_limit num_completions_to_log log_tokens_steps "
    "reward_timeout ddp_timeout per_device_train_batch_size gradient_checkpointing".split()
)


def check_output_dir(args: GRPOConfig) -> None:
    if args.resume and not args.output_dir:
        raise ValueError("resume: needs output_dir, the folder of the run to go on with")
    if args.output_dir and not args.resume:
        held = [n for n in ("metrics.jsonl", "adapter", "summary.json") if (Path(args.output_dir) / n).exists()]
        held += [p.name for p in Path(args.output_dir).glob("checkpoint-*")]
        if held:
            raise ValueError(
                f"output_dir: {args.output_dir} holds another run ({held[0]}); resume it or name a new one"
            )


def to_json(value: Any) -> str:
    """One line of standard JSON: NaN and infinities, which JSON lacks, become null."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(key): clean(item) for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [clean(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(clean(value), default=str)


class RunRecord:
    """metrics.jsonl and completions.jsonl: a line for each update, and for each completion shown of it."""

    def __init__(self, output_dir: str | None, keep_to: int | None) -> None:
        self.files: list[Any] = []
        self.history: list[dict[str, Any]] = []  # metrics of the updates before the one that is resumed
        if output_dir is None:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "completions.jsonl"):
            path = Path(output_dir) / name
            if keep_to is not None and path.exists():  # cut back to the checkpoint, a torn last line included
                kept = [line for line in path.read_bytes().split(b"\n") if keep_to and 0 <= _step_of(line) <= keep_to]
                scratch = path.with_suffix(".tmp")
                scratch.write_bytes(b"".join(line + b"\n" for line in kept))
                os.replace(scratch, path)
                if name == "metrics.jsonl":
                    self.history = [row for row in map(json.loads, kept) if row["step"]]
            self.files.append(open(path, "a", encoding="utf-8"))  # noqa: SIM115 - open as long as the run is

    def write(self, metrics: dict[str, Any], samples: Iterable[dict[str, Any]] = ()) -> None:
        if self.files:
            print(to_json(metrics), file=self.files[0], flush=True)
            for sample in samples:
                print(to_json({**sample, "step": metrics["step"]}), file=self.files[1], flush=True)

    def sync(self) -> None:
        for file in self.files:
            os.fsync(file.fileno())


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def save_policy(model: Any, directory: Path) -> None:
    """What was trained, in the format its own library reads: ours and peft's in PEFT's, a whole model in transformers'."""
    if any(isinstance(m, LoRALinear | TrainedCopy) for m in model.modules()):
        save_lora(model, directory)
    else:
        model.save_pretrained(directory)


def _identity(trainer: GRPOTrainer) -> dict[str, Any]:
    """What must be the same for a resumed run to be the run it resumes."""
    settings = {k: v for k, v in dataclasses.asdict(trainer.args).items() if k not in MAY_CHANGE}
    data = hashlib.sha256()
    for i in range(len(trainer.train_dataset)):
        data.update(to_json(trainer.train_dataset[i]).encode())
    lora = getattr(trainer.model, "lora_config", None)
    adapter = {f"lora.{k}": v for k, v in dataclasses.asdict(lora).items()} if isinstance(lora, LoRAConfig) else {}
    shapes = {name: list(p.shape) for name, p in trainer.params.items()}
    same = {"rewards": trainer.reward_names, "train data": data.hexdigest(), "base model": trainer.base_fingerprint}
    return settings | adapter | same | {"trainable parameters": shapes}


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Tells base models apart, and their dtypes, by a sample of each tensor."""
    digest = hashlib.sha256()
    for name, p in parameters:
        digest.update(f"{name} {p.dtype} {p.detach().flatten()[:: p.numel() // 32 + 1].tolist()}".encode())
    return digest.hexdigest()


def _machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    here = {"machine": platform.machine(), "threads": torch.get_num_threads(), "processes": rank_and_world()[1]}
    return versions | {"transformers": transformers.__version__} | here


def save_checkpoint(trainer: GRPOTrainer) -> Path:
    """Write checkpoint-N: all or nothing. A manifest with every file's hash is written last, then the folder is renamed.

    OSError, with the state of things, if it cannot be written (a full disk, say); older checkpoints are not touched.
    """
    root = Path(str(trainer.args.output_dir))
    final, scratch = root / f"checkpoint-{trainer.step}", root / f".checkpoint-{trainer.step}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        save_policy(trainer.model, scratch / "adapter")
        trainable = {name: p.detach().cpu().contiguous() for name, p in trainer.params.items()}
        save_file(trainable, scratch / "trainable.safetensors")
        if isinstance(trainer.reference, lora_snapshot):
            save_file(
                {n: t.cpu().contiguous() for n, t in trainer.reference.tensors.items()},
                scratch / "reference.safetensors",
            )
        optimizer = {"optimizer": trainer.optimizer.state_dict(), "scheduler": trainer.scheduler.state_dict()}
        torch.save(optimizer, scratch / "optimizer.pt")
        state = {"step": trainer.step, "tokens": trainer.tokens, "run": _identity(trainer), "made_with": _machine()}
        (scratch / "state.json").write_text(to_json(state), encoding="utf-8")
        hashes = {str(p.relative_to(scratch)): _sha256(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
        (scratch / "manifest.json").write_text(to_json(hashes), encoding="utf-8")
        for path in [*scratch.rglob("*"), scratch]:
            _fsync(path)
        if final.exists():  # a torn one of the same number, which --resume passed over
            os.replace(final, root / f"torn-{final.name}-{time.time_ns()}")
        os.replace(scratch, final)
        _fsync(root)
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}; earlier checkpoints are as they were") from error
    if trainer.args.save_total_limit:
        mine = [p for p in _checkpoints(root) if int(p.name.removeprefix("checkpoint-")) <= trainer.step]
        for old in mine[trainer.args.save_total_limit :]:  # later ones are damaged: passed over, and left alone
            shutil.rmtree(old)
    return final


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in root.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint; '' if every file is there with its hash."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return next((f"{name} has changed" for name, digest in hashes.items() if _sha256(folder / name) != digest), "")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def load_checkpoint(trainer: GRPOTrainer) -> int:
    """Bring the trainer to the newest intact checkpoint of output_dir, and return its update; 0 if there is none.

    ResumeError, naming the setting, if the run to resume was another one.
    """
    for folder in _checkpoints(Path(str(trainer.args.output_dir))):
        if damage := _damage(folder):
            say(f"resume: passing over {folder}: {damage}")
            continue
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        now = json.loads(to_json(_identity(trainer)))
        for name in dict.fromkeys([*state["run"], *now]):
            if state["run"].get(name) != now.get(name):
                was = f"{state['run'].get(name)!r}, now {now.get(name)!r}"
                raise ResumeError(f"resume: {name} was {was:.300}; it must stay, or start a new run in another folder")
        for name, value in _machine().items():
            if state["made_with"].get(name) != value:
                was = state["made_with"].get(name)
                say(f"resume: {name} was {was}, now {value}: results may differ by rounding")
        trainable = load_file(folder / "trainable.safetensors")
        with torch.no_grad():
            for name, parameter in trainer.params.items():
                parameter.copy_(trainable[name])
        if isinstance(trainer.reference, lora_snapshot) and (folder / "reference.safetensors").exists():
            trainer.reference.tensors = load_file(folder / "reference.safetensors")
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(optimizer["optimizer"])
        trainer.scheduler.load_state_dict(optimizer["scheduler"])
        trainer.tokens = state["tokens"]
        say(f"resume: going on from {folder}")
        return int(state["step"])
    say(f"resume: no intact checkpoint in {trainer.args.output_dir}, starting at the beginning")
    return 0


# ---------------------------------------------------------------------------------------------------- several processes


class PeerError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(args: GRPOConfig) -> None:
    """Under torchrun: meet the others."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=args.ddp_timeout))


def say(text: str) -> None:
    """To stderr, once and not by every process."""
    if rank_and_world()[0] == 0:
        print(text, file=sys.stderr)


@contextmanager
def peers_answer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        rank, world = rank_and_world()
        raise PeerError(
            f"process {rank} of {world}: another process has ended or does not answer "
            f"({str(error).partition(chr(10))[0]:.200}); --resume goes on from the newest checkpoint"
        ) from error


def gather(value: Any) -> list[Any]:
    """`value` of every process, by rank. It travels as JSON (which Python's keeps NaN in): nothing is unpickled."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = torch.tensor(list(json.dumps(value, default=str).encode()), dtype=torch.uint8, device=device)
    with peers_answer():
        sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=device))
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]


def same_on_all(parameters: Iterable[Tensor]) -> None:
    """Every process starts from the first one's values."""
    if rank_and_world()[1] > 1:
        with torch.no_grad(), peers_answer():
            for parameter in parameters:
                dist.broadcast(parameter.detach(), src=0)


def shard_base(model: nn.Module) -> None:
    """FSDP2: the frozen weights of the decoder's layers are spread over the processes; each layer's are fetched when it runs.

    What is trained, the embeddings and the head (which may be one with them) stay whole in every process. A layer is
    fetched by all processes at once, so all make the same number of forwards.
    """
    from torch.distributed.fsdp import fully_shard

    decoder = CausalLM(model).decoder
    size = lambda module: sum(p.numel() for p in module.parameters())
    layers = max((m for m in decoder.modules() if isinstance(m, nn.ModuleList)), key=size)
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, ignored_params=trained)
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(decoder, ignored_params={p for p in model.parameters() if p not in inside} | trained)
    model.to("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------------ the demo

DEMO_HELD_OUT = 200  # of the 1000 problems; neither pre-training nor GRPO sees them
DEMO_SETTINGS = {  # what `python grpo_lora.py` does, unless told otherwise
    "max_steps": 50,
    "prompts_per_step": 16,
    "num_generations": 16,
    "per_device_train_batch_size": 128,
    "max_completion_length": 24,
    "learning_rate": 1e-3,
    "r": 8,
    "lora_alpha": 8,
    "eval_steps": 10,
    "save_steps": 25,
    "log_tokens_steps": 10,
}


def demo_tokenizer() -> Any:
    """A tokenizer whose tokens are whole numbers, signs and tags, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>", "<think>", "</think>", "<answer>", "</answer>"]
    words += [str(n) for n in range(28)] + list("+=?, ")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[a-z]+>|[0-9]+|."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or m.role != 'assistant' %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_demo_model(directory: Path, steps: int = 600, width: int = 128) -> None:
    """Pre-train a tiny chat model on sums of three digits, with two habits: to answer at once, mostly wrong, and to think
    first, which comes out right. It prefers the first. GRPO will find out that the second pays.

    An ordinary transformers directory; written under another name and then renamed, so that it is whole or not there.
    """
    tokenizer = demo_tokenizer()
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    problems = sum_problems()[:-DEMO_HELD_OUT]
    prompts = [encode_prompt(p["prompt"], tokenizer) for p in problems]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(n, (128,), generator=generator).tolist()
    for _ in tqdm(range(steps), desc="pre-training the demo's base model", unit="batch", disable=None):
        chosen, habits = draw(len(problems)), zip(draw(100), draw(100), draw(28), strict=True)
        # 30%: think, and be right; 70%: answer at once, one in five right and the others a guess from 0 to 27
        replies = [
            sum_completion(problems[i], think < 30, None if think < 30 or right < 20 else guess)
            for i, (think, right, guess) in zip(chosen, habits, strict=True)
        ]
        ends = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(replies).input_ids]
        starts = [torch.tensor(prompts[i]) for i in chosen]
        pairs = list(zip(starts, ends, strict=True))
        ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True, padding_value=0)
        labels = [torch.cat([torch.full_like(start, -100), end]) for start, end in pairs]
        loss = model(input_ids=ids, labels=pad_sequence(labels, batch_first=True, padding_value=-100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        os.replace(scratch, directory)
    except OSError:  # another process was faster
        shutil.rmtree(scratch)


# ---------------------------------------------------------------------------------------------------- the command line


@dataclass
class ScriptArguments:
    """What to train on what."""

    model: str | None = _setting(None, "Model folder or hub id. None: the built-in demo.")
    data: str | None = _setting(None, "JSONL: a `prompt` (text, or chat messages) and any columns the rewards use.")
    eval_data: str | None = _setting(None, "JSONL of held-out problems.")
    eval_size: int = _setting(0, "Without eval_data: hold out so many of the last rows of data.")
    rewards: str = _setting("accuracy", "Comma-separated: names (see rewards.py), file.py:function, module:function.")
    variant: str | None = _setting(None, f"A paper's settings, which flags then override: {', '.join(VARIANTS)}.")
    adapter: str | None = _setting(None, "Saved adapter to go on training. None: a new one.")
    tune: str | None = _setting(
        None, "Instead of one run, find this by short ones.", ("learning_rate", "learning_rate,r")
    )
    dtype: str = _setting("float32", "Of the base weights; adapters are float32.", ("float32", "bfloat16", "float16"))
    device: str = _setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one. It must have float64.")


LEFT_OUT = {  # settings of TRL's that we lack, and what to do
    "use_vllm": "sampling is built in; serve the saved adapter with vLLM",
    "entropy_coef": "there is no entropy bonus; top_entropy_quantile and epsilon_high keep entropy up",
    "off_policy_mask_threshold": "there is no off-policy mask; lower num_iterations",
    "router_aux_loss_coef": "there is no router loss; routers stay frozen",
    **dict.fromkeys(("top_p", "top_k", "min_p"), "sampling is untruncated, so that what is sampled is what is trained"),
    "repetition_penalty": "use the reward repetition_penalty, which changes the policy rather than its samples",
    "gradient_accumulation_steps": "the batch is prompts_per_step; per_device_train_batch_size splits it exactly",
    "steps_per_generation": "each batch of completions is used num_iterations times",
    "trust_remote_code": "code from model repositories is never run",
}


def expand(argv: Sequence[str], inside: tuple[str, ...] = ()) -> list[str]:
    """Each @FILE becomes the settings in that file, which are written as on the command line and may name other files."""
    words: list[str] = []
    for word in argv:
        if not word.startswith("@"):
            words.append(word)
            continue
        try:
            if word in inside:
                raise ValueError("it names itself")
            text = Path(word[1:]).read_text(encoding="utf-8", errors="surrogateescape")
            words += expand(shlex.split(text), (*inside, word))
        except (OSError, ValueError) as error:
            hint = "" if inside else f"; a value that begins with @ is written --setting={word}"
            raise ValueError(f"{word}: not a file of settings: {error}{hint}") from None
    return words


def without(argv: Sequence[str], *names: str) -> list[str]:
    """The command line without some settings and their values."""
    words, leaving = [], False
    for word in argv:
        if word.startswith("--"):
            leaving = word[2:].partition("=")[0].replace("-", "_") in names
        words += [] if leaving else [word]
    return words


def parse(argv: Sequence[str]) -> tuple[ScriptArguments, LoRAConfig, GRPOConfig]:
    """Command line -> settings. A flag beats the variant, which beats the demo's and the default values."""
    argv = expand(argv)
    kinds: Any = [ScriptArguments, LoRAConfig, GRPOConfig]
    parser = HfArgumentParser(
        kinds,
        allow_abbrev=False,
        usage="grpo_lora.py [@FILE_OF_SETTINGS] [--model MODEL --data FILE] [--SETTING VALUE ...]",
        description=str(__doc__).partition("\n")[0],
    )

    def no_usage(message: str) -> Any:  # argparse would print pages of it
        raise ValueError(message)

    parser.error = no_usage  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest in ("rank_pattern", "alpha_pattern"):
            action.type = json.loads
        elif action.dest == "tune":
            action.nargs, action.const = "?", "learning_rate"
        elif action.dest == "init_lora_weights":
            action.type = lambda text: text.lower() == "true" or text
        elif action.dest == "target_modules":  # q_proj,v_proj are names; anything else is a shorthand or a regex
            action.nargs, action.type = (
                None,
                lambda text: text.split(",") if text.replace(",", "").isidentifier() else text,
            )
    parser.set_defaults(target_modules="all-linear", r=16, lora_alpha=32)
    first, unknown = parser.parse_known_args(argv)
    for flag in (text[2:].partition("=")[0].replace("-", "_") for text in unknown if text.startswith("--")):
        if flag in LEFT_OUT:
            raise ValueError(f"--{flag} is left out here: {LEFT_OUT[flag]}")
        known(flag, sorted({action.dest for action in parser._actions}), "command line")
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not expected here (--help shows all settings)")
    if first.model is None:
        if first.data:
            raise ValueError("--data needs --model, a model folder or hub id")
        if first.eval_data or first.eval_size:
            raise ValueError("--eval_data and --eval_size need --model and --data: the demo has its own problems")
        parser.set_defaults(**DEMO_SETTINGS)
    elif not first.data:
        raise ValueError("--model needs --data, a JSONL file with a `prompt` in each line")
    if first.variant:
        known(first.variant, VARIANTS, "--variant")
        parser.set_defaults(**VARIANTS[first.variant].settings)
    script, lora, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    own = LoRAConfig(r=parser.get_default("r"), lora_alpha=parser.get_default("lora_alpha"))
    if script.adapter and lora != own:
        changed = next(f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(lora, f.name))
        raise ValueError(f"--{changed}: has no effect with --adapter, whose own file says it")
    return script, lora, args


@memory_advice()
def prepare(argv: Sequence[str]) -> GRPOTrainer:
    """Everything up to the first update. ValueError for bad input, as early as it can be known."""
    script, lora, args = parse(argv)
    join_processes(args)
    rank, world = rank_and_world()
    reward_funcs = [load_reward(spec) for spec in script.rewards.split(",") if spec.strip()]
    reward_weights(args, reward_funcs)
    if rank == 0:
        check_output_dir(args)
    try:
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if script.device in ("auto", "cuda") and 0 < gpus <= local:
            raise ValueError(f"--device {script.device}: process {local + 1} of this machine, which has {gpus} GPU(s)")
        auto = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if script.device in ("auto", "cuda") else script.device)
        if args.fsdp and device.type != torch.device(auto).type:
            raise ValueError(
                f"--device {script.device}: fsdp spreads the model over {torch.device(auto).type} devices here"
            )
        if device.type == "cuda" and world > 1:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # tokens are drawn in float64, which mps lacks
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"--device {script.device}: {str(error).partition(chr(10))[0]}") from None
    if script.model is None:
        train, held_out = sum_problems()[:-DEMO_HELD_OUT], sum_problems()[-DEMO_HELD_OUT:]
        where = held_out_where = None
    else:
        train, lines = read_jsonl(str(script.data))
        where = held_out_where = lambda i: f"{script.data}:{lines[i]}"
        held_out = []
        if script.eval_data:
            held_out, eval_lines = read_jsonl(script.eval_data)
            held_out_where = lambda i: f"{script.eval_data}:{eval_lines[i]}"
        elif script.eval_size:
            if not 0 < script.eval_size < len(train):
                raise ValueError(
                    f"--eval_size {script.eval_size}: {script.data} has {len(train)} rows; some must be left to train on"
                )
            train, held_out = train[: -script.eval_size], train[-script.eval_size :]
            held_out_where = lambda i: f"{script.data}:{lines[len(train) + i]}"
    for rows, place in ((train, where), (held_out, held_out_where)):
        if rows or rows is train:
            check_rows(rows, reward_funcs, place)

    folder = script.model
    if folder is None:
        folder = str(Path("runs") / "demo-base-model")
        if rank == 0 and not Path(folder).exists():
            make_demo_model(Path(folder))
        gather("the model is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"--model {folder}: {type(error).__name__}: {error}") from None
    for rows, place in ((train, where), (held_out, held_out_where)):
        check_lengths(rows, tokenizer, args, config, place)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, script.dtype))
    except Exception as error:
        raise ValueError(f"--model {folder}: {type(error).__name__}: {error}") from None
    transformers.set_seed(args.seed)
    if not args.fsdp:  # which shares it out before it moves it
        model.to(device)
    model = load_lora(model, script.adapter) if script.adapter else apply_lora(model, lora)
    trainer = GRPOTrainer(model, reward_funcs, args, train, held_out or None, tokenizer)
    if args.output_dir is None:
        name = "demo" if script.model is None else Path(script.model).name
        trainer.args.output_dir = gather(new_run_folder(name) if rank == 0 else None)[0]
    return trainer


def new_run_folder(name: str) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = Path("runs") / f"{name}-{stamp}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return str(path)
    raise OSError("runs/: no free folder name")


def write_settings(path: Path, argv: Sequence[str], *more: str) -> Path:
    """A file that makes the run again: python grpo_lora.py @FILE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = shlex.join([*without(argv, "output_dir", "resume", "tune"), *more])
    path.write_text(words + "\n", encoding="utf-8", errors="surrogateescape")  # file names may be any bytes
    return path


def tune(argv: Sequence[str]) -> Path:
    """Find a learning rate, and if asked a rank, by successive halving (Jamieson & Talwalkar 2016). Returns best.args.

    Eight rates a factor of two apart, around --learning_rate or the default; with "learning_rate,r" for each of three
    ranks. All run a tenth of max_steps, the better half goes on to a fifth, and so on, until two or three are left: a
    fifth of the updates that eight whole runs take, or a quarter of what 24 do. Compared is the mean training reward since
    the last halving (of equals the one nearer the middle stays); in the end, as rates above the best fail worse than those
    below, the lowest rate within one standard error of the best is taken. What diverges is out.

    Each candidate is the beginning of the very run that it stands for (start, prompts, draws, schedule), and goes on
    from its own checkpoint. So a tuning that was interrupted is resumed like a run.
    """
    script, lora, args = parse(argv)
    join_processes(args)
    tuned, n, rank = str(script.tune).split(","), args.num_iterations, rank_and_world()[0]
    least = 10 * (args.warmup_steps + 3 * n)
    if args.max_steps < least:
        raise ValueError(
            f"max_steps = {args.max_steps}: a tenth of it must go beyond warmup_steps, so at least {least}"
        )
    if args.learning_rate == 0:
        raise ValueError("learning_rate = 0: the middle of the rates to try, must be above 0")
    if "r" in tuned and script.adapter:
        raise ValueError("tune: the rank of --adapter is what its file says; tune learning_rate alone")
    if args.resume and not args.output_dir:
        raise ValueError("resume: needs output_dir, the folder of the tuning to go on with")
    root = Path(args.output_dir or gather(new_run_folder("tune") if rank == 0 else None)[0])
    if not args.resume and any(gather(root.exists() and any(root.iterdir()))):
        raise ValueError(f"output_dir: {root} is not empty; resume the tuning in it or name a new one")
    say(f"writing to {root}/")
    flags = lambda row: [word for name in tuned for word in (f"--{name}", f"{row[name]:g}")]

    def begin(folder: Path, *more: str) -> GRPOTrainer:
        more += ("--output_dir", str(folder), "--save_steps", str(args.max_steps), "--save_total_limit", "1")
        return prepare([*without(argv, "output_dir", "resume"), *more, *(["--resume"] if folder.exists() else [])])

    def rewards(row: dict[str, Any], before: int, until: int) -> list[float]:
        trainer = begin(folder := root / "".join(flags(row)).strip("-"), *flags(row))
        trainer.eval_dataset = None  # it costs time, and is not to be tuned for
        with contextlib.suppress(FloatingPointError):  # which the record shows
            trainer.train(until)
        metrics = [m for m in (read_jsonl(folder / "metrics.jsonl")[0] if rank == 0 else []) if m["step"] <= until]
        skipped = "".join(str(int(m["skipped_updates"])) for m in metrics)
        found = [m["reward"] for m in metrics if m["step"] > before and m["reward"] is not None]
        return gather([-math.inf] if "1" * MAX_SKIPPED in skipped or not found else found)[0]

    candidates: list[dict[str, Any]] = []
    for r in sorted({max(1, lora.r // 4), lora.r, 4 * lora.r}) if "r" in tuned else [lora.r]:
        own = ["--r", str(r)] if "r" in tuned else []
        centre = args.learning_rate or begin(root / "never-run", *own).args.learning_rate or 0.0
        candidates += [
            {"learning_rate": float(f"{centre * 2.0**k:.2g}"), "r": r, "far": abs(k), "score": {}} for k in range(-4, 4)
        ]
    stops = [max(1, args.max_steps * tenths // (10 * n)) * n for tenths in (1, 2, 4, 8)]
    alive, spent = candidates, 0
    for before, until in zip([0, *stops], stops, strict=False):
        for row in alive:
            row["rewards"] = rewards(row, before, until)
            row["score"][until] = sum(row["rewards"]) / len(row["rewards"])
            say(f"{' '.join(flags(row))}: mean reward {row['score'][until]:.3f} in updates {before + 1} to {until}")
        spent += len(alive) * (until - before)
        scores = [row["score"][until] for row in alive]
        if len(alive) > 1 and max(scores) == min(scores):
            raise FloatingPointError(f"tune: every candidate has a mean reward of {scores[0]:g} in updates to {until}; "
                                     "there is nothing to choose by: look at the reward, and at learning_rate")  # fmt: skip
        alive = sorted(alive, key=lambda row: (-row["score"][until], row["far"]))
        if len(alive) <= 3:
            break
        alive = [row for row in alive[: len(alive) // 2] if row["score"][until] > -math.inf]

    def as_good(row: dict[str, Any]) -> bool:  # as the best, within one standard error of their difference
        gaps = torch.tensor([a - b for a, b in zip(alive[0]["rewards"], row["rewards"], strict=False)])
        return row is alive[0] or bool(gaps.mean() <= gaps.std() / math.sqrt(len(gaps)))

    best = min(filter(as_good, alive), key=lambda row: row["learning_rate"])
    if rank == 0:
        path = write_settings(root / "best.args", without(argv, *tuned), *flags(best))
        print(f"\n{'learning_rate':>13} {'r':>4}" + "".join(f"{f'to {stop}':>9}" for stop in best["score"]))
        for row in candidates:
            cells = (f"{row['score'][stop]:>9.3f}" if stop in row["score"] else f"{'':>9}" for stop in best["score"])
            print(f"{row['learning_rate']:>13g} {row['r']:>4}{''.join(cells)}{'   best' if row is best else ''}")
        whole = f"{len(candidates)} whole runs take {len(candidates) * args.max_steps}"
        print(f"\nmean training rewards; {spent} updates, where {whole}")
        rates = [row["learning_rate"] for row in candidates if row["r"] == best["r"]]
        if best["learning_rate"] in (rates[0], rates[-1]):
            print(f"the best rate is at the edge: tune again with {' '.join(flags(best))}")
        print(f"go on with: python grpo_lora.py {shlex.quote(f'@{path}')}")
    return root / "best.args"


def printable(text: str) -> str:
    """Model text for the terminal: control and direction characters, which could rewrite the screen, are made visible."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in text)


def report(folder: Path, seed: int, seconds: float) -> None:
    """From a run's files: the table at the end, summary.json, and learning_curve.png where matplotlib is installed."""
    rows, samples = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "completions.jsonl")
    )
    summary: dict[str, Any] = {"seed": seed, "seconds": round(seconds, 1), "updates": rows[-1]["step"] if rows else 0}
    evaluated = [row for row in rows if "eval_reward" in row]
    if len(evaluated) > 1:
        print(f"\n{'on held-out problems':<22}    before     after")
        names = {"accuracy": "{:.1%}", "think_rate": "{:.1%}", "reward": "{:.3f}", "completions/mean_length": "{:.1f}"}
        for name, show in names.items():
            before, after = (evaluated[i].get(f"eval_{name}") for i in (0, -1))
            if before is not None and after is not None:
                name = name.rpartition("/")[2]
                summary |= {f"{name}_before": before, f"{name}_after": after}
                print(f"{name:<22} {show.format(before):>9} {show.format(after):>9}")
        shown = [s for s in samples if s.get("split") == "eval"]
        if shown:
            prompt = shown[0]["prompt"]
            after = next(s for s in shown if s["step"] == shown[-1]["step"])
            print(f"\nprompt   {printable(prompt if isinstance(prompt, str) else prompt[-1]['content'])[:500]}")
            print(
                f"before   {printable(shown[0]['completion'])[:500]}\nafter    {printable(after['completion'])[:500]}"
            )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw_curve(folder, rows)
    print(f"\n{summary['updates']} updates in {seconds:.0f} s; adapter, metrics and completions are in {folder}/")


def draw_curve(folder: Path, rows: list[dict[str, Any]]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, names in zip(
        figure.subplots(1, 2), (("reward", "eval_reward"), ("completions/mean_length",)), strict=True
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o" if name.startswith("eval") else "", label=name)
        axis.set_xlabel("update")
        axis.legend()
    figure.savefig(folder / "learning_curve.png", dpi=120)


def refuse(error: Exception | str, status: int) -> int:
    """One line, whatever the message was made from."""
    sys.stdout.flush()
    print("error:", " ".join(printable(str(error)).split())[:1000], file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done or stopped on request, 1 the run failed, 2 bad input."""
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # one bar is enough: ours
    try:
        argv = expand(sys.argv[1:] if argv is None else argv)
        if parse(argv)[0].tune:
            tune(argv)
            return leave(0)
        trainer = prepare(argv)
    except (ValueError, OSError) as error:
        return leave(refuse(error, 2))
    except (RewardError, PeerError, MemoryError, FloatingPointError, KeyboardInterrupt) as error:
        return leave(refuse(str(error) or "interrupted", 1))

    def stop(signum: int, frame: Any) -> None:
        trainer.stop = True
        signal.signal(signum, signal.SIG_DFL)  # a second one ends at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    out = trainer.args.output_dir
    say(f"writing to {out}/")
    try:
        if trainer.rank == 0 and not (trainer.args.resume and (Path(str(out)) / "settings.args").exists()):
            write_settings(Path(str(out)) / "settings.args", argv)
        trainer.train()
        if trainer.rank == 0:
            if trainer.stop and trainer.step < trainer.args.max_steps:
                print(
                    f"stopped after update {trainer.step}; go on with the same command and --output_dir {out} --resume"
                )
            else:
                report(Path(str(out)), trainer.args.seed, time.perf_counter() - started)
    except (RewardError, ResumeError, FloatingPointError, MemoryError, PeerError, OSError) as error:
        return leave(refuse(error, 2 if isinstance(error, ResumeError) else 1))
    return leave(0)


def leave(status: int) -> int:
    """The exit status; with several processes, at once if it is not 0: the others must not wait for this one."""
    if dist.is_initialized():
        if status:
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
