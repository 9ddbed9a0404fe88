# library: agilerl
# file: agilerl/algorithms/grpo.py
"""AgileRL's GRPO: adv_norm="mean_std", its standard loss without the off-policy masks, and k3."""

# note: group_advantages is with adv_norm="mean_std"; its default, "mean_only", divides by nothing and is not affected.
# note: equal rewards in float32: seven rewards of 0.1 have a std of about 8e-9 and eps is 1e-8, so A is -0.41 for all (grpo.py:1764); apparent defect, not found reported.
# note: the group of one that the kit warns of cannot occur: the constructor wants group_size >= 2.
# note: the off-policy masks, on by default, are off here, so that the loss underneath can be recognised.

import collections
import types

import torch.distributed.tensor  # noqa: F401  (before anything is a stub)

from checks.alone import Stub, load_alone

flags = Stub(HAS_LIGER_KERNEL=False, HAS_LLM_DEPENDENCIES=False)
core = Stub(LLMAlgorithm=collections.defaultdict(lambda: object))
utils = load_alone("agilerl", "utils/llm_utils.py", agilerl=flags)
agile = load_alone(
    "agilerl", "algorithms/grpo.py", agilerl=flags, agilerl__algorithms__core=core,
    agilerl__utils__llm_utils=utils,
)  # fmt: skip


def algorithm(**settings):
    """A GRPO without a model, at its defaults but for the off-policy masks and these settings."""
    grpo = agile.GRPO.__new__(agile.GRPO)
    vars(grpo).update(
        clip_coef_min=0.8, clip_coef_max=1.2, beta=0.0, loss_norm="accumulation_window",
        importance_sampling_level="token", use_kl_advantage_shaping=False, kl_clamp=10.0,
        use_bias_correction_kl=True, off_policy_token_mask_bounds=None,
        off_policy_sequence_mask_threshold=None, gradient_accumulation_steps=1,
        _segment_accumulation_steps=None,
    )  # fmt: skip
    vars(grpo).update(settings)
    return grpo


def group_advantages(rewards):
    me = types.SimpleNamespace(group_size=rewards.shape[1], adv_norm="mean_std")
    return agile.GRPO._calculate_advantage(me, rewards).view_as(rewards)


def kl_penalty(logps, ref_logps):
    return utils.calculate_k3_kl(ref_logps, logps)


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    grpo = algorithm(beta=beta, _window_action_tokens=max(1.0, float(mask.sum())))
    ref = logps.detach() if ref_logps is None else ref_logps
    return grpo._grpo_loss_standard(mask, logps, old_logps, ref, advantages.unsqueeze(1))[0]
