# library: torchrl
# file: torchrl/objectives/llm/grpo.py
"""TorchRL's GRPOLoss.forward at its defaults, with a dict for a TensorDict, and MCAdvantage."""

# note: equal rewards in float32: seven rewards of 5.3 have a mean that is off by 5e-7, and the std is held at 1e-6 or more, so A is 0.48 for all (grpo.py:1583); apparent defect, not found reported. keep_return_bounds can drop such groups.
# note: the KL penalty is k3, but its mean is over all positions, padding included (grpo.py:915): with three padded columns beside one token it is a quarter; apparent defect, not found reported.
# note: the group of one that the kit warns of cannot occur: with trajectory_return the constructor wants grpo_size >= 2.

import functools
import types

import torch

from checks.alone import Stub, load_alone


class Data(dict):
    """What GRPOLoss and MCAdvantage use of a TensorDict."""

    set = dict.__setitem__
    get = lambda self, key, default=None, **padding: dict.get(self, key, default)
    copy = lambda self: Data(self)
    select = lambda self, *keys, **strict: self


tensordict = Stub(
    TensorClass={"nocast": object}, is_tensor_collection=lambda x: False,
    TensorDict=lambda data, batch_size=None: Data(data),
)  # fmt: skip
expand = lambda m, x: m.reshape(m.shape + (1,) * (x.ndim - m.ndim)).expand(x.shape)
common = load_alone(
    "torchrl", "objectives/common.py", tensordict__nn=Stub(TensorDictModuleBase=object)
)
llm = load_alone(
    "torchrl", "objectives/llm/grpo.py", torchrl__objectives__common=common, tensordict=tensordict,
    tensordict__utils=Stub(expand_as_right=expand),
    torchrl__envs__transforms__transforms=Stub(Transform=object),
)  # fmt: skip


def module(logps, mask, kl_coefficient):
    """A GRPOLoss whose policy gives these log-probs."""
    loss = llm.GRPOLoss.__new__(llm.GRPOLoss)
    vars(loss).update(
        _tensor_keys=llm.GRPOLoss._AcceptedKeys(), aggregation="token_mean", reduction="mean",
        clip_epsilon_low=torch.tensor(0.2), clip_epsilon_high=torch.tensor(0.2),
        kl_mask_threshold=None, kl_to_ref_coeff=kl_coefficient, kl_to_inference_coeff=None,
        entropy_bonus=False, output_type=types.SimpleNamespace(from_tensordict=lambda x: x),
        ref_log_prob_padding_side="left", ref_log_prob_padding_value=0.0, _loss_mask_key=None,
        _get_cur_log_prob=lambda data: (logps, types.SimpleNamespace(mask=mask), False),
    )  # fmt: skip
    return loss


def group_advantages(rewards):
    rows = []
    for row in rewards:
        everyone = Stub(return_value=[*range(len(row))])
        picked = types.SimpleNamespace(in_keys=["return"], select=everyone)
        me = types.SimpleNamespace(
            rewards_key="reward", advantage_key="advantage", trajectory_return="sum",
            grpo_size=len(row), keep_return_bounds=None, verbose=False, candidate_selector=picked,
            selected_trajectories=0, _cat_tensordicts=lambda trajectories, dim: trajectories,
        )  # fmt: skip
        me._trajectory_returns = functools.partial(llm.MCAdvantage._trajectory_returns, me)
        done = llm.MCAdvantage._trajectory_advantage(me, [Data(reward=r.view(1, 1)) for r in row])
        rows.append(torch.cat([trajectory["advantage"].view(1) for trajectory in done]))
    return torch.stack(rows)


def kl_penalty(logps, ref_logps):
    one = lambda x, y: llm.GRPOLoss._kl_to_ref(None, Data(_cur_log_prob=x), ref_log_prob=y, coeff=1)
    pairs = zip(logps.flatten(), ref_logps.flatten(), strict=True)
    return torch.stack([one(x.view(1, 1), y.view(1, 1))[0] for x, y in pairs]).view_as(logps)


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    loss = module(logps, mask, beta or None)
    keys = loss.tensor_keys
    A = advantages.view(-1, 1, 1).expand(*logps.shape, 1)
    data = Data({keys.action: None, keys.sample_log_prob: old_logps, keys.advantage: A})
    data[keys.ref_log_probs] = ref_logps
    out = loss.forward(data)
    return out["loss_objective"] + out.get("loss_kl_to_ref", 0.0)
