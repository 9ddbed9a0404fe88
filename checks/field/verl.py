# library: verl
# file: verl/trainer/ppo/core_algos.py
# note: equal rewards in float32: seven rewards of 5.3 have a mean that is off by 5e-7, a std of 5e-7 and eps is 1e-6, so A is 0.31 for all; rewards of 0 and 1 are exact. Reported in its pull request 4597, which was closed.
"""verl's GRPO advantage, token-mean clipped loss, and low-variance KL."""

import types

import numpy
import torch

from checks.alone import load_alone

sums = types.SimpleNamespace(
    masked_sum=lambda x, m: (x * m).sum(), masked_mean=lambda x, m: (x * m).sum() / m.sum()
)
verl = load_alone("verl", "trainer/ppo/core_algos.py", verl__utils__torch_functional=sums)
config = types.SimpleNamespace(
    clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={},
    get=lambda name, default: default,
)  # fmt: skip


def group_advantages(rewards):
    P, G = rewards.shape
    index, ones = numpy.repeat(numpy.arange(P), G), torch.ones(P * G, 1)
    A, _ = verl.compute_grpo_outcome_advantage(rewards.view(-1, 1), ones, index)
    return A.view(P, G)


def kl_penalty(logps, ref_logps):
    return verl.kl_penalty(logps, ref_logps, "low_var_kl")


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    A = advantages.unsqueeze(1).expand_as(logps)
    loss, _ = verl.compute_policy_loss_vanilla(
        old_logps, logps, A, mask.double(), "token-mean", config
    )
    if beta:
        kl = verl.kl_penalty(logps, ref_logps, "low_var_kl")
        loss = loss + beta * verl.agg_loss(kl, mask.double(), "token-mean")
    return loss
