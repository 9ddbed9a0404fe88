# library: ms-swift
# file: swift/rlhf_trainers/grpo_trainer.py
"""ms-swift's compute_advantages and the loss of its GRPOTrainer (loss_type grpo, its default)."""

import sys
import types

import torch

from checks.alone import Stub, load_alone

ns = types.SimpleNamespace

places = ("trl", "trl.models", "trl.trainer", "trl.trainer.grpo_trainer", "trl.trainer.utils")
for name in places:  # TRL is a stub, for swift deletes methods of TRL's trainer
    sys.modules[name] = Stub()
swift = load_alone("swift", "rlhf_trainers/grpo_trainer.py")
for name in places:
    del sys.modules[name]
advantage = load_alone("swift", "rl_core/advantage.py")


def group_advantages(rewards):
    one, G = torch.ones(1), rewards.shape[1]
    return advantage.compute_advantages(rewards.view(-1, 1), one, G)[0].view(-1, G)


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    me = swift.GRPOTrainer.__new__(swift.GRPOTrainer)
    me.model, me.args = ns(training=False), ns(delta=None)
    me.accelerator = ns(gather_for_metrics=lambda x: x)
    me._get_per_token_logps_and_entropies = lambda *a, **k: (logps, None)
    me.compute_entropy = me.overlong_filter = me.kl_in_reward = me._has_teacher = False
    me.log_rollout_offpolicy_metrics = me.disable_rollout_importance_sampling = False
    me.rollout_importance_sampling_mode = me.off_policy_sequence_mask_delta = None
    me.importance_sampling_level, me.loss_type, me.sdar_loss_coef = "token", "grpo", 0.0
    me.beta, me.epsilon_low, me.epsilon_high = beta, 0.2, 0.2
    batch = ns(
        completion_mask=mask, truncated_mask=~mask.any(1), rollout_per_token_logps=None,
        advantages=advantages.unsqueeze(1).expand_as(logps), old_per_token_logps=old_logps,
        ref_per_token_logps=ref_logps,
    )  # fmt: skip
    return me._compute_loss_and_metrics(None, {}, batch)[0]


def kl_penalty(logps, ref_logps):  # token by token: the loss where A is 0 and beta is 1
    no_A, one = torch.zeros(1), torch.ones(1, 1, dtype=torch.bool)
    pairs = zip(logps.view(-1, 1, 1), ref_logps.view(-1, 1, 1), strict=True)
    return torch.stack([grpo_loss(x, x, no_A, one, ref, 1.0) for x, ref in pairs]).view_as(logps)
