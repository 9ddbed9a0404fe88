"""The losses that TRL lacks are verl's, in value and gradient.

verl's file of formulas is loaded alone, without what the rest of verl needs:

    pip install --no-deps verl==0.9.1
"""

import importlib.util
import types
from typing import ClassVar

import numpy
import pytest
import torch

from checks.alone import load_alone
from grpo_lora import group_advantages, grpo_loss
from test_math import batch, gradient


@pytest.fixture(scope="module")
def verl():
    """verl/trainer/ppo/core_algos.py. Its imports are stubs, but for two sums over a mask."""
    masked_sum = lambda x, mask: torch.where(mask.bool(), x, 0.0).sum()
    mean = lambda x, mask: masked_sum(x, mask) / mask.sum()
    sums = types.SimpleNamespace(masked_sum=masked_sum, masked_mean=mean)
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    return load_alone("verl", "trainer/ppo/core_algos.py", verl__utils__torch_functional=sums)


class Config(types.SimpleNamespace):
    """As much of verl's ActorConfig as its formulas ask for."""

    global_batch_info: ClassVar[dict] = {}

    def get(self, name, default):
        return getattr(self, name, default)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize(
    ("loss_type", "function"), [("dppo", "dppo_tv"), ("gmpo", "geo_mean"), ("opmd", "dro")]
)
def test_loss_and_gradient_are_verls(verl, loss_type, function, spread, seed):
    logps, old, A, mask, _ = batch(seed, B=6, spread=spread)
    rows = mask.any(dim=1)  # for a row without tokens verl divides 0 by 1e-8 and counts it
    logps, old, A, mask = logps[rows].detach().requires_grad_(), old[rows], A[rows], mask[rows]
    config = Config(
        clip_ratio=0.2, clip_ratio_low=0.15, clip_ratio_high=0.3,
        policy_loss=types.SimpleNamespace(dro_beta=0.7),
    )  # fmt: skip
    theirs, _ = getattr(verl, f"compute_policy_loss_{function}")(
        old, logps, A.unsqueeze(1).expand_as(logps), mask.double(), "token-mean", config
    )
    sizes = {"epsilon": 0.15, "epsilon_high": 0.3, "opmd_tau": 0.7}
    ours, _ = grpo_loss(logps, old, A, mask, loss_type=loss_type, **sizes)
    near = 3e-8 if function == "geo_mean" else 1e-14  # geo_mean has 1e-8 in its divisor
    torch.testing.assert_close(ours, theirs, atol=near, rtol=near)
    slopes = gradient(ours, logps), gradient(theirs, logps)
    torch.testing.assert_close(*slopes, atol=near, rtol=near)


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_verls(verl, seed):
    rewards = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).double()
    index = numpy.array([str(i // 5) for i in range(20)])
    ones = torch.ones(20, 1).double()
    theirs, _ = verl.compute_rloo_outcome_advantage(rewards.view(-1, 1), ones, index)
    ours = group_advantages(rewards, scale="leave_one_out")
    torch.testing.assert_close(ours.view(-1, 1), theirs)
