# library: trinity-rft
# file: trinity/algorithm/policy_loss_fn/ppo_policy_loss.py
"""Trinity-RFT's GRPO: group advantages, the PPO loss at its defaults, and k2, its default KL loss."""

# note: equal rewards in float32: seven rewards of 5.3 have a mean that is off by 5e-7, a std of 5e-7 and eps is 1e-6, so A is 0.31 for all (grpo_advantage.py:169); rewards of 0 and 1 are exact; apparent defect, not found reported.
# note: a group of one gets its raw reward as advantage (mean 0, std 1); a comment there asks to check this.

import types

import torch

from checks.alone import load_alone

operators = types.SimpleNamespace(ExperienceOperator=object)
utils = load_alone("trinity", "algorithm/utils.py")
keys = load_alone("trinity", "algorithm/key_mapper.py")
advantage_base = load_alone(
    "trinity", "algorithm/advantage_fn/advantage_fn.py", trinity__buffer__operators=operators
)
grpo = load_alone(
    "trinity", "algorithm/advantage_fn/grpo_advantage.py",
    trinity__algorithm__advantage_fn__advantage_fn=advantage_base,
)  # fmt: skip
loss_base = load_alone(
    "trinity", "algorithm/policy_loss_fn/policy_loss_fn.py", trinity__algorithm__key_mapper=keys
)
ppo = load_alone(
    "trinity", "algorithm/policy_loss_fn/ppo_policy_loss.py", trinity__algorithm__utils=utils,
    trinity__algorithm__policy_loss_fn__policy_loss_fn=loss_base,
)  # fmt: skip
kl = load_alone("trinity", "algorithm/kl_fn/kl_fn.py", trinity__algorithm__utils=utils)
policy_loss = ppo.PPOPolicyLossFn(**ppo.PPOPolicyLossFn.default_args())


def group_advantages(rewards):
    method = grpo.GRPOGroupedAdvantage(**grpo.GRPOGroupedAdvantage.default_args())
    rows = []
    for row in rewards.tolist():
        exps = [types.SimpleNamespace(reward=r, action_mask=torch.ones(1)) for r in row]
        exps, _ = method.calculate_group_advantage("group", exps)
        rows.append(torch.cat([exp.advantages for exp in exps]))
    return torch.stack(rows)


def kl_penalty(logps, ref_logps):
    return kl.K2Fn().calculate_kl(logps, ref_logps)


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    A = advantages.unsqueeze(1).expand_as(logps)
    loss, _ = policy_loss(logps, old_logprob=old_logps, action_mask=mask, advantages=A)
    if beta:
        penalty, _ = kl.K2Fn(kl_coef=beta).calculate_kl_loss(logps, ref_logps, mask, "token-mean")
        loss = loss + penalty
    return loss
