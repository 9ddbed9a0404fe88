# library: liger-kernel
# file: liger_kernel/chunked_loss/grpo_loss.py
"""Liger's GRPO loss at its default, loss_type="dapo", and its k3: the loss from the log-probs on."""

import torch._dynamo.config  # noqa: F401  (before anything is a stub)

from checks.alone import load_alone

base = load_alone("liger_kernel", "chunked_loss/fused_linear_ppo.py")
liger = load_alone(
    "liger_kernel", "chunked_loss/grpo_loss.py", liger_kernel__chunked_loss__fused_linear_ppo=base
)


def kl_penalty(logps, ref_logps):
    return liger.k3_loss_fn(ref_logps, logps)


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    loss, _ = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logps, mask.int(), advantages, mask.int(), ref_logps, old_logps, beta=beta
    )
    return loss
