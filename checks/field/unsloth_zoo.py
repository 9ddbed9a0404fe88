# library: unsloth-zoo
# file: unsloth_zoo/rl_replacements.py
"""Unsloth's grpo_compute_loss at its default, loss_type="grpo". It caps the k3 in the loss at 10."""

from checks.alone import load_alone

unsloth = load_alone("unsloth_zoo", "rl_replacements.py")


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    return unsloth.grpo_compute_loss(
        ref_logps, logps, old_logps, None, mask.long(), mask.int(), beta, advantages
    )[0]
