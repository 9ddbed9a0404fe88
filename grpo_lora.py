"""GRPO with LoRA, whole: the objective, the trainer and the rollout, on plain transformers models.

    python grpo_lora.py        a demo: no network, about a minute

GRPO (Shao et al. 2024, DeepSeekMath) makes each completion of a prompt more or less likely by how
its reward compares with its group's. There is no value network, and with LoRA no second model.

In order: the objective, settings, the trainer (`update` is the algorithm), rollout and
log-probabilities: that is GRPO. Then: the model as two parts, data, processes. Read at first:
group_advantages, completion_mask, grpo_loss as it is by default (beta is 0 then: no KL), Rollout,
MicroBatch, `update`, and the docstrings of what that calls.

P prompts, a group of G completions of each, B = P·G rows: a row is one completion, and the rows of
a prompt are adjacent. b: rows of a micro-batch. (The data's `rows` are dicts, one a prompt.) L
prompt tokens, T completion tokens, V tokens in the vocabulary, H the model's width, K reward
functions. Counts are of one process, unless a comment says otherwise. Left out: see README, Limits.
"""

import copy
import hashlib
import inspect
import json
import math
import sys
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, get_scheduler
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora import LoRALinear, default_reference, lora_disabled, lora_merged, lora_snapshot
from lora import check_choice, check_settings, naming, param_groups, save_lora, setting
from rewards import OPENED, call_rewards, check_row, reward_function, reward_name

# ---------------------------------------------------------------------------------- the objective


def group_advantages(rewards: Tensor, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """How much better each completion is than its group.    A = (R - mean_g) / (std + eps)

    rewards: (P, G), NaN where there is none. Returns (P, G). The denominator, by scale:
        group    std_g + eps (GRPO)        batch           std of all rewards + eps
        none     1 (Dr. GRPO)              leave_one_out   (G-1)/G, so A = R - mean of the others
        mean     mean_g (MaxRL, for rewards >= 0); where that is not above 0, A is 0
    Every std has ddof 1. A completion without a reward counts in no mean or std, and gets 0. A
    group of equal rewards, or with a single one, gets exactly 0. Raises ValueError for other shapes
    and scales. (Shao et al. 2024, 4.1.2)

    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    >>> group_advantages(rewards, scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    check_choice(scale, SCALES, "scale")
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, must be (P, G)")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    valid = ~rewards.isnan()
    mean, n = rewards.nanmean(dim=1, keepdim=True), valid.sum(dim=1, keepdim=True).to(rewards)
    divisor = {
        "group": _nanstd(rewards, dim=1) + eps, "batch": _nanstd(rewards.flatten(), dim=0) + eps,
        "none": torch.ones_like(mean), "mean": mean.clamp(min=0), "leave_one_out": (n - 1) / n,
    }[scale]  # fmt: skip
    low = rewards.masked_fill(~valid, math.inf).amin(dim=1, keepdim=True)
    high = rewards.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)
    # by value, and not by std > 0: rounding can give equal numbers a std above 0
    differ = valid & (low < high) & (divisor != 0)
    return torch.where(differ, (rewards - mean) / divisor, 0.0)


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """Standard deviation of what is not NaN, ddof 1, keeping the dimension. NaN for under two."""
    n = (~x.isnan()).sum(dim=dim, keepdim=True)
    squares = (x - x.nanmean(dim=dim, keepdim=True)) ** 2
    return (squares.nansum(dim=dim, keepdim=True) / (n - 1).clamp(min=0)).sqrt()


def combine_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """R = Σ_k w_k r_k over the functions that gave a reward.    (P, G, K), (K,) -> (P, G)
    NaN where no function gave one. The weights are not renormalised where one is missing."""
    return torch.where(rewards.isnan().all(-1), math.nan, (rewards * weights).nansum(-1))


def multi_objective_advantages(
    rewards: Tensor, weights: Tensor, *, aggregation: str = "sum_then_normalize",
    scale: str = "group", eps: float = 1e-4
) -> Tensor:  # fmt: skip
    """Advantages from several reward functions.    rewards (P, G, K), weights (K,) -> (P, G)

    sum_then_normalize: group_advantages of Σ_k w_k r_k, with `scale`. normalize_then_sum (GDPO,
    arXiv 2601.05242), which has no `scale`: each function's rewards are normalised in their group,
    and summed by weight; these sums are centred, and divided by their std, over the batch.
    """
    if aggregation == "sum_then_normalize":
        return group_advantages(combine_rewards(rewards, weights), scale=scale, eps=eps)
    check_choice(aggregation, ORDERS, "aggregation")
    each = torch.stack([group_advantages(r, eps=eps) for r in rewards.unbind(-1)], dim=-1)
    total = combine_rewards(torch.where(rewards.isnan(), math.nan, each), weights)  # (P, G)
    total = group_advantages(total.view(1, -1), eps=eps).view_as(total)  # the batch as one group
    return torch.where(each.flatten(1).any(dim=1, keepdim=True), total, 0.0)  # equal rewards get 0


def completion_mask(completion_ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """True up to and including the first EOS.    (B, T) token ids -> (B, T) bool

    Never made from padding: where pad and EOS are one token, that would hide the EOS which the
    policy chose, and it would never learn to stop. eos_token_ids: all of them, or [] for none.

    >>> completion_mask(torch.tensor([[5, 2, 2], [5, 6, 7]]), [2])
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    is_eos = torch.isin(completion_ids, torch.tensor(list(eos_token_ids)).to(completion_ids))
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0  # no EOS before this token


def kl_penalty(logps: Tensor, ref_logps: Tensor, *, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from samples of π.

        d = log π_ref - log π        k1 = -d        k2 = d²/2        k3 = exp(d) - d - 1

    logps, ref_logps: (B, T), nats. Returns (B, T). Raises ValueError for another estimator.
    k3 (Schulman 2020; GRPO eq. 4) is never negative. The gradients estimate other things than
    the values do: see README, Which KL?, and test_kl_gradients_by_enumeration.
    """
    check_choice(estimator, ("k1", "k2", "k3"), "kl_estimator")
    d = ref_logps - logps
    return {"k1": -d, "k2": d.square() / 2, "k3": d.expm1() - d}[estimator]


SCALES = ("group", "batch", "none", "mean", "leave_one_out")
ORDERS = ("sum_then_normalize", "normalize_then_sum")
LEVELS = ("token", "sequence")
AGGREGATION = {  # loss_type -> how per-token losses become one number: see grpo_loss
    "grpo": "sequence", "sapo": "sequence", "gmpo": "sequence", "dapo": "token", "bnpo": "token",
    "cispo": "token", "vespo": "token", "dppo": "token", "opmd": "token", "dr_grpo": "constant",
    "luspo": "row_sum",
}  # fmt: skip
CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")  # their surrogate is clip


def grpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *,
    ref_logps: Tensor | None = None, beta: float = 0.0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True, loss_type: str = "dapo", epsilon: float = 0.2,
    epsilon_high: float | None = None, delta: float | None = None,
    importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05, opmd_tau: float = 1.0,
    token_weights: Tensor | None = None, max_completion_length: int | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The GRPO family is one loss. By default (dapo), with A the row's advantage:

        ρ = exp(logp - old_logp)                      the ratio, of each token in the mask
        l = -min(ρ A, clip(ρ, 1-ε, 1+ε₊) A) + β KL    the surrogate, and the KL's part
        L = the sum of l / N                          N: how many tokens are in the mask

    old_logp is a constant, logp before the batch's first update. So at first ρ is 1, and
    ∇ρ = ρ ∇logp = ∇logp: the surrogate has the gradient -A ∇logp. Later it has none where
    ρ > 1+ε₊ and A > 0, or ρ < 1-ε and A < 0. ε is epsilon, ε₊ epsilon_high (None: ε), β
    beta. KL is kl_penalty, times ρ if use_bias_correction_kl.

    logps, old_logps, ref_logps: (B, T), nats; only logps carries gradients. advantages: (B,). mask:
    (B, T) bool, see completion_mask; what lies outside has no influence, even NaN. token_weights:
    (B, T), factors of each token's surrogate (KL and N ignore them). normalizer: what l's sum is
    divided by (N, or rows), of the whole optimiser batch, so that micro-batches add up; None: this
    call's. Returns L and diagnostics, means over this call's tokens, or rows. Raises ValueError
    where shapes do not fit and for a missing argument.

    The other choices (sg(x): x without its gradient; σ: the sigmoid). A first reading skips them.
    1. The ratio: importance_sampling_level "sequence" (GSPO) takes one a row, the exp of the row's
       mean of logp - old_logp. (vespo, gmpo, opmd: always of token ratios.)
    2. The surrogate (l without KL), by loss_type. CLIPPED: as above; delta bounds the first ρ.
         cispo      -sg(min(ρ, ε₊)) A logp
         sapo       -(4/τ) σ(τ(ρ - 1)) A, τ = sapo_temperature_pos if A > 0, else _neg
         vespo      -sg(φ) A logp, φ = w^k exp(λ(1 - w)). w: the product of the row's ρ,
                    each in e^±20, w in 1e-8 to e^20. (k, λ) = (2, 3) if A >= 0, else (3, 2)
         dppo       -sg(min(ρ, 20) v) A logp. v is 0 where the probability p = exp(logp) has
                    moved too far the way A pushes: p - old_p > ε₊ if A > 0, < -ε if not; else 1
         gmpo       -A exp(the row's mean of c). c = logp - old_logp, clipped to at most ε₊
                    if A > 0, to at least -ε if not
         opmd       -A logp + (opmd_tau / 2) (logp - old_logp)²
    3. The aggregation (which is L), by loss_type.
         token      the sum / N; dapo, bnpo, cispo, vespo, dppo, opmd
         sequence   the mean over rows of the mean over tokens; grpo, sapo, gmpo
         row_sum    the sum / rows; luspo. And constant: that / max_completion_length; dr_grpo
    """
    B, T = logps.shape
    shapes: dict[str, Any] = {"old_logps": (old_logps, (B, T)), "advantages": (advantages, (B,))}
    shapes |= {"mask": (mask, (B, T)), "ref_logps": (ref_logps, (B, T))}
    for name, (x, shape) in (shapes | {"token_weights": (token_weights, (B, T))}).items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be {shape} to fit logps")
    check_choice(loss_type, AGGREGATION, "loss_type")
    check_choice(importance_sampling_level, LEVELS, "importance_sampling_level")
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("epsilon_high: cispo needs its cap on the ratio (ScaleRL uses 5.0)")
    if AGGREGATION[loss_type] == "constant" and not max_completion_length:
        raise ValueError(f"max_completion_length: {loss_type} divides by it")
    if beta and ref_logps is None:
        raise ValueError("ref_logps: needed for a KL penalty (beta > 0)")

    mask = mask.bool()
    logps = torch.where(mask, logps, 0.0)  # and not logps · mask: 0 · NaN is NaN
    old_logps = torch.where(mask, old_logps.detach(), 0.0)
    m, A = mask.to(logps.dtype), advantages.detach().unsqueeze(1)  # (B, T), (B, 1)
    lengths = m.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    high = epsilon if epsilon_high is None else epsilon_high

    # 1. the ratio, bounded: were exp inf, a clipped token's gradient would be 0 · inf = NaN
    log_ratio = (logps - old_logps).clamp(max=min(80, math.log(torch.finfo(logps.dtype).max) - 1))
    row_mean = lambda x: x.sum(dim=1, keepdim=True) / lengths  # of (B, T), 0 outside the mask
    # (B, T), or (B, 1) at the level of sequences
    ratio = (row_mean(log_ratio) if importance_sampling_level == "sequence" else log_ratio).exp()

    # 2. the surrogate, and its diagnostics
    stats: dict[str, Tensor] = {}
    if loss_type in CLIPPED:  # the default
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        clipped = ratio.clamp(1 - epsilon, 1 + high)
        loss = -torch.min(bounded * A, clipped * A)  # the lower objective, whatever A's sign
        low_clip, high_clip = (ratio < 1 - epsilon) & (A < 0), (ratio > 1 + high) & (A > 0)
        stats |= {"clip_ratio/low_mean": low_clip, "clip_ratio/high_mean": high_clip}
        stats["clip_ratio/region_mean"] = low_clip | high_clip
    elif loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * A * logps
        stats["cispo_clip_ratio"] = (ratio > high) & (A > 0)
    elif loss_type == "sapo":
        tau = torch.full_like(A, sapo_temperature_neg).masked_fill(A > 0, sapo_temperature_pos)
        loss = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * A
    elif loss_type == "vespo":
        log_w = log_ratio.clamp(-20, 20).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)
        k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
        phi = (k * log_w + lam * (1 - log_w.exp())).exp().detach()  # (B, 1)
        loss = -phi * A * logps
        stats["vespo/phi_seq_mean"] = phi
    elif loss_type == "dppo":
        moved = logps.exp() - old_logps.exp()
        near = torch.where(A > 0, moved <= high, moved >= -epsilon)
        loss = -(ratio.clamp(max=20) * near).detach() * A * logps
        stats["clip_ratio/region_mean"] = ~near
    elif loss_type == "gmpo":
        c = torch.where(A > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))
        loss = -A * row_mean(c).exp()  # (B, 1)
        stats["clip_ratio/region_mean"] = c != log_ratio
    elif loss_type == "opmd":
        loss = -A * logps + opmd_tau / 2 * log_ratio.square()
    if token_weights is not None:
        loss = loss * torch.where(mask, token_weights.detach(), 0.0)
    if beta and ref_logps is not None:
        kl = kl_penalty(logps, torch.where(mask, ref_logps.detach(), 0.0), estimator=kl_estimator)
        kl = kl * (ratio if use_bias_correction_kl else 1)
        loss = loss + beta * kl
        stats["kl"] = kl

    # 3. the aggregation
    loss, aggregation, tokens = loss * m, AGGREGATION[loss_type], int(mask.sum())
    if aggregation == "sequence":
        loss = loss / lengths
    elif aggregation == "constant":
        loss = loss / max_completion_length  # type: ignore[operator]
    if normalizer is None:
        normalizer = tokens if aggregation == "token" else B
    mean = lambda x: (x * m).sum() / max(tokens, 1) if x.shape == m.shape else x.to(m).mean()
    return loss.sum() / max(normalizer, 1), {k: mean(x.detach()).item() for k, x in stats.items()}


# --------------------------------------------------------------------------------------- settings

SCHEDULES = ("constant_with_warmup", "constant", "linear", "cosine", "inverse_sqrt")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


# fmt: off
@dataclass
class GRPOConfig:
    """Settings of the algorithm. A name that TRL has means the same here; the defaults are ours."""

    output_dir: str | None = setting(None, "A run's folder. None: none (command line: a new one).")
    seed: int = setting(0, "Of everything random.", at_least=0, at_most=2**32 - 1)
    max_steps: int = setting(100, "Optimiser updates.", at_least=0)
    eval_steps: int | None = setting(None, "Evaluate every so many updates, too.", above=0)
    # the batch
    prompts_per_step: int = setting(8, "Prompts in one optimiser batch.", at_least=1)
    num_generations: int = setting(8, "Completions of each prompt: the group, G.", at_least=2,
                                   why=" (an advantage compares completions of one prompt)")
    per_device_train_batch_size: int = setting(8, "Micro-batch: rows, in whole groups.", at_least=1)
    max_completion_length: int = setting(256, "Longest completion, in tokens.", at_least=1)
    temperature: float = setting(1.0, "The policy is softmax(logits / temperature).", above=0,
                                 why=" (greedy sampling gives a group of equal completions)")
    system_prompt: str | None = setting(None, "Put before every prompt; makes text prompts chats.")
    chat_template_kwargs: dict[str, Any] | None = setting(None, "Template arguments, or a column.")
    mask_truncated_completions: bool = setting(False, "Leave rows without an EOS out of the loss.")
    # the objective: see grpo_loss, group_advantages, kl_penalty
    loss_type: str = setting("dapo", "Surrogate and aggregation.", choices=tuple(AGGREGATION))
    importance_sampling_level: str = setting("token", "One ratio a token or row.", choices=LEVELS)
    epsilon: float = setting(0.2, "The ratio is clipped below at 1 - epsilon.", at_least=0)
    epsilon_high: float | None = setting(
        None, "And above at 1 + epsilon_high (None: epsilon). cispo: the cap itself.", above=0)
    delta: float | None = setting(None, "Bound of the unclipped ratio (INTELLECT-2).", above=0)
    sapo_temperature_pos: float = setting(1.0, "sapo's tau where A > 0.", above=0)
    sapo_temperature_neg: float = setting(1.05, "sapo's tau elsewhere.", above=0)
    opmd_tau: float = setting(1.0, "opmd's weight of the squared log-ratio.", above=0)
    scale_rewards: str = setting("group", "What divides advantages.", choices=SCALES)
    reward_weights: list[float] | None = setting(None, "One for each reward. None: all 1.")
    multi_objective_aggregation: str = setting(ORDERS[0], "With several rewards.", choices=ORDERS)
    beta: float = setting(0.0, "Weight of the KL penalty towards the reference.", at_least=0)
    kl_estimator: str = setting("k3", "Which estimate of the KL.", choices=("k1", "k2", "k3"))
    use_bias_correction_kl: bool = setting(True, "Multiply the KL term by the importance ratio.")
    top_entropy_quantile: float = setting(
        1.0, "Share of tokens, the most uncertain, whose surrogate counts.", above=0, at_most=1)
    sampler_correction: str = setting("none", "Weigh by policy / sampler.", choices=CORRECTIONS)
    sampler_correction_clip_min: float = setting(0.0, "Its lower bound.", at_least=0)
    sampler_correction_clip_max: float = setting(3.0, "And its upper one.", above=0)
    off_policy_mask_threshold: float | None = setting(
        None, "Drop bad rows that have become less likely by so many nats a token.", above=0)
    merge_half_precision: bool = setting(
        False, "Sample from merged weights also where merging rounds; needs sampler_correction.")
    # the optimiser: AdamW
    num_iterations: int = setting(1, "Updates made with each batch of completions.", at_least=1)
    learning_rate: float | None = setting(None, "None: default_learning_rate.", at_least=0)
    lora_plus_ratio: float = setting(1.0, "LoRA+: B's learning rate over A's.", at_least=0)
    modules_to_save_learning_rate: float | None = setting(
        None, "For parameters trained in full. None: learning_rate.", above=0)
    lr_scheduler_type: str = setting(SCHEDULES[0], "Of the learning rate.", choices=SCHEDULES)
    warmup_steps: int = setting(0, "Updates in which the rate rises (not if constant).", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's.", at_least=0)
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm.", above=0)
    gradient_checkpointing: bool = setting(False, "Less memory for activations, more time.")
    # fmt: on

    def __post_init__(self) -> None:
        check_settings(self)
        clips = self.loss_type in CLIPPED
        if clips and self.epsilon > 1:
            raise ValueError(f"epsilon = {self.epsilon}: at most 1, as 1 - epsilon bounds a ratio")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("epsilon_high: cispo needs its cap on the ratio (ScaleRL uses 5.0)")
        own = self.loss_type in ("vespo", "gmpo", "opmd")
        by_length = AGGREGATION[self.loss_type] in ("token", "constant")
        if self.importance_sampling_level == "sequence" and (own or by_length):
            how = "acts in the KL alone" if own else "weighs a row by its length; GSPO's is grpo"
            warnings.warn(f"sequence level with loss_type {self.loss_type!r} {how}", stacklevel=3)
        if not clips and self.delta is not None:
            raise ValueError(f"delta: has no meaning with loss_type {self.loss_type!r}")
        if self.merge_half_precision and self.sampler_correction == "none":
            raise ValueError("merge_half_precision: needs sampler_correction, as merging rounds")
        if self.max_steps % self.num_iterations:
            raise ValueError(f"max_steps: not a multiple of num_iterations = {self.num_iterations}")


# a paper's objective as settings, and its source: GRPOConfig(**VARIANTS[name].settings)
Variant = namedtuple("Variant", "settings source")
VARIANTS: dict[str, Variant] = {
    "grpo": Variant({"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
                    "DeepSeekMath, arXiv 2402.03300"),
    "dr_grpo": Variant({"loss_type": "dr_grpo", "scale_rewards": "none"}, "arXiv 2503.20783"),
    "dapo": Variant({"loss_type": "dapo", "epsilon_high": 0.28}, "DAPO, arXiv 2503.14476"),
    "gspo": Variant({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
                     "epsilon_high": 4e-4}, "GSPO, arXiv 2507.18071, 5.1"),
    "cispo": Variant({"loss_type": "cispo", "epsilon_high": 5.0}, "arXiv 2506.13585, 2510.13786"),
    "sapo": Variant({"loss_type": "sapo"}, "Soft Adaptive Policy Optimization, arXiv 2511.20347"),
    "luspo": Variant({"loss_type": "luspo", "importance_sampling_level": "sequence",
                      "epsilon": 2e-3, "epsilon_high": 2.5e-3}, "arXiv 2602.05261, 5.1"),
    "vespo": Variant({"loss_type": "vespo"}, "VESPO, arXiv 2602.10693"),
    "dppo": Variant({"loss_type": "dppo"}, "DPPO with total variation, arXiv 2602.04879, eq. 11"),
    "gmpo": Variant({"loss_type": "gmpo", "epsilon": 0.4}, "GMPO, arXiv 2507.20673"),
    "opmd": Variant({"loss_type": "opmd"}, "Kimi k1.5, arXiv 2501.12599, 2.3.2"),
    "rloo": Variant({"scale_rewards": "leave_one_out"}, "arXiv 2402.14740"),
    "max_rl": Variant({"scale_rewards": "mean"}, "MaxRL, arXiv 2602.02710"),
    "gdpo": Variant({"multi_objective_aggregation": "normalize_then_sum"}, "arXiv 2601.05242"),
    "lite_ppo": Variant({"loss_type": "dapo", "scale_rewards": "batch"}, "arXiv 2508.08221"),
    "top_entropy": Variant({"top_entropy_quantile": 0.2}, "80/20 rule, arXiv 2506.01939"),
}  # fmt: skip

# ---------------------------------------------------------------------------------------- trainer

SAMPLER_GAP = "sampling/sampling_logp_difference/mean"  # TRL's: |log-prob sampled - scored|
Rows = Any  # a sequence of dicts: rows of a data set, or samples


@dataclass
class Rollout:
    """P prompts and the G completions of each."""

    prompt_ids: Tensor  # (P, L), left-padded
    prompt_mask: Tensor  # (P, L) bool
    completion_ids: Tensor  # (B, T), right-padded; T is the longest row
    completion_mask: Tensor  # (B, T) bool: see completion_mask
    logps: Tensor  # (B, T), the sampler's own, at its temperature; 0 where masked

    def __post_init__(self) -> None:  # an int mask would index, not select
        self.prompt_mask = self.prompt_mask.bool()
        self.completion_mask = self.completion_mask.bool()

    @property
    def num_generations(self) -> int:
        return len(self.completion_ids) // len(self.prompt_ids)

    def ended(self, eos_token_ids: Sequence[int]) -> Tensor:  # (B,) bool; the others were cut off
        is_eos = torch.isin(self.completion_ids, torch.tensor(eos_token_ids).to(self.prompt_ids))
        return (is_eos & self.completion_mask).any(dim=1)

    def select(self, prompts: list[int]) -> "Rollout":
        """The groups of these prompts (indices), padded to their own longest."""
        take = lambda x: x.unflatten(0, (-1, self.num_generations))[prompts].flatten(0, 1)  # (b, T)
        ids, mask, logps = map(take, (self.completion_ids, self.completion_mask, self.logps))
        L = int(self.prompt_mask[prompts].sum(dim=1).max())
        T = max(1, int((mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
        prompt = self.prompt_ids[prompts, -L:], self.prompt_mask[prompts, -L:]
        return Rollout(*prompt, ids[:, :T], mask[:, :T], logps[:, :T])


@dataclass
class MicroBatch:
    """Some groups of a rollout, and what is known of them."""

    prompts: list[int]  # indices into the whole rollout's prompts
    rollout: Rollout  # of these groups alone
    advantages: Tensor  # (b,)
    old_logps: Tensor | None = None  # (b, T); None until the first forward
    ref_logps: Tensor | None = None  # (b, T); None without a KL penalty
    uncertain: Tensor | None = None  # (b, T) bool: mark_uncertain_tokens


class GRPOTrainer:
    """GRPO on whatever parameters of `model` require gradients: adapters, modules, or all of it.

    model: a causal LM of transformers, with lora.apply_lora, wrapped by peft, or fully trainable.
    reward_funcs: functions, or names in rewards.REWARDS. train_dataset, eval_dataset: sequences of
    dicts with `prompt` (text or chat messages) and columns for the rewards. processing_class: the
    tokenizer (None: the model's own). engine: an object with `generate` and `completion_logps`
    (None: the functions below). reference: a callable that returns a context manager, within which
    the model is the reference policy (None: see lora.default_reference). callbacks: called in order
    after each batch, and a first evaluation, with the trainer and the metrics, to which they may
    add; before training `begin`, if one has it. A Record is last. What cannot work: ValueError.
    """

    step = 0  # optimiser updates made
    end: int  # the update at which this call of train ends
    tokens = 0  # of all rows sampled for updates, each with its prompt
    stop = False  # set it, and train ends after this batch; a callback's ends it after the next
    samples: Rows = ()  # of the last batch
    eval_samples: Rows = ()  # of an evaluation after it

    # ---- the algorithm

    def update(self, rows: Rows) -> dict[str, Any]:
        """GRPO: a batch of prompts, rows of the data, and its updates. Returns the metrics."""
        args, logged = self.args, []  # logged: (weight, {name: value}), to be averaged
        # 1. Sample G completions of each of P prompts, and score them
        rollout = self.sample(rows, args.num_generations)  # B = P·G completions
        rewards, samples = self.score(rows, rollout)  # (P·processes, G, K): of all processes
        # 2. Compare each with its group
        advantages = multi_objective_advantages(  # by default group_advantages(Σ w_k r_k)
            rewards, self.reward_weights, scale=args.scale_rewards,
            aggregation=args.multi_objective_aggregation,
        )  # fmt: skip
        if args.mask_truncated_completions:
            rollout.completion_mask &= rollout.ended(self.eos_token_ids).unsqueeze(1)  # no EOS: out
        normalizer, loss_scale = self.normalizers(rollout.completion_mask)  # N; 2^k for float16
        micro_batches = self.micro_batches(rollout, advantages)  # of this process's groups
        self.last_batch, self.samples = (rollout, micro_batches), samples  # for callbacks
        # 3. Make the better ones likelier. The micro-batches' gradients add up to the batch's
        for _ in range(args.num_iterations):  # if 1, ρ is 1 throughout, and no ρ is clipped
            for parameter in self.params.values():  # not None: there may be no group with A ≠ 0
                parameter.grad = torch.zeros_like(parameter)
            if args.top_entropy_quantile < 1:
                self.mark_uncertain_tokens(micro_batches)
            total = 0.0
            with evaluating(self.model, adapter_dropout=True):  # no dropout but the adapter's
                for micro in micro_batches:
                    piece, mask = micro.rollout, micro.rollout.completion_mask
                    logps, entropies = self.logps(piece)  # (b, T) each; logps with gradients
                    if micro.old_logps is None:  # the batch's first update
                        micro.old_logps = logps.detach()  # not the sampler's: they round otherwise
                    loss, stats = grpo_loss(
                        logps, micro.old_logps, micro.advantages, mask, ref_logps=micro.ref_logps,
                        token_weights=self.token_weights(micro, logps.detach(), micro.old_logps),
                        normalizer=normalizer, **self.objective(),  # beta, epsilon, ...: from args
                    )  # fmt: skip
                    (loss * loss_scale).backward()
                    total += loss.item()
                    stats["entropy"] = entropies[mask].mean().item()
                    stats[SAMPLER_GAP] = (micro.old_logps - piece.logps)[mask].abs().mean().item()
                    logged.append((int(mask.sum()), stats))
            logged.append((1, self.optimizer_step(total, loss_scale)))  # clips gradients; steps
        self.tokens += sum(sample["prompt_length"] + sample["length"] for sample in samples)
        metrics = self.summarize(samples, rewards, advantages)
        return metrics | weighted_means(logged) | {"num_tokens": self.tokens}

    def sample(self, rows: Rows, num_generations: int) -> Rollout:
        """Completions from the policy as it is now: on merged weights, W + s·B A, if merging is
        exact. The number of processes changes none of them: these share one stream of draws."""
        args = self.args
        prompts = [torch.tensor(self.encode(row), device=self.device) for row in rows]
        ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
        skip = (self.rank * len(rows) * num_generations, args.max_completion_length)  # lower ranks'
        torch.rand(*skip, generator=self.generator, dtype=torch.float64, device="cpu")
        with lora_merged(self.model) if self.merges else nullcontext():
            return self.engine.generate(
                self.model, ids.masked_fill(ids < 0, self.pad_token_id), ids >= 0,
                num_generations=num_generations, max_completion_length=args.max_completion_length,
                temperature=args.temperature, eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id, generator=self.generator,
            )  # fmt: skip

    def encode(self, row: dict[str, Any]) -> list[int]:
        """The prompt's token ids."""
        options = (self.args.chat_template_kwargs or {}) | (row.get("chat_template_kwargs") or {})
        return encode_prompt(row["prompt"], self.tokenizer, self.args.system_prompt, **options)

    def score(self, rows: Rows, rollout: Rollout) -> tuple[Tensor, Rows]:
        """Every completion's rewards, (P·processes, G, K), NaN for None; and samples, which
        record each completion's prompt, text, lengths and rewards. Both are of all processes."""
        G = rollout.num_generations
        rows = [row for row in rows for _ in range(G)]  # the data's row of each completion
        ids = [rollout.completion_ids[b, m].tolist() for b, m in enumerate(rollout.completion_mask)]
        ends = {*self.eos_token_ids, self.tokenizer.pad_token_id}  # other special tokens are text
        texts = self.tokenizer.batch_decode([[i for i in row if i not in ends] for row in ids])
        # a <think> with which the template ends the prompt is the first word of the completion
        tails = zip(rollout.prompt_ids[:, -16:], rollout.prompt_mask[:, -16:], strict=True)
        opened = [OPENED.findall(str(self.tokenizer.decode(tail[seen])))[0] for tail, seen in tails]
        texts = [opened[i // G] + text for i, text in enumerate(texts)]
        state = SimpleNamespace(**vars(self.args), global_step=self.step)
        log_metric = lambda name, value: self.reward_metrics.append((1, {str(name): float(value)}))
        given = {"trainer_state": state, "log_metric": log_metric}
        scores, extra = call_rewards(self.reward_funcs, rows, texts, ids, **given)
        columns = extra | {  # ours replace what a reward logs by the same name
            "prompt": [row["prompt"] for row in rows], "completion": texts,
            "length": [*map(len, ids)],
            "ended": rollout.ended(self.eos_token_ids).tolist(),  # or cut off
            "prompt_length": rollout.prompt_mask.sum(1).repeat_interleave(G).tolist(),
        }  # fmt: skip
        columns |= {f"rewards/{n}": s for n, s in zip(self.reward_names, scores, strict=True)}
        samples = [dict(zip(columns, x, strict=True)) for x in zip(*columns.values(), strict=True)]
        rewards = torch.tensor([*chain(*gather([*zip(*scores, strict=True)]))], dtype=torch.float64)
        return rewards.view(-1, G, len(scores)), [*chain(*gather(samples))]

    def logps(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a rollout's tokens, (b, T) each, by the model as it is."""
        return self.engine.completion_logps(self.model, rollout, temperature=self.args.temperature)

    def objective(self) -> dict[str, Any]:
        """grpo_loss's settings, as args are now."""
        names = inspect.signature(grpo_loss).parameters
        return {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}

    def normalizers(self, mask: Tensor) -> tuple[int, float]:
        """grpo_loss's normalizer for mask (B, T), over all processes. And a power of two to
        multiply losses by, for models in float16, where a gradient of 1/N would round to 0."""
        tokens, rows = sum(gather(int(mask.sum()))), sum(gather(len(mask)))
        aggregation = AGGREGATION[self.args.loss_type]
        scale = 2.0 ** int(math.log2(max(1, rows if aggregation == "row_sum" else tokens)))
        return tokens if aggregation == "token" else rows, scale

    @torch.no_grad()
    def micro_batches(self, rollout: Rollout, advantages: Tensor) -> list[MicroBatch]:
        """This process's groups, sorted by length to save padding; with reference log-probs if
        beta > 0. advantages: (P·processes, G), of all. A group with none but 0 is skipped, unless
        a setting needs its forward; N still counts it."""
        args, G, P = self.args, rollout.num_generations, len(rollout.prompt_ids)
        advantages = advantages.to(rollout.logps)[self.rank * P :][:P]  # this process's groups
        every = args.beta or args.loss_type == "opmd" or args.top_entropy_quantile < 1
        by_length = rollout.completion_mask.sum(1).view(P, G).amax(1).argsort(stable=True).tolist()
        groups = [p for p in by_length if every or self.sharded or advantages[p].any()]
        size, batches = max(1, args.per_device_train_batch_size // G), []
        for some in (groups[i : i + size] for i in range(0, len(groups), size)):
            batches.append(MicroBatch(some, rollout.select(some), advantages[some].flatten()))
        if args.beta:
            with evaluating(self.model), self.reference():
                for batch in batches:
                    batch.ref_logps, _ = self.logps(batch.rollout)
        return batches

    @torch.no_grad()
    def mark_uncertain_tokens(self, batches: list[MicroBatch]) -> None:
        """Which tokens are in the top quantile of entropy over the whole optimiser batch."""
        with evaluating(self.model):
            pairs = [(batch, self.logps(batch.rollout)[1]) for batch in batches]
        own = [x for batch, e in pairs for x in e[batch.rollout.completion_mask].tolist()]
        values = torch.tensor([*chain(*gather(own))], dtype=torch.float64)  # of all processes
        threshold = values.quantile(1 - self.args.top_entropy_quantile) if len(values) else 0
        for batch, entropy in pairs:
            batch.uncertain = entropy >= threshold

    def token_weights(self, batch: MicroBatch, logps: Tensor, old_logps: Tensor) -> Tensor:
        """(b, T): the factors of the tokens' surrogates. All are 1, unless a setting says more."""
        args, mask, sampled = self.args, batch.rollout.completion_mask, batch.rollout.logps
        weights = torch.ones_like(logps) if batch.uncertain is None else batch.uncertain.to(logps)
        if args.sampler_correction != "none":
            bounds = args.sampler_correction_clip_min, args.sampler_correction_clip_max
            weights *= sampler_weights(old_logps, sampled, mask, args.sampler_correction, *bounds)
        if args.off_policy_mask_threshold is not None:
            gap = (sampled - logps).where(mask, 0).sum(1) / mask.sum(1).clamp(min=1)  # (b,)
            keep = (batch.advantages >= 0) | (gap <= args.off_policy_mask_threshold)
            weights = weights * keep.unsqueeze(1)
        return weights

    def optimizer_step(self, loss: float, scale: float) -> dict[str, float]:
        """Divide gradients by scale, sum them and the loss over the processes, clip, and step if
        all is finite. Returns metrics; grad_norm is that before clipping."""
        for parameter in self.params.values():
            parameter.grad /= scale  # type: ignore[operator, assignment]
            if self.world > 1:
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.params.values(), self.args.max_grad_norm).item()
        loss = sum(gather(loss if self.last_batch[0].logps.isfinite().all() else math.nan))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule(self.step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.step += 1  # skipped or not: the schedule counts updates
        metrics = {"loss": loss, "grad_norm": norm, "skipped_updates": float(not finite)}
        return metrics | {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    # ---- running

    def train(self, until: int | None = None) -> dict[str, Any]:
        """Run to max_steps, the last whole batch by update `until`, or `stop`. Returns metrics."""
        args, n, metrics = self.args, self.args.num_iterations, dict[str, Any]()
        self.end = end = min(args.max_steps, args.max_steps if until is None else until) // n * n
        for begin in [callback.begin for callback in self.callbacks if hasattr(callback, "begin")]:
            begin(self)
        if self.eval_dataset and self.step == 0:
            metrics = {"step": 0, **self.evaluate()}
            for callback in self.callbacks:
                callback(self, metrics)
        for index in tqdm(range(self.step // n, end // n), "GRPO", disable=self.rank > 0 or None):
            started, self.eval_samples = time.perf_counter(), []
            self.seed("update", index)
            metrics = self.update(self.batch(index))
            epoch = (index + 1) * args.prompts_per_step / len(self.train_dataset)
            own = {"step": self.step, "epoch": epoch, "step_time": time.perf_counter() - started}
            metrics = own | metrics | own  # first in order, and not to be overwritten by rewards
            if self.eval_dataset and (self.step >= end or self.due(args.eval_steps)):
                metrics |= self.evaluate()
            self.stop = stopping = any(gather(self.stop))  # asked of one, all processes stop here
            for callback in self.callbacks:
                callback(self, metrics)
            if stopping:
                break
        if args.output_dir and self.rank == 0:
            save_lora(self.model, Path(args.output_dir) / "adapter")
        return metrics

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many updates happens now."""
        return every is not None and every > 0 and self.step % every < self.args.num_iterations

    def evaluate(self) -> dict[str, Any]:
        """One completion of each evaluation problem, with the same draws every time. Returns its
        metrics, named eval_...; the completions are then in eval_samples."""
        data, size = self.eval_dataset, self.args.prompts_per_step * self.args.num_generations
        if not data:
            raise ValueError("evaluate needs an eval_dataset")
        rewards, samples = [], []
        for start in range(0, len(data), size):
            self.seed("evaluate", start)
            rows = self.share([data[i] for i in range(start, min(start + size, len(data)))])
            scores, some = self.score(rows, self.sample(rows, 1))
            rewards.append(scores)
            samples += some
        samples = samples[: len(data)]  # the last rows may have been repeated
        metrics = self.summarize(samples, torch.cat(rewards)[: len(data)])
        self.eval_samples = [sample | {"split": "eval"} for sample in samples]
        return {f"eval_{key}": value for key, value in metrics.items()}

    def batch(self, index: int) -> list[dict[str, Any]]:
        """This process's prompts of batch `index`. Each epoch's order comes from the seed alone."""
        n, size = len(self.train_dataset), self.args.prompts_per_step
        at = range(index * size, (index + 1) * size)
        rng = lambda epoch: torch.Generator().manual_seed(self.args.seed + epoch)
        order = {e: torch.randperm(n, generator=rng(e), device="cpu") for e in {i // n for i in at}}
        return self.share([self.train_dataset[int(order[i // n][i % n])] for i in at])

    def share(self, rows: Rows) -> Rows:
        """This process's part of some rows. Where they do not divide, the last one is repeated."""
        each = -(-len(rows) // self.world)
        return (rows + rows[-1:] * self.world)[self.rank * each :][:each]

    def seed(self, *what: Any) -> None:
        """Reseed all from the run's seed and `what`: so a resumed run goes on as it would have."""
        digest = hashlib.sha256(repr((self.args.seed, *what)).encode()).digest()
        transformers.set_seed((int.from_bytes(digest[:4], "big") + self.rank) % 2**32)
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[4:8], "big"))

    def summarize(self, samples: Rows, rewards: Tensor, advantages: Any = None) -> dict[str, Any]:
        """TRL's metrics of some completions and their rewards (P, G, K). Samples are given their
        advantages, where there are any."""
        total = combine_rewards(rewards, self.reward_weights)  # (P, G)
        lengths = [float(s["length"]) for s in samples]
        ended = [float(s["length"]) for s in samples if s["ended"]]
        metrics = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
        for kind, counts in (("", lengths), ("terminated_", ended or [0.0])):
            for f in (torch.mean, torch.min, torch.max):
                metrics[f"completions/{f.__name__}_{kind}length"] = f(torch.tensor(counts)).item()
        for name, values in zip(self.reward_names, rewards.unbind(-1), strict=True):
            metrics[f"rewards/{name}/mean"] = values.nanmean().item()
            metrics[f"rewards/{name}/std"] = _nanstd(values.flatten(), dim=0).item()
        metrics = weighted_means(self.reward_metrics) | metrics | {"reward": total.nanmean().item()}
        self.reward_metrics.clear()
        if advantages is not None:
            metrics["reward_std"] = _nanstd(total.flatten(), dim=0).item()
            equal = ~group_advantages(total).any(dim=1)
            metrics["frac_reward_zero_std"] = equal.double().mean().item()
            for i, advantage in enumerate(advantages.flatten().tolist()):
                samples[i] |= {"advantage": advantage, "group": i // advantages.shape[1]}
        return metrics

    # ---- setting up

    def __init__(
        self, model: nn.Module, reward_funcs: Any, args: GRPOConfig, train_dataset: Rows,
        eval_dataset: Rows | None = None, processing_class: Any = None,
        reference: Callable[[], Any] | None = None, callbacks: Sequence[Any] = (),
        engine: Any = None,
    ) -> None:  # fmt: skip
        if isinstance(model, str):
            raise ValueError(f"model: load it: AutoModelForCausalLM.from_pretrained({model!r})")
        if not isinstance(args, GRPOConfig):
            raise ValueError(f"args: must be grpo_lora.GRPOConfig, not {type(args).__module__}'s")
        funcs = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        for one in (*funcs, *callbacks):
            if isinstance(one, nn.Module) or not (callable(one) or isinstance(one, str)):
                raise ValueError(f"{one!r:.60}: rewards and callbacks must be plain functions here")
        self.model: Any = model
        self.args = args = replace(args)  # ours: the caller's stays as it is
        self.engine = engine or sys.modules[__name__]
        self.rank, self.world = rank_and_world()
        if args.prompts_per_step % self.world:
            size = f"prompts_per_step = {args.prompts_per_step}"
            raise ValueError(f"{size}: must be a multiple of the {self.world} processes")
        if args.learning_rate is None:
            args.learning_rate = default_learning_rate(model)
        self.reward_funcs = [reward_function(f) for f in funcs]
        names = [reward_name(f) for f in self.reward_funcs]
        self.reward_names = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
        weights = args.reward_weights or [1.0] * len(funcs)
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)
        if not funcs:
            raise ValueError("rewards: at least one reward function is needed")
        if self.reward_weights.shape != (len(funcs),) or not self.reward_weights.isfinite().all():
            raise ValueError(f"reward_weights: {weights}: {len(funcs)} finite numbers are needed")
        lm = CausalLM(model)  # refuses models that it cannot be right for
        folder = getattr(lm.core.config, "_name_or_path", "")
        if processing_class is None and not folder:
            raise ValueError("processing_class: the model comes from no folder; pass its tokenizer")
        self.tokenizer = processing_class or AutoTokenizer.from_pretrained(folder)
        named = getattr(getattr(lm.core, "generation_config", None), "eos_token_id", None)
        named = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        self.eos_token_ids = [i for i in dict.fromkeys(named) if i is not None]  # every one counts
        if not self.eos_token_ids:
            raise ValueError("no completion could end: the tokenizer has no EOS; set its eos_token")
        self.pad_token_id = self.eos_token_ids[0]  # any token does: padding is masked
        vocabulary = lm.core.get_input_embeddings().weight.shape[0]
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        own, keys = lm.core.config.get_text_config(), ("max_position_embeddings", "rope_parameters")
        window, rope = (getattr(own, key, None) for key in keys)
        if (rope or {}).get("rope_type") == "longrope":  # a longer row changes RoPE for all rows
            window = rope["original_max_position_embeddings"]  # type: ignore[index]
        room = (window or math.inf) - args.max_completion_length
        for rows in (train_dataset, *([] if eval_dataset is None else [eval_dataset])):
            check_dataset(rows, self.reward_funcs, self.encode, room, vocabulary)

        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("the model has no trainable parameter: call apply_lora first")
        if any(p.dtype == torch.float16 for p in self.params.values()):  # AdamW's eps is 0 there
            raise ValueError("float16 parameters cannot be trained: load them as float32")
        if any(p.dtype == torch.bfloat16 for p in self.params.values()):
            warnings.warn("bfloat16 parameters round small updates away: use float32", stacklevel=2)
        self.device = next(iter(self.params.values())).device
        dropout = [m for name, m in model.named_modules() if "lora_dropout" in name]
        if args.num_iterations > 1 and any(getattr(m, "p", 0) > 0 for m in dropout):
            raise ValueError("lora_dropout with num_iterations > 1 would bend the ratio: use 0")
        for parameter in self.params.values() if self.world > 1 else ():
            dist.broadcast(parameter.data, src=0)  # every process starts from the first one's
        self.reference = reference or default_reference(model)
        if args.gradient_checkpointing:
            lm.core.activation_checkpointing_enable({"use_reentrant": False})
        full_rate = args.modules_to_save_learning_rate
        groups = param_groups(model, args.learning_rate, args.lora_plus_ratio, full_rate)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
        schedule = (args.lr_scheduler_type, self.optimizer, args.warmup_steps, args.max_steps)
        self.schedule = get_scheduler(*schedule).lr_lambdas[0]  # updates made -> factor of the rate
        self.sharded = hasattr(lm.decoder, "unshard")  # FSDP2
        bases = [m.base_layer.weight.dtype for m in model.modules() if isinstance(m, LoRALinear)]
        exact = {*bases} <= {torch.float32, torch.float64}  # in half precision merging rounds
        self.merges = (exact or args.merge_half_precision) and bool(bases) and not self.sharded
        recorded = not args.output_dir or any(isinstance(c, Record) for c in callbacks)
        self.callbacks = [*callbacks, *([] if recorded else [Record()])]
        self.reward_metrics: list[Any] = []  # what reward functions log
        self.generator = torch.Generator()  # of the rollouts; see seed

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides its model, settings and data."""
        state: dict[str, Any] = {"step": self.step, "tokens": self.tokens}
        state["reference"] = getattr(self.reference, "tensors", None)  # of a lora_snapshot
        state["trainable"] = {name: p.detach() for name, p in self.params.items()}
        return copy.deepcopy(state | {"optimizer": self.optimizer.state_dict()})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict returned, with the same model and settings."""
        self.step, self.tokens = state["step"], state["tokens"]
        for name, parameter in self.params.items():
            parameter.copy_(state["trainable"][name].view_as(parameter))
        if state["reference"] is not None:
            self.reference = lora_snapshot(self.model, state["reference"])
        elif isinstance(self.reference, lora_snapshot):  # of an adapter that was trained already
            self.reference = lambda: lora_disabled(self.model)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def sampler_weights(
    old_logps: Tensor, sampled_logps: Tensor, mask: Tensor, mode: str, low: float, high: float
) -> Tensor:
    """Corrects for a sampler that is not quite the policy that is scored.    (B, T) -> (B, T)

    w = exp(old_logp - sampled_logp), of a token, or of the row (the product of its tokens'). Modes
    ..._truncate: clipped to low..high (TIS). Modes ..._mask: 0 outside (IcePop).
    """
    gap = torch.where(mask, old_logps - sampled_logps, 0.0)
    level, _, how = mode.partition("_")
    ratio = (gap.sum(dim=1, keepdim=True).expand_as(gap) if level == "sequence" else gap).exp()
    bounded = ratio.clamp(low, high)
    return bounded if how == "truncate" else torch.where(ratio == bounded, ratio, 0.0)


def weighted_means(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Means over parts of all processes: micro-batches by tokens, say. Weight 0 drops a part."""
    sums: dict[str, tuple[float, int]] = {}
    for weight, values in chain(*gather(parts)):
        for name, value in values.items() if weight else ():
            total, weights = sums.get(name, (0.0, 0))
            sums[name] = total + weight * value, weights + weight
    return {name: total / weights for name, (total, weights) in sums.items()}


@contextmanager
def evaluating(model: nn.Module, adapter_dropout: bool = False) -> Iterator[None]:
    """Eval mode within, so that the base has no dropout; each module's own mode after. With
    adapter_dropout (for the loss) the adapter's dropout and activation checkpointing stay on."""
    with ExitStack() as after:
        for name, module in model.named_modules():
            held = vars(module)  # its dropout rates, if numbers; and what lora.REPACKS is
            off = {key: x for key, x in held.items() if "dropout" in key and isinstance(x, float)}
            off |= {key: x for key, x in held.items() if key == "support_avx512bf16_for_cpu"}
            after.callback(held.update, off, training=module.training)
            acts = "lora_dropout" in name or getattr(module, "gradient_checkpointing", False)
            held.update(dict.fromkeys(off, 0.0), training=adapter_dropout and acts)
        yield


def default_learning_rate(model: nn.Module) -> float:
    """Where to start when nothing is tuned: c (2000/H)^0.78; for adapters of scaling s 320/(s·r)
    times that. After Schulman et al. (2025, "LoRA Without Regret"), with c = 1.25e-5, a quarter of
    theirs, at which SmolLM2 collapsed. Raises ValueError where the config has no hidden_size."""
    width = getattr(CausalLM(model).core.config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError("learning_rate: give one; the model's config has no hidden_size")
    rate = 1.25e-5 * (2000 / width) ** 0.78
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if layers or 2 * trained < sum(p.numel() for p in model.parameters()):
        # Adam moves each number of B by the rate, and so W by up to s·r·|A| times that
        rate *= 10 * 32 / max((m.scaling * m.lora_A.out_features for m in layers), default=32.0)
    return float(f"{rate:.2g}")


class Record:
    """A callback: metrics.jsonl gets a line per batch, completions.jsonl one per sample shown."""

    shown = 8  # samples of each batch

    def begin(self, trainer: GRPOTrainer) -> None:
        if not trainer.args.output_dir:
            raise ValueError("output_dir: a record needs a folder")
        folder = Path(trainer.args.output_dir)
        if trainer.step == 0 and (folder / "metrics.jsonl").exists():
            raise ValueError(f"output_dir: {folder} holds another run; name a new folder")

    def __call__(self, trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
        if trainer.rank == 0:
            folder = Path(str(trainer.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            samples = *trainer.samples[: self.shown], *trainer.eval_samples[: self.shown]
            shown = [sample | {"step": metrics["step"]} for sample in samples]
            for name, rows in (("metrics", [metrics]), ("completions", shown)):
                with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(to_json(row) + "\n" for row in rows)


def to_json(value: Any) -> str:
    """One line of JSON. NaN and infinities, which JSON lacks, become null."""
    number = lambda x: x.tolist() if hasattr(x, "tolist") else str(x)  # NumPy's, a tensor's
    return json.dumps(json.loads(json.dumps(value, default=number), parse_constant=lambda _: None))


# ---------------------------------------------------------------------------------------- rollout

widest = lambda device: torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs


@torch.no_grad()
def generate(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, *, num_generations: int,
    max_completion_length: int, temperature: float, eos_token_ids: Sequence[int],
    pad_token_id: int, generator: torch.Generator | None = None,
) -> Rollout:  # fmt: skip
    """Sample G completions of each prompt from the whole of softmax(logits / temperature).

    It is the very policy that is trained: no top-k, top-p or penalties. No dropout. prompt_ids,
    prompt_mask: (P, L), left-padded. eos_token_ids: each of them ends a row; [] for full length.
    Where the model has a cache, a prompt is read once, and its keys and values are repeated for its
    G rows. A row that ended leaves the batch. The uniform numbers, (B, max_completion_length), are
    drawn first: no row's length changes what another draws.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be above 0; 1e-4 is nearly greedy")
    lm = model if isinstance(model, CausalLM) else CausalLM(model)
    G, device = num_generations, prompt_ids.device
    drawn_on = generator.device if generator else "cpu"  # the same draws wherever the model is
    size = (len(prompt_ids) * G, max_completion_length)
    draws = torch.rand(*size, generator=generator, dtype=torch.float64, device=drawn_on)
    draws = draws.to(device, widest(device))
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    with evaluating(lm.core):
        batches = lm.prompt_batches(prompt_ids, prompt_mask, G)
        parts = [_write_rows(lm, p, m, draws[rows], temperature, eos) for p, m, rows in batches]
    ids, logps = (torch.cat(part) for part in zip(*parts, strict=True))
    mask = completion_mask(ids, eos_token_ids)
    completions = ids.masked_fill(~mask, pad_token_id), mask, logps.masked_fill(~mask, 0)
    T = int(mask.sum(dim=1).max())
    return Rollout(prompt_ids, prompt_mask, *(x[:, :T] for x in completions))


def _write_rows(
    lm: "CausalLM", prompt: Tensor, seen: Tensor, draws: Tensor, temperature: float, eos: Tensor
) -> tuple[Tensor, Tensor]:
    """The decode loop: p prompts, seen (p, L), draws (b, T), b = p·G -> ids, logps, (b, T) each.
    A recurrent model, whose cache cannot be repeated, reads each row again for each token."""
    (b, T), G, device = draws.shape, len(draws) // len(prompt), prompt.device
    rows = torch.arange(b, device=device)  # those that are still in the batch, r of the b
    going = torch.ones(b, dtype=torch.bool, device=device)  # which of these have not ended
    cache = lm.new_cache(T) if lm.takes_cache else None
    logits = lm.next_logits(prompt, seen, cache).repeat_interleave(G, dim=0)  # (b, V)
    context, seen = prompt.repeat_interleave(G, dim=0), seen.repeat_interleave(G, dim=0)  # (b, L)
    if cache is not None:
        cache.batch_repeat_interleave(G)
    ids = torch.zeros(b, T, dtype=torch.long, device=device)
    logps = torch.zeros(b, T, dtype=logits.dtype, device=device)
    for t in range(T):
        log_probs = (logits / temperature).log_softmax(dim=-1)  # (r, V)
        tokens = draw_tokens(log_probs, draws[rows, t]).unsqueeze(1)  # (r, 1)
        ids[rows, t] = tokens.squeeze(1)
        logps[rows, t] = log_probs.gather(1, tokens).squeeze(1)
        going = going & (tokens != eos).all(dim=1)
        left = int(going.sum())  # on the host: a step waits for it
        if left == 0 or t + 1 == T:
            break
        context, seen = torch.cat([context, tokens], dim=1), pad(seen, (0, 1), value=True)
        if left < len(rows) * lm.drop_below:
            kept = going.nonzero().squeeze(1).cpu()  # layers may lie on several devices
            rows, going, context, seen = rows[kept], going[kept], context[kept], seen[kept]
            if cache is not None:
                cache.batch_select_indices(kept)
        unread = context if cache is None else context[:, -1:]
        logits = lm.next_logits(unread, seen, cache)  # (r, V)
    return ids, logps


def draw_tokens(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution.    (b, V), (b,) -> token ids (b,)

    The token is the first whose cumulative probability exceeds the uniform number.

    >>> draw_tokens(torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([0.4]))
    tensor([1])
    """
    cdf = log_probs.exp().cumsum(dim=-1, dtype=widest(log_probs.device))
    # rounding leaves the last entry near 1, not at it, so the uniform number is scaled to it
    draws = uniforms.unsqueeze(1).to(cdf) * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, draws, right=True).squeeze(1)
    return tokens.clamp(max=cdf.shape[1] - 1)  # where that product was rounded up


# ------------------------------------------------------------------------------ log-probabilities


def completion_logps(
    model: nn.Module, rollout: Rollout, *, temperature: float, share_prompt: bool = True,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log π(token | what is before it) of each completion token, and the entropy there, in nats.

    π = softmax(logits / temperature). Returns logps (B, T), with gradients, and entropies (B, T),
    without; both 0 where masked. The head sees only tokens inside the mask, chunk_size at a time,
    so no tensor has the size B·T·V. With share_prompt each prompt is read once and its keys and
    values are repeated for its G rows; gradients flow back through the repeat. Otherwise, and where
    there is no cache to repeat, each row is read whole, to the same effect.
    """
    lm = model if isinstance(model, CausalLM) else CausalLM(model)
    G, T, mask = rollout.num_generations, rollout.completion_ids.shape[1], rollout.completion_mask
    # transformers drops the cache where layers are computed again in the backward pass
    again = torch.is_grad_enabled() and lm.core.is_activation_checkpointing
    share, parts = share_prompt and lm.takes_cache and not again, []
    for prompt, seen, rows in lm.prompt_batches(rollout.prompt_ids, rollout.prompt_mask, G, share):
        inputs = rollout.completion_ids[rows, : T - 1]  # the last token predicts nothing here
        all_seen = pad(seen.repeat_interleave(G, dim=0), (0, T - 1), value=True)  # causal
        if share:  # prompts are left-padded: the last state of each is real
            cache = lm.new_cache()
            hidden = lm.hidden(prompt, seen, cache)[:, -1:].repeat_interleave(G, dim=0)
            if T > 1:
                cache.batch_repeat_interleave(G)
                hidden = torch.cat([hidden, lm.hidden(inputs, all_seen, cache)], dim=1)
        else:
            whole = torch.cat([prompt.repeat_interleave(G, dim=0), inputs], dim=1)
            hidden = lm.hidden(whole, all_seen)[:, prompt.shape[1] - 1 :]
        # hidden (b, T, H) is the state before each token, which predicts that token
        parts.append(hidden[mask[rows]])
    states, targets = torch.cat(parts), rollout.completion_ids[mask]  # (n, H), (n,)
    logps, entropies = lm.token_logps(states, targets, temperature, chunk_size)  # (n,), (n,)
    blank = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
    return blank.masked_scatter(mask, logps), blank.masked_scatter(mask, entropies)


# -------------------------------------------------------------------- the model, seen as two parts


class CausalLM:
    """A causal language model in two parts: `hidden` maps tokens to hidden states, `logits` these
    to logits.

    Every family has its own head: soft-capping in Gemma 2, a scale in Cohere, and so on. So
    `logits` runs the model's own forward, in which the decoder returns the hidden states given. No
    family needs a case of its own. Raises ValueError for models that this cannot be right for.
    """

    drop_below = 1.0  # ended rows leave a batch when less than this share of it goes on

    def __init__(self, model: Any) -> None:
        wrapped = hasattr(model, "get_base_model")  # a peft.PeftModel
        core = model.get_base_model() if wrapped else model
        self.core: Any = getattr(core, "_orig_mod", core)  # of a model that torch.compile wraps
        check_causal(self.core, getattr(model, "peft_config", {}))
        # get_decoder is wrong for Llama 4 and ModernBERT: take the child that holds the embeddings
        embeddings = self.core.get_input_embeddings()
        parts = [m for m in (self.core.get_decoder(), *self.core.children()) if m is not self.core]
        self.decoder: Any = next(part for part in parts if embeddings in part.modules())
        accepted = inspect.signature(self.decoder.forward).parameters
        own = any(hasattr(m, "create_position_ids_from_input_ids") for m in self.decoder.modules())
        self.takes_positions = "position_ids" in accepted and not own  # RoBERTa's have an offset
        names = ("cache", "past_key_values")  # transformers from 5.24, and before
        self.cache_name = next((name for name in names if name in accepted), "")
        self.takes_cache = bool(self.cache_name) and not getattr(self.core, "_is_stateful", False)
        if self.takes_cache:  # keys and values can be repeated and dropped by row, other states not
            kinds = {type(layer) for layer in DynamicCache(config=self.core.config).layers}
            self.takes_cache = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}

    def prompt_batches(
        self, ids: Tensor, mask: Tensor, G: int, together: bool = True
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Prompts (p, L) that go through the model at once, their mask, and their p·G rows.

        All, or each alone where left padding is unsafe: where the model counts it as positions, or
        runs a recurrent state through it, or is eager attention in float64 (NaN).
        """
        if not mask.numel() or not mask[:, -1].all():
            raise ValueError("prompt_mask: a prompt is empty, or not padded on the left")
        kind = self.core.config._attn_implementation, self.core.dtype
        safe = self.takes_cache and self.takes_positions and kind != ("eager", torch.float64)
        size = len(ids) if together and safe else 1
        for p in range(0, len(ids), size):
            used = mask[p : p + size].any(dim=0)
            prompt, seen = ids[p : p + size, used], mask[p : p + size, used].bool()
            yield prompt, seen, slice(p * G, (p + size) * G)

    def new_cache(self, room: int = 0) -> DynamicCache:
        """For keys and values, of the model's own kinds. room: tokens that it will grow by."""
        return DynamicCache(config=self.core.config)

    def hidden(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, H). mask: (B, past + t), False in left padding.
        Positions are counted over it: with left padding they would otherwise start too late."""
        kwargs: dict[str, Any] = {"use_cache": cache is not None, "attention_mask": mask.long()}
        if cache is not None:
            kwargs[self.cache_name] = cache
        if self.takes_positions:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, -ids.shape[1] :]
        return self.decoder(input_ids=ids, **kwargs)[0].to(ids.device)  # from the last of several

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V), by the model's own head, whatever that does; at least float32."""
        decoder = Mock(return_value=_DecoderOutput(hidden.unsqueeze(0)))
        called = "_compiled_call_impl"  # in place of forward and hooks; a compiled module has it
        with patch.object(self.decoder, called, decoder), patch.object(self.core, called, None):
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            result = self.core(input_ids=ids, use_cache=False)
        if not decoder.called:
            raise ValueError(f"{type(self.core).__name__} calls no {type(self.decoder).__name__}")
        logits = result.logits.squeeze(0)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def next_logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """Of the token after the last one: ids (B, t) -> (B, V). mask, cache: as for hidden."""
        return self.logits(self.hidden(ids, mask, cache)[:, -1])

    def token_logps(
        self, hidden: Tensor, targets: Tensor, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of targets (n,) and entropies, (n,) each, from hidden states (n, H). A chunk's
        logits are not kept for the backward pass: they are computed again there."""

        def of_chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            log_probs = (self.logits(h) / temperature).log_softmax(dim=-1)  # (chunk, V)
            entropy = torch.special.entr(log_probs.detach().exp()).sum(dim=-1)
            return log_probs.gather(1, y.unsqueeze(1)).squeeze(1), entropy

        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        parts = [checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in chunks]
        logps, entropies = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies)


class _DecoderOutput(transformers.modeling_outputs.BaseModelOutput):
    """A decoder's output, by position or by name. All but the hidden states are None."""

    def __getattr__(self, name: str) -> None:
        return None


def check_causal(core: Any, peft_config: dict[str, Any]) -> None:
    """Raises ValueError for a model whose tokens see later ones, or that acts outside its core."""
    config, problem = core.config, ""
    bert = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING or "bert" in config.model_type
    if bert and getattr(config, "is_decoder", True) is False:
        problem = "is an encoder, whose tokens see later ones"
    if getattr(config, "is_encoder_decoder", False):
        problem = "is an encoder-decoder"
    if getattr(config.get_text_config(), "use_bidirectional_attention", False) in (True, "all"):
        problem = "attends to later tokens"
    if not core.can_generate():
        problem = "has no head for the next token: load it by AutoModelForCausalLM"
    if problem:
        raise ValueError(f"{type(core).__name__} {problem}; a causal decoder is needed")
    for name in (n for n, adapter in peft_config.items() if adapter.is_prompt_learning):
        raise ValueError(f"peft adapter {name!r} adds virtual tokens outside the inner model")


# ------------------------------------------------------------------------------------------- data


def encode_prompt(
    prompt: Any, tokenizer: Any, system_prompt: str | None = None, **chat_template_kwargs: Any
) -> list[int]:
    """Token ids: of messages by the chat template; of text as it is, unless a system prompt makes
    it a chat. At most one BOS, and no EOS that nobody wrote. Raises ValueError for what is neither.
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_text = lambda message, key: isinstance(message, dict) and isinstance(message.get(key), str)
    right = isinstance(chat, list) and all(is_text(m, k) for m in chat for k in ("role", "content"))
    if not right or not prompt:
        raise ValueError("'prompt' must be text or a list of messages with 'role' and 'content'")
    if isinstance(prompt, str) and system_prompt is None:
        plain = tokenizer(prompt, add_special_tokens=False).input_ids
        if not plain or plain[0] == tokenizer.bos_token_id:
            return plain
        ids = tokenizer(prompt).input_ids
        return ids[: ids.index(plain[0]) + len(plain)]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the prompt is a chat, and the tokenizer has no chat template; use text")
    if system_prompt is not None:
        chat = [{"role": "system", "content": system_prompt}, *chat]
    begun = chat[-1]["role"] == "assistant"  # an answer begun in the data is continued
    if begun:
        warnings.warn("a prompt ends with an assistant's message: it is continued", stacklevel=2)
    options = {"add_generation_prompt": not begun, "continue_final_message": begun}
    return tokenizer.apply_chat_template(chat, return_dict=False, **chat_template_kwargs | options)


def check_dataset(
    rows: Rows, reward_funcs: Sequence[Any], encode: Any, room: float, vocabulary: int
) -> None:
    """Raises ValueError for the first row whose prompt or columns cannot be used."""
    if isinstance(rows, dict) or not hasattr(rows, "__len__") or hasattr(rows, "iloc"):
        how = "json.loads(frame.to_json(orient='records')), one split of a DatasetDict, list(rows)"
        raise ValueError(f"the data set is a {type(rows).__name__}: must be rows, as {how}")
    if not len(rows):
        raise ValueError("the data set is empty")
    for i in range(len(rows)):
        row = rows[i]
        where = getattr(row, "origin", f"dataset row {i}")  # a file and line, if known
        with naming(where, Exception):  # a chat template is a program, and may raise anything
            if "prompt" not in row:
                has = f"the row has {', '.join(row) or 'no column'}"
                raise ValueError(f"'prompt' is missing (--prompt_column names another); {has}")
            for name in {"tools", "image", "images", "environment"} & row.keys():
                raise ValueError(f"column {name!r} has a meaning in TRL and none here: drop it")
            ids = encode(row)
            if not 0 < len(ids) <= room:
                raise ValueError(f"the prompt has {len(ids)} tokens; 1 to {max(0, room):g} fit in")
            if max(ids) >= vocabulary:
                raise ValueError(f"token {max(ids)} is beyond the model's {vocabulary} embeddings")
            for function in reward_funcs:
                check_row(function, row)


# -------------------------------------------------------------------------------------- processes


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """`value` of every process, by rank."""
    parts = [value] * rank_and_world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, value)
    return parts


if __name__ == "__main__":
    if not (Path(__file__).parent / "runner").is_dir():
        sys.exit("error: the command line lives in runner/, beside this file; or use GRPOTrainer")
    from runner.cli import main

    sys.exit(main())
