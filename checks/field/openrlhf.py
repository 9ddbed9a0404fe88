# library: openrlhf
# file: openrlhf/models/loss.py
# note: equal rewards in float32, as [0.9] * 3: mean() is one rounding off and std() about as small, so that with eps 1e-9 (experience_maker.py, line 274) A is up to 0.98 instead of 0, of one sign for the whole group (seen on a CPU; rewards 0, 1 or 0.5 are exact and do no harm; eps 1e-4 would do); apparent defect, not found reported
"""OpenRLHF's advantage estimator group_norm, PolicyLoss, and k3 as a loss."""

import types

import torch

from checks.alone import load_alone

utils = load_alone("openrlhf", "models/utils.py")
losses = load_alone("openrlhf", "models/loss.py", openrlhf__models__utils=utils)
file = "trainer/ppo_utils/experience_maker.py"
Maker = load_alone("openrlhf", file, openrlhf__models__utils=utils).RemoteExperienceMaker


def group_advantages(rewards):
    N, G, ns = rewards.numel(), rewards.shape[1], types.SimpleNamespace
    args = ns(
        rollout=ns(n_samples_per_prompt=G), reward=ns(clip_range=None),
        algo=ns(advantage=ns(estimator="group_norm", gamma=1.0)),
    )  # fmt: skip
    me = ns(
        strategy=ns(args=args), advantage_estimator="group_norm", kl_ctl=ns(value=0.0),
        get_cumulative_returns=lambda *a: Maker.get_cumulative_returns(None, *a),
    )  # fmt: skip
    batch = ns(
        rewards=rewards.view(-1), index=list(range(N)), info={},
        kl=torch.zeros(N, 1).to(rewards), action_mask=torch.ones(N, 1, dtype=torch.bool),
    )  # fmt: skip
    Maker.compute_advantages_and_returns(me, [batch])
    return batch.advantages.view(-1, G)


def kl_penalty(logps, ref_logps):
    return utils.compute_approx_kl(logps, ref_logps, kl_estimator="k3")


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    loss = losses.PolicyLoss()(logps, old_logps, advantages.unsqueeze(1), mask)[0]
    if beta:
        kl = utils.compute_approx_kl(logps, ref_logps, old_logps, kl_estimator="k3")
        loss = loss + beta * losses.aggregate_loss(kl, mask)
    return loss
