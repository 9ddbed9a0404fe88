# library: torchtune
# file: torchtune/rlhf/loss/ppo.py
"""torchtune's stop-token mask, PPO policy loss and KL, and LoRALinear. Its GRPO losses and their
advantages (torchtune.dev.grpo, recipes/dev) are not in the package or not functions."""

# note: its PPOLoss takes no KL: in PPO that is in the rewards.

import sys
import types

import torch

from checks.alone import Stub, load_alone

sys.modules.setdefault("torchao.dtypes.nf4tensor", Stub())  # for quantised weights; moved since
rewards = load_alone("torchtune", "rlhf/rewards.py")
sequences = load_alone("torchtune", "rlhf/sequence_processing.py")
ppo = load_alone("torchtune", "rlhf/loss/ppo.py", torchtune=types.SimpleNamespace(rlhf=rewards))
peft = load_alone("torchtune", "modules/peft/_utils.py")
lora = load_alone("torchtune", "modules/peft/lora.py", torchtune__modules__peft=peft)


def completion_mask(completion_ids, eos_token_ids):
    stops = torch.tensor(eos_token_ids)
    return ~sequences.truncate_sequence_at_first_stop_token(completion_ids, stops)[0]


def kl_penalty(logps, ref_logps):
    return rewards.get_rewards_ppo(torch.zeros_like(logps[:, 0]), logps, ref_logps, 1.0)[1]


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    A, zero = advantages.unsqueeze(1).expand_as(logps), torch.zeros_like(logps)
    return ppo.PPOLoss()(old_logps, logps, A, zero, zero, zero, mask, mask)[0]


def lora_linear(base, r, alpha):
    layer = lora.LoRALinear(base.in_features, base.out_features, r, alpha, use_bias=True)
    layer.weight, layer.bias = base.weight, base.bias
    peft.set_trainable_params(layer, peft.get_adapter_params(layer))
    return layer
