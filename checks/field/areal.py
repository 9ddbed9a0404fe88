# library: areal
# file: areal/utils/functional/functional.py
"""AReaL's group normalisation of rewards, clipped loss, and k3 (its KL is part of the reward)."""

import types

from checks.alone import load_alone

data = load_alone("areal", "utils/data.py")
areal = load_alone("areal", "utils/functional/functional.py", areal__utils__data=data)


def group_advantages(rewards):
    norm = types.SimpleNamespace(
        mean_level="group", mean_leave1out=False, std_level="group", std_unbiased=True,
        group_size=rewards.shape[1], eps=1e-5,
    )  # fmt: skip
    return data.Normalization(norm)(rewards.view(-1)).view_as(rewards)


def kl_penalty(logps, ref_logps):
    return data.KLEstimator("k3")(logps, ref_logps)


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    A = advantages.unsqueeze(1).expand_as(logps)
    return areal.ppo_actor_loss_fn(logps, old_logps, old_logps, A, eps_clip=0.2, loss_mask=mask)
