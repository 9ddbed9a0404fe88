"""The truths of the formulas: what each computes, its gradient, and what does not change it.

one group in numbers   the README's example, from rewards to gradients, to four digits
advantages             mean, std, shift and scale; equal and missing rewards; several functions
mask                   it ends with the first EOS, whatever the padding is
KL                     the three estimators, their gradients, and what masks them
the policy loss        each surrogate, ratio and aggregation: by hand, and by finite differences
exact enumeration      what the loss does on average, from all samples of a policy that is tiny
drawing a token        each has its share of [0, 1), and one of probability zero has none
LoRA, one layer        y = W x + s·B A x in every kind; off, merged, its start and its gradients
rewards                answers are equal exactly when they mean the same; each reward by hand

Exact statements are checked in float64. What needs whole models is in test_training.py. The
gallery in checks/ puts known bugs back in, and expects these tests to fail.
"""

import copy
import inspect
import itertools
import math
import os
import time
import types
from fractions import Fraction

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import grpo_lora
from grpo_lora import (
    AGGREGATION,
    VARIANTS,
    GRPOConfig,
    completion_mask,
    draw_tokens,
    group_advantages,
    grpo_loss,
    kl_penalty,
    multi_objective_advantages,
    sampler_weights,
)
from lora import LoRAConfig, LoRALinear, apply_lora, lora_disabled, lora_merged, param_groups
from rewards import REWARDS, accuracy_reward, answers_match, canonical_answer, extract_answer

for profile, phases in (
    ("default", tuple(hypothesis.Phase)),
    ("gallery", (hypothesis.Phase.explicit, hypothesis.Phase.generate)),
):
    seeded = bool(os.environ.get("CI")) or profile == "gallery"
    settings.register_profile(
        profile, deadline=None, derandomize=seeded, phases=phases, database=None, max_examples=60
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # tiny tensors only get slower with more
LOSSES = list(AGGREGATION)
CLIPPED = ["grpo", "dapo", "bnpo", "dr_grpo", "luspo"]


def setting_of(loss_type: str, **more) -> dict:
    """The settings without which a loss type is refused."""
    needed = {"cispo": {"epsilon_high": 5.0}, "dr_grpo": {"max_completion_length": 7}}
    return {"loss_type": loss_type} | needed.get(loss_type, {}) | more


def batch(seed: int = 0, B: int = 4, T: int = 5, spread: float = 0.1):
    """Random (logps, old_logps, advantages, mask, ref_logps) in float64; rows of different lengths,
    one of them empty."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    old = logps + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    ref = logps + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    lengths = torch.cat([torch.tensor([0]), torch.randint(1, T + 1, (B - 1,), generator=g)])
    mask = torch.arange(T) < lengths.unsqueeze(1)
    return logps.requires_grad_(), old, torch.randn(B, generator=g, dtype=torch.float64), mask, ref


def gradient(loss: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, inputs)[0]


# ----------------------------------------------------------------------------- one group in numbers


def test_the_worked_example_of_the_readme():
    """2 + 2 = ? Four completions, two of them right: their rewards, advantages, ratios, loss and
    gradients. All tokens are counted, the end of each completion too."""
    words = ["<pad>", "<end>", "#### 4", "#### 5", " or 6"]
    ids = torch.tensor([[2, 1, 0], [3, 4, 1], [1, 0, 0], [2, 1, 0]])  # (B, T): right-padded
    mask = completion_mask(ids, [1])
    assert mask.sum(dim=1).tolist() == [2, 3, 1, 2]  # N = 8 tokens in all
    texts = ["".join(words[i] for i in row if i > 1) for row in ids.tolist()]
    rewards = accuracy_reward(None, texts, ["4"] * 4)
    assert texts == ["#### 4", "#### 5 or 6", "", "#### 4"] and rewards == [1, 0, 0, 1]

    rewards = torch.tensor([rewards], dtype=torch.float64)  # one group of four
    assert rewards.mean() == 0.5 and rewards.std().item() == pytest.approx(0.5774, abs=5e-5)
    A = group_advantages(rewards).flatten()  # ±0.5 / (0.57735 + 0.0001)
    good, bad = 0.8659, -0.8659
    assert A.tolist() == pytest.approx([good, bad, bad, good], abs=5e-5)

    # The first update: the policy is the one that sampled, so every ratio is 1. The gradient of
    # each token's log-prob is -A/N: a step raises the good completions and lowers the bad ones.
    old = torch.full((4, 3), 0.5, dtype=torch.float64).log()  # each token had probability 1/2
    logps = old.clone().requires_grad_()
    loss, _ = grpo_loss(logps, old, A, mask, loss_type="dapo")
    up, down = -0.1082, 0.1082  # -A/8
    first = [[up, up, 0], [down, down, down], [down, 0, 0], [up, up, 0]]
    assert gradient(loss, logps).tolist() == [pytest.approx(row, abs=5e-5) for row in first]
    assert abs(loss.item()) < 1e-12  # good and bad have four tokens each; yet it learns

    # After a step, two tokens have probability 0.65, so their ratio is 1.3. With epsilon 0.2 that
    # is too far for the good one, which gets no gradient, and not for the bad one.
    logps = torch.where(torch.tensor([[True, False, False]] * 2 + [[False] * 3] * 2), 0.65, 0.5)
    logps = logps.double().log().requires_grad_()
    loss, stats = grpo_loss(logps, old, A, mask, loss_type="dapo", epsilon=0.2)
    second = [[0, up, 0], [0.1407, down, down], [down, 0, 0], [up, up, 0]]  # 1.3 · 0.8659 / 8
    assert gradient(loss, logps).tolist() == [pytest.approx(row, abs=5e-5) for row in second]
    # -(1.2 + 1 - 1.3 - 1 - 1 - 1 + 1 + 1) · 0.8659 / 8
    assert loss.item() == pytest.approx(0.0108, abs=5e-5)
    assert stats["clip_ratio/region_mean"] == 1 / 8  # one token of eight was clipped


# --------------------------------------------------------------------------------------- advantages

groups = st.integers(1, 4).flatmap(
    lambda p: st.integers(2, 6).flatmap(
        lambda g: st.lists(
            st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=g, max_size=g),
            min_size=p,
            max_size=p,
        )
    )
)


@given(groups)
def test_advantages_have_mean_zero_and_std_s_over_s_plus_eps(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(rewards)
    std = rewards.std(dim=1)  # ddof 1
    assert advantages.mean(dim=1).abs().max() < 1e-9
    torch.testing.assert_close(advantages.std(dim=1), std / (std + 1e-4), atol=1e-9, rtol=1e-9)


@given(groups, st.floats(-50, 50), st.floats(0.1, 10))
def test_advantages_ignore_a_shift_and_at_eps_zero_a_scale_of_the_rewards(rewards, shift, scale):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages(rewards + shift), group_advantages(rewards), atol=1e-6, rtol=1e-6
    )
    scaled = group_advantages(rewards * scale, eps=0.0)
    torch.testing.assert_close(scaled, group_advantages(rewards, eps=0.0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", grpo_lora.SCALES)
@given(value=st.floats(-1e6, 1e6), G=st.integers(2, 9), eps=st.sampled_from([0.0, 1e-8, 1e-4]))
def test_equal_rewards_give_exactly_zero(scale, value, G, eps):
    # a mean of equal floats can be off by an ulp
    rewards = torch.tensor([[value] * G, [*range(G)]], dtype=torch.float32)
    assert (group_advantages(rewards, scale=scale, eps=eps)[0] == 0).all()
    assert (group_advantages(rewards[:1], scale=scale, eps=eps) == 0).all()


def test_batch_scale_divides_by_the_std_of_all_rewards_plus_eps():
    rewards = torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    want = torch.tensor([[-0.5, 0.5], [-1.5, 1.5]], dtype=torch.float64) / (math.sqrt(14 / 3) + 0.5)
    torch.testing.assert_close(group_advantages(rewards, scale="batch", eps=0.5), want)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]], dtype=torch.float64)
    std = torch.tensor([[1 / 3], [1.0]], dtype=torch.float64).sqrt()
    torch.testing.assert_close(group_advantages(rewards, eps=0.0), centred / std)
    torch.testing.assert_close(
        group_advantages(rewards, scale="batch", eps=0.0), centred / rewards.std()
    )
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centred)
    by_mean, of_others = centred / rewards.mean(1, keepdim=True), centred * 4 / 3
    torch.testing.assert_close(group_advantages(rewards, scale="mean"), by_mean)
    torch.testing.assert_close(group_advantages(rewards, scale="leave_one_out"), of_others)
    torch.testing.assert_close(group_advantages(rewards.long()), group_advantages(rewards).float())
    with pytest.raises(ValueError, match="scale"):
        group_advantages(rewards, scale="std")
    with pytest.raises(ValueError, match="shape"):
        group_advantages(rewards[0])


def test_max_rl_divides_by_no_negative_mean():
    rewards = torch.tensor([[1.0, -1, -1, -1], [1.0, -1, 1, -1], [1.0, 0, 0, 0]])
    right = torch.tensor([[0.0] * 4, [0.0] * 4, [3.0, -1, -1, -1]])
    assert torch.equal(group_advantages(rewards, scale="mean"), right)


@given(groups, st.randoms(use_true_random=False))
def test_a_missing_reward_leaves_the_statistics_and_gets_zero(rewards, random):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    for row in rewards:
        row[random.randrange(len(row))] = math.nan
    for scale in grpo_lora.SCALES:
        advantages = group_advantages(rewards, scale=scale)
        assert (advantages[rewards.isnan()] == 0).all() and not advantages.isnan().any()
        for row, got in zip(rewards, advantages, strict=True) if scale != "batch" else ():
            valid = row[~row.isnan()].unsqueeze(0)  # alone a reward has nothing to compare with
            want = group_advantages(valid, scale=scale)[0] * (valid.shape[1] > 1)
            torch.testing.assert_close(got[~row.isnan()], want)
    assert not group_advantages(torch.full((1, 3), math.nan)).any()


def test_several_rewards_are_weighted_once_and_none_is_not_zero():
    nan = math.nan
    rewards = torch.tensor([[[1.0, 10.0], [0.0, nan], [nan, nan], [1.0, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    total = torch.tensor([[6.0, 0.0, nan, 1.0]], dtype=torch.float64)
    for options in [{}, {"eps": 0.5}, *({"scale": scale} for scale in grpo_lora.SCALES)]:
        got = multi_objective_advantages(rewards, weights, **options)
        torch.testing.assert_close(got, group_advantages(total, **options))
    # normalize_then_sum: first within each
    for eps in (1e-4, 0.5):
        each = torch.stack([group_advantages(r, eps=eps)[0] for r in rewards.unbind(-1)])
        summed = (each * weights.unsqueeze(1)).sum(0)[[0, 1, 3]]
        options = {"aggregation": "normalize_then_sum", "eps": eps}
        got = multi_objective_advantages(rewards, weights, **options)
        want = (summed - summed.mean()) / (summed.std() + eps)
        torch.testing.assert_close(got[0, [0, 1, 3]], want)
        assert got[0, 2] == 0
    # a group of equal rewards is left out of what the batch's mean would make of it
    more = torch.cat([rewards, torch.full_like(rewards, 0.3)])
    got = multi_objective_advantages(more, weights, aggregation="normalize_then_sum")
    assert got[0].any() and not got[1].any()
    with pytest.raises(ValueError, match="aggregation: 'sum' is unknown"):
        multi_objective_advantages(rewards, weights, aggregation="sum")


# --------------------------------------------------------------------------------------------- mask


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=4),
    st.sets(st.integers(0, 5)),
)
def test_mask_ends_with_the_first_eos_whatever_the_padding(rows, eos):
    width = max(map(len, rows))
    for pad in (0, 5, *eos):  # padding may be an EOS itself
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = completion_mask(ids, sorted(eos))
        for row, got in zip(ids.tolist(), mask.tolist(), strict=True):
            first = next((i for i, token in enumerate(row) if token in eos), width)
            assert got == [i <= first for i in range(width)]


# ----------------------------------------------------------------------------------------------- KL


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_kl_estimators_by_hand(logp, ref):
    one = lambda x: torch.tensor([[x]], dtype=torch.float64)
    got = {k: kl_penalty(one(logp), one(ref), estimator=k).item() for k in ("k1", "k2", "k3")}
    assert got["k1"] == pytest.approx(logp - ref)
    assert got["k2"] == pytest.approx((logp - ref) ** 2 / 2)
    assert (
        got["k3"] == pytest.approx(math.exp(ref - logp) - (ref - logp) - 1, abs=1e-9)
        and got["k3"] >= 0
    )
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(one(0.0), one(0.0), estimator="k4")


@pytest.mark.parametrize("loss_type", LOSSES)
def test_kl_term_is_masked_averaged_and_corrected_like_the_rest_and_by_nothing_else(loss_type):
    logps, old, _, mask, ref = batch(1)
    zero = torch.zeros(len(logps), dtype=torch.float64)
    for correct in (False, True):
        loss, stats = grpo_loss(
            logps, old, zero, mask, ref_logps=ref, beta=0.5, use_bias_correction_kl=correct,
            token_weights=torch.zeros_like(mask), delta=1e-3, **setting_of(loss_type)
        )  # fmt: skip
        d = ref - logps
        kl = (d.exp() - d - 1) * ((logps - old).exp() if correct else 1.0) * mask
        divisor = {
            "sequence": mask.sum(1, keepdim=True).clamp(min=1) * len(logps),
            "token": mask.sum(),
            "constant": 7 * len(logps),
            "row_sum": len(logps),
        }[AGGREGATION[loss_type]]
        torch.testing.assert_close(loss, 0.5 * (kl / divisor).sum())
        torch.testing.assert_close(
            gradient(loss, logps), gradient(0.5 * (kl / divisor).sum(), logps)
        )
        assert stats["kl"] == pytest.approx((kl.sum() / mask.sum()).item())
    assert "kl" not in grpo_loss(logps, old, zero, mask, ref_logps=ref, **setting_of(loss_type))[1]


def test_corrected_k3_has_the_gradient_of_k2():
    logps, _, _, mask, ref = batch(2, spread=1.0)
    zero = torch.zeros(len(logps), dtype=torch.float64)
    for level in ("token", "sequence"):
        common = {"ref_logps": ref, "beta": 1.0, "importance_sampling_level": level}
        corrected, _ = grpo_loss(
            logps, logps.detach(), zero, mask, use_bias_correction_kl=True, **common
        )
        plain, _ = grpo_loss(
            logps,
            logps.detach(),
            zero,
            mask,
            use_bias_correction_kl=False,
            kl_estimator="k2",
            **common,
        )
        same = torch.allclose(gradient(corrected, logps), gradient(plain, logps), atol=1e-12)
        # one ratio for a whole row spreads each token's KL over the row
        assert same == (level == "token")


# ---------------------------------------------------------------------------------- the policy loss


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize(
    ("ratio", "A", "moves"),
    [
        (0.5, 1, True),
        (1.0, 1, True),
        (1.5, 1, False),
        (0.5, -1, False),
        (1.0, -1, True),
        (1.5, -1, True),
    ],
)
def test_clip_stops_the_gradient_only_where_the_ratio_already_went_too_far(
    loss_type, ratio, A, moves
):
    logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    options = setting_of(loss_type) | (
        {"max_completion_length": 1} if loss_type == "dr_grpo" else {}
    )
    loss, stats = grpo_loss(
        logp, old, torch.tensor([float(A)], dtype=torch.float64), mask, **options
    )
    assert gradient(loss, logp).item() == pytest.approx(-ratio * A if moves else 0.0)
    assert stats["clip_ratio/region_mean"] == (not moves)
    assert stats["clip_ratio/low_mean"] == (ratio < 0.8 and A < 0)


def test_epsilons_and_delta_bound_what_they_say():
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)

    def loss(ratio, A, **options):
        logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64)
        return grpo_loss(logp, old, torch.tensor([A], dtype=torch.float64), mask, **options)[
            0
        ].item()

    assert loss(3.0, 1.0, epsilon=0.2) == pytest.approx(-1.2)
    assert loss(3.0, 1.0, epsilon=0.2, epsilon_high=0.5) == pytest.approx(-1.5)
    assert loss(0.1, -1.0, epsilon=0.3, epsilon_high=0.5) == pytest.approx(0.7)
    assert loss(9.0, -1.0) == pytest.approx(9.0)  # unbounded, which delta is for
    assert loss(9.0, -1.0, delta=2.0) == pytest.approx(2.0)
    assert loss(9.0, 1.0, delta=2.0, epsilon_high=5.0) == pytest.approx(-2.0)
    assert loss(9.0, 1.0, delta=2.0, loss_type="cispo", epsilon_high=5.0) == pytest.approx(
        -5.0 * math.log(9.0)
    )


def test_soft_surrogates_by_hand():
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)

    def slope(ratio, A, **options):
        logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
        return gradient(
            grpo_loss(logp, old, torch.tensor([A], dtype=torch.float64), mask, **options)[0], logp
        ).item()

    for A in (2.0, 0.5, -0.5, -2.0):
        assert slope(3.0, A, loss_type="cispo", epsilon_high=5.0) == pytest.approx(-3.0 * A)
        assert slope(3.0, A, loss_type="cispo", epsilon_high=2.0) == pytest.approx(-2.0 * A)
        tau = 1.0 if A > 0 else 1.05
        sigma = 1 / (1 + math.exp(-tau * 0.5))
        assert slope(1.5, A, loss_type="sapo") == pytest.approx(-4 * sigma * (1 - sigma) * 1.5 * A)
        k, lam = (2, 3) if A > 0 else (3, 2)
        assert slope(1.5, A, loss_type="vespo") == pytest.approx(
            -(1.5**k) * math.exp(lam * (1 - 1.5)) * A
        )
    assert slope(1.5, 0.7, loss_type="sapo", sapo_temperature_pos=2.0) == pytest.approx(
        -4 * 0.7 * 1.5 * math.e / (1 + math.e) ** 2
    )


def test_surrogates_beyond_trls_by_hand():
    """dppo bounds the move of the probability, gmpo clips each log-ratio before a row's mean, and
    opmd holds the log-ratio by a square."""
    logps, old, A, mask, _ = batch(11, B=6, T=5, spread=0.5)
    A, per_row = A.unsqueeze(1), mask.sum(1).clamp(min=1)
    log_ratio = logps - old
    sizes = {"epsilon": 0.1, "epsilon_high": 0.15}

    moved = logps.exp() - old.exp()
    near = (A > 0) & (moved <= 0.15) | (A <= 0) & (moved >= -0.1)
    assert 0 < (near & mask).sum() < mask.sum()
    weight = log_ratio.exp().clamp(max=20).detach() * near
    want = -(weight * A * logps * mask).sum() / mask.sum()
    loss, stats = grpo_loss(logps, old, A.squeeze(1), mask, loss_type="dppo", **sizes)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient(loss, logps), gradient(want, logps))
    assert stats["clip_ratio/region_mean"] == pytest.approx(
        ((~near & mask).sum() / mask.sum()).item()
    )

    total, clipped = 0.0, 0
    for row in range(len(logps)):
        own = log_ratio[row][mask[row]]
        c = own.clamp(max=0.15) if A[row] > 0 else own.clamp(min=-0.1)
        clipped += int((c != own).sum())
        total = total - (A[row] * c.mean().exp()).sum() if len(own) else total
    loss, stats = grpo_loss(logps, old, A.squeeze(1), mask, loss_type="gmpo", **sizes)
    assert stats["clip_ratio/region_mean"] == pytest.approx(clipped / int(mask.sum()))
    torch.testing.assert_close(loss, total / len(logps))
    torch.testing.assert_close(gradient(loss, logps), gradient(total / len(logps), logps))
    assert (per_row > 1).any()

    for tau in (1.0, 0.3):
        want = ((-A * logps + tau / 2 * log_ratio**2) * mask).sum() / mask.sum()
        loss, _ = grpo_loss(logps, old, A.squeeze(1), mask, loss_type="opmd", opmd_tau=tau)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradient(loss, logps), gradient(want, logps))


def test_dppo_keeps_a_probability_that_has_moved_to_its_bound():
    half, quarter = (torch.full((1, 1), p, dtype=torch.float64).log() for p in (0.5, 0.25))
    for old, new, A in ((quarter, half, 1.0), (half, quarter, -1.0)):
        logps = new.clone().requires_grad_()
        options = {"loss_type": "dppo", "epsilon": 0.25, "epsilon_high": 0.25}
        loss, _ = grpo_loss(logps, old, torch.tensor([A]).double(), torch.ones(1, 1), **options)
        assert gradient(loss, logps).item() == pytest.approx(-A * (new - old).exp().item())


def test_dppo_truncates_the_ratio_at_20():
    logp = torch.full((1, 1), -1e-3, dtype=torch.float64, requires_grad=True)
    old, one = logp.detach() - 5.0, torch.ones(1, dtype=torch.float64)
    loss, _ = grpo_loss(logp, old, one, torch.ones(1, 1), loss_type="dppo", epsilon_high=1.0)
    assert gradient(loss, logp).item() == pytest.approx(-20.0)


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 999), bounds=st.sampled_from([(0.0, 3.0), (0.5, 2.0), (0.8, math.inf)]))
@settings(max_examples=15)
def test_sampler_weights_by_hand(mode, seed, bounds):
    logps, old, _, mask, _ = batch(seed, spread=0.5)
    got = sampler_weights(logps.detach(), old, mask, mode, *bounds)
    for row in range(len(logps)):
        gaps = [
            (a - b).item() for a, b, m in zip(logps[row], old[row], mask[row], strict=True) if m
        ]
        gaps = [sum(gaps)] * len(gaps) if mode.startswith("sequence") else gaps
        want = [math.exp(gap) for gap in gaps]
        low, high = bounds
        if mode.endswith("truncate"):
            want = [min(max(w, low), high) for w in want]
        else:
            want = [w if low <= w <= high else 0.0 for w in want]
        assert got[row][mask[row]].tolist() == pytest.approx(want)
    dirty = torch.where(mask, old, math.nan)
    assert torch.equal(sampler_weights(logps.detach(), dirty, mask, mode, *bounds), got)


def test_the_sampler_correction_makes_an_estimate_under_another_policy_unbiased():
    """Completions drawn from another policy, weighed by the row's ratio: the policy gradient."""
    policy, sampler = TablePolicy(1), TablePolicy(5)
    sampled = sampler.logps().detach()
    p = sampled.sum(1).exp()
    A = REWARD - 0.5
    for mode, exact in (("sequence_truncate", True), ("token_truncate", False)):
        logps = policy.logps()
        weights = sampler_weights(logps.detach(), sampled, policy.mask, mode, 0.0, math.inf)
        total = 0.0
        for row in range(len(COMPLETIONS)):
            one = slice(row, row + 1)
            loss, _ = grpo_loss(
                logps[one], logps[one].detach(), A[one], policy.mask[one], loss_type="luspo",
                token_weights=weights[one],
            )  # fmt: skip
            total = total - p[row] * loss
        same = torch.allclose(gradient(total, policy.logits), policy_gradient(policy), atol=1e-10)
        assert same == exact


def test_vespo_weight_is_that_of_the_row_and_bounded():
    logps = torch.tensor(
        [[0.3, 0.2, 9.0], [50.0, 50.0, 50.0]], dtype=torch.float64, requires_grad=True
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss, stats = grpo_loss(
        logps, torch.zeros_like(logps), torch.ones(2, dtype=torch.float64), mask, loss_type="vespo"
    )
    w = math.exp(0.5)  # the product of the ratios of the row's own tokens
    phi = w**2 * math.exp(3 * (1 - w))
    # the second row went far off: no weight, no NaN
    want = torch.tensor([[phi, phi, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient(loss, logps), -want / 5)
    assert stats["vespo/phi_seq_mean"] == pytest.approx(phi / 2)  # one value a row, as in TRL


def test_vespo_bounds_each_log_ratio_at_20_and_their_sum_between_log_1e_8_and_20():
    ones = torch.ones(3, 2, dtype=torch.float64)
    # sums: log 1e-8, -0.5, 1
    logps = torch.tensor([[0.0, -19.0], [-40.0, 19.5], [60.0, -19.0]], dtype=torch.float64)
    A = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    _, stats = grpo_loss(logps, 0 * logps, A, ones.bool(), loss_type="vespo")
    phi = lambda log_w, k, lam: math.exp(lam + k * log_w - lam * math.exp(log_w))
    want = [phi(math.log(1e-8), 2, 3), phi(-0.5, 2, 3), phi(1.0, 3, 2)]
    assert stats["vespo/phi_seq_mean"] == pytest.approx(sum(want) / 3, rel=1e-9)


def test_clip_diagnostics_of_a_ratio_a_row_count_rows():
    old, mask = torch.zeros(2, 10), torch.arange(10) < torch.tensor([[10], [1]])
    logps, A = old + torch.tensor([[0.5], [0.0]]), torch.tensor([1.0, -1.0])
    level = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    assert grpo_loss(logps, old, A, mask, **level)[1]["clip_ratio/region_mean"] == 1 / 2


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_clip_diagnostics_count_the_tokens_that_lost_their_gradient(loss_type):
    logps = torch.tensor(
        [[0.5, 0.1, -0.5], [0.5, 0.1, -0.5], [0.5, 0.1, -0.5]], dtype=torch.float64
    )
    A, mask = (
        torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64),
        torch.ones(3, 3, dtype=torch.bool),
    )
    high = 1.2 if loss_type == "cispo" else 0.2
    _, stats = grpo_loss(logps, 0 * logps, A, mask, loss_type=loss_type, epsilon_high=high)
    if loss_type == "cispo":
        assert stats == {"cispo_clip_ratio": pytest.approx(1 / 9)}
    else:
        assert stats == {
            f"clip_ratio/{k}_mean": pytest.approx(n / 9)
            for k, n in (("low", 1), ("high", 1), ("region", 2))
        }


def test_defaults_of_the_loss_are_those_of_the_config_and_trls():
    config, defaults = GRPOConfig(), inspect.signature(grpo_loss).parameters
    shared = [name for name in defaults if hasattr(config, name)]
    assert len(shared) == 12
    for name in shared:
        if defaults[name].default is not None:
            assert defaults[name].default == getattr(config, name), name
    assert config.use_bias_correction_kl and config.loss_type == "dapo" and config.beta == 0


def test_sequence_level_has_one_ratio_a_row_the_geometric_mean_of_its_tokens():
    logps, old, A, mask, _ = batch(3)
    for loss_type in ("grpo", "sapo"):
        loss, _ = grpo_loss(
            logps, old, A, mask, loss_type=loss_type, importance_sampling_level="sequence"
        )
        total = 0.0
        for row in range(len(logps)):
            own = mask[row]
            if own.any():
                s = (logps[row][own] - old[row][own]).mean().exp().view(1, 1)
                one = torch.ones(1, 1, dtype=torch.bool)
                total = (
                    total
                    + grpo_loss(
                        s.log(), torch.zeros_like(s), A[row : row + 1], one, loss_type=loss_type
                    )[0]
                )
        torch.testing.assert_close(loss, total / len(logps))
        torch.testing.assert_close(gradient(loss, logps), gradient(total / len(logps), logps))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_at_ratio_one_the_gradient_is_minus_a_grad_logp_under_each_normaliser(loss_type, level):
    logps, _, A, mask, _ = batch(4)
    options = setting_of(loss_type, importance_sampling_level=level)
    loss, _ = grpo_loss(logps, logps.detach(), A, mask, **options)
    per_row = mask.sum(1, keepdim=True).clamp(min=1)
    weight = {
        "sequence": 1 / (per_row * len(logps)),
        "token": 1 / mask.sum(),
        "constant": torch.tensor(1 / (7 * len(logps))),
        "row_sum": torch.tensor(1 / len(logps)),
    }[AGGREGATION[loss_type]]
    torch.testing.assert_close(gradient(loss, logps), (-A.unsqueeze(1) * mask * weight).double())
    if (
        level == "token" and AGGREGATION[loss_type] == "sequence" and loss_type == "grpo"
    ):  # advantages of a group sum to 0
        centred, _ = grpo_loss(
            logps[1:], logps[1:].detach(), A[1:] - A[1:].mean(), mask[1:], **options
        )
        assert abs(centred.item()) < 1e-12  # and so the loss is 0 at first, though it learns
    elif loss_type == "dapo":
        centred, _ = grpo_loss(
            logps[1:], logps[1:].detach(), A[1:] - A[1:].mean(), mask[1:], **options
        )
        assert abs(centred.item()) > 1e-3  # here rows of different lengths weigh differently


@pytest.mark.parametrize("loss_type", LOSSES)
@given(seed=st.integers(0, 999), size=st.integers(1, 4), beta=st.sampled_from([0.0, 0.3]))
@settings(max_examples=15)
def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(loss_type, seed, size, beta):
    logps, old, A, mask, ref = batch(seed, B=6)
    options = setting_of(loss_type, beta=beta)
    whole, _ = grpo_loss(logps, old, A, mask, ref_logps=ref, **options)
    N = mask.sum().item() if AGGREGATION[loss_type] == "token" else len(logps)
    parts = 0.0
    for i in range(0, len(logps), size):
        s = slice(i, i + size)
        parts = (
            parts
            + grpo_loss(logps[s], old[s], A[s], mask[s], ref_logps=ref[s], normalizer=N, **options)[
                0
            ]
        )
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, logps), gradient(whole, logps))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_is_masked_has_no_influence_not_even_nan(loss_type, level):
    logps, old, A, mask, ref = batch(5)
    options = setting_of(loss_type, importance_sampling_level=level, beta=0.1)
    loss, stats = grpo_loss(logps, old, A, mask, ref_logps=ref, **options)
    for junk in (math.nan, math.inf, -1e30, 700.0):
        dirty = [torch.where(mask, x.detach(), junk) for x in (logps, old, ref)]
        dirty[0].requires_grad_()
        again, stats2 = grpo_loss(dirty[0], dirty[1], A, mask, ref_logps=dirty[2], **options)
        assert again.item() == loss.item() and stats2 == stats
        assert torch.equal(gradient(again, dirty[0]), gradient(loss, logps) * mask)
        (loss, _) = grpo_loss(logps, old, A, mask, ref_logps=ref, **options)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_log_probs_alone_carry_gradients_also_where_they_are_passed_as_the_old_ones(loss_type):
    logps, _, A, mask, ref = batch(5)
    options = setting_of(loss_type, beta=0.1)
    others = [x.clone().requires_grad_() for x in (A, ref, torch.rand(mask.shape).double())]
    A_, ref_, weights = others
    options |= {"loss_type": loss_type}
    loss, _ = grpo_loss(logps, logps, A_, mask, ref_logps=ref_, token_weights=weights, **options)
    options |= {"ref_logps": ref, "token_weights": weights.detach()}
    want, _ = grpo_loss(logps, logps.detach(), A, mask, **options)
    own, *rest = torch.autograd.grad(loss, [logps, *others], allow_unused=True)
    assert torch.equal(own, gradient(want, logps)) and own.any() and rest == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_policy_far_off_has_finite_gradients_in_any_precision(loss_type, dtype):
    for gap, A in itertools.product((12.0, 50.0, 99.0, -99.0), (1.0, -1.0)):
        logps = torch.full((1, 2), -1.0, dtype=dtype, requires_grad=True)
        old, one = logps.detach() - gap, torch.ones(1, 2, dtype=torch.bool)
        loss, _ = grpo_loss(
            logps, old, torch.tensor([A], dtype=dtype), one, **setting_of(loss_type)
        )
        assert gradient(loss, logps).isfinite().all(), (gap, A)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_an_empty_batch_has_loss_zero_and_gradient_zero(loss_type):
    logps, old, A, _, ref = batch(6)
    nothing = torch.zeros(logps.shape, dtype=torch.bool)
    for level in ("token", "sequence"):
        options = setting_of(loss_type, importance_sampling_level=level, beta=0.1)
        loss, stats = grpo_loss(logps, old, A, nothing, ref_logps=ref, **options)
        assert (
            loss.item() == 0
            and not gradient(loss, logps).any()
            and not any(map(math.isnan, stats.values()))
        )


@pytest.mark.parametrize("loss_type", LOSSES)
@given(seed=st.integers(0, 999), order=st.permutations(range(5)), pad=st.integers(0, 3))
@settings(max_examples=15)
def test_order_of_rows_and_amount_of_padding_do_not_matter(loss_type, seed, order, pad):
    logps, old, A, mask, ref = batch(seed, B=5)
    options = setting_of(loss_type, beta=0.2)
    loss, _ = grpo_loss(logps, old, A, mask, ref_logps=ref, **options)
    padded = [F.pad(x.detach()[list(order)], (0, pad)) for x in (logps, old, mask, ref)]
    again, _ = grpo_loss(
        padded[0], padded[1], A[list(order)], padded[2], ref_logps=padded[3], **options
    )
    torch.testing.assert_close(again, loss)


def test_token_weights_drop_policy_terms_and_keeps_the_divisor():
    logps, old, A, mask, _ = batch(7)
    keep = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    loss, _ = grpo_loss(logps, old, A, mask, token_weights=keep)
    ratio = (logps - old).exp()
    want = -torch.min(ratio * A.unsqueeze(1), ratio.clamp(0.8, 1.2) * A.unsqueeze(1)) * (
        mask & keep
    )
    torch.testing.assert_close(loss, want.sum() / mask.sum())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_normaliser_divides_and_is_at_least_one(loss_type):
    logps, old, A, mask, _ = batch(10)
    loss = lambda n: grpo_loss(logps, old, A, mask, normalizer=n, **setting_of(loss_type))[0]
    torch.testing.assert_close(loss(4) * 4, loss(1))
    assert loss(0) == loss(1)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_ratio_beyond_every_bound_gives_no_nan(loss_type, level):
    for apart in (94.0, 1e4, -1e4):
        logp = torch.full((1, 1), -1.0, requires_grad=True)
        options = setting_of(loss_type, importance_sampling_level=level)
        loss, _ = grpo_loss(logp, logp.detach() - apart, torch.ones(1), torch.ones(1, 1), **options)
        assert loss.isfinite() and gradient(loss, logp).isfinite().all()


def test_shapes_and_missing_settings_are_refused_by_name():
    logps, old, A, mask, ref = batch(8)
    refused = [
        ("old_logps", {"old_logps": old[:, :-1]}),
        ("advantages", {"advantages": A.unsqueeze(1)}),
        ("mask", {"mask": mask[:-1]}),
        ("ref_logps", {"ref_logps": ref[:1], "beta": 0.1}),
        ("ref_logps", {"beta": 0.1}),
        ("token_weights", {"token_weights": mask[0]}),
        ("loss_type", {"loss_type": "ppo"}),
        ("importance_sampling_level", {"importance_sampling_level": "batch"}),
        ("epsilon_high", {"loss_type": "cispo"}),
        ("max_completion_length", {"loss_type": "dr_grpo"}),
        ("kl_estimator", {"kl_estimator": "k9", "beta": 0.1, "ref_logps": ref}),
    ]
    for name, change in refused:
        with pytest.raises(ValueError, match=name):
            grpo_loss(**{"logps": logps, "old_logps": old, "advantages": A, "mask": mask} | change)


@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "loss_type", [name for name in LOSSES if name not in ("cispo", "vespo", "dppo")]
)
def test_gradients_are_those_of_the_loss_by_finite_differences(loss_type, level, kl):
    # cispo, vespo and dppo stop a gradient on purpose: by hand, above
    logps, old, A, mask, ref = batch(9, B=3, T=3)
    options = setting_of(loss_type, ref_logps=ref, importance_sampling_level=level)
    options |= {"beta": 0.3 if kl else 0.0, "kl_estimator": kl or "k3"}
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, A, mask, **options)[0], logps)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_row_of_settings_that_a_config_takes(name):
    config = GRPOConfig(**VARIANTS[name].settings)
    assert VARIANTS[name].source and all(
        getattr(config, k) == v for k, v in VARIANTS[name].settings.items()
    )


def test_the_numbers_of_the_papers():
    sequence = {"importance_sampling_level": "sequence"}
    assert {name: variant.settings for name, variant in VARIANTS.items()} == {
        "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
        "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
        "gspo": {"loss_type": "grpo", **sequence, "epsilon": 3e-4, "epsilon_high": 4e-4},
        "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
        "luspo": {"loss_type": "luspo", **sequence, "epsilon": 2e-3, "epsilon_high": 2.5e-3},
        "gmpo": {"loss_type": "gmpo", "epsilon": 0.4},
        "rloo": {"scale_rewards": "leave_one_out"}, "max_rl": {"scale_rewards": "mean"},
        "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
        "lite_ppo": {"loss_type": "dapo", "scale_rewards": "batch"},
        "top_entropy": {"top_entropy_quantile": 0.2},
    } | {name: {"loss_type": name} for name in ("sapo", "vespo", "dppo", "opmd")}  # fmt: skip


# -------------------------------------------------------------------------------- exact enumeration
#
# A policy so small that every completion and every group can be listed: three tokens (0 ends), at
# most two of them. Then an expectation over sampling is a finite sum, and what GRPO's loss does on
# average is known to rounding.

HORIZON = 2
# the second token of [0, 0] is padding
COMPLETIONS = [[0, 0], *([a, b] for a in (1, 2) for b in (0, 1, 2))]
PREFIXES = [(), (1,), (2,)]


class TablePolicy:
    """A softmax over three tokens for each prefix; its parameters are the logits."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(
            len(PREFIXES), 3, generator=generator, dtype=torch.float64
        ).requires_grad_()
        self.ids = torch.tensor(COMPLETIONS)
        self.mask = completion_mask(self.ids, [0])
        self.states = torch.tensor(
            [[0, PREFIXES.index((c[0],)) if c[0] else 0] for c in COMPLETIONS]
        )

    def logps(self) -> torch.Tensor:  # (7, 2)
        table = self.logits.log_softmax(-1)[self.states]
        return torch.where(self.mask, table.gather(2, self.ids.unsqueeze(2)).squeeze(2), 0.0)

    def probabilities(self) -> torch.Tensor:  # (7,)
        return self.logps().sum(1).exp()


REWARD = torch.tensor([0.0, 1.0, 0.3, 0.0, 2.0, 0.7, 1.0], dtype=torch.float64)


def expected_gradient(
    policy: TablePolicy, G: int, *, scale: str, loss_type: str, reward: torch.Tensor = REWARD
) -> torch.Tensor:
    """E over groups of G samples of -∇ loss, by listing all 7^G groups."""
    logps, p, total = policy.logps(), policy.probabilities().detach(), 0.0
    for group in itertools.product(range(len(COMPLETIONS)), repeat=G):
        rows = list(group)
        A = group_advantages(reward[rows].unsqueeze(0), scale=scale)[0]
        options = {"loss_type": loss_type, "max_completion_length": HORIZON}
        loss, _ = grpo_loss(logps[rows], logps[rows].detach(), A, policy.mask[rows], **options)
        total = total - p[rows].prod() * loss
    return gradient(total, policy.logits)


def policy_gradient(policy: TablePolicy) -> torch.Tensor:
    return gradient((policy.probabilities() * REWARD).sum(), policy.logits)


def test_there_are_seven_completions_and_their_probabilities_sum_to_one():
    assert TablePolicy(0).probabilities().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("G", [2, 3])
def test_dr_grpo_is_g_minus_1_over_g_of_the_policy_gradient_in_expectation(G):
    policy = TablePolicy(1)
    got = expected_gradient(policy, G, scale="none", loss_type="dr_grpo") * HORIZON
    torch.testing.assert_close(got, (G - 1) / G * policy_gradient(policy), atol=1e-10, rtol=0)


@pytest.mark.parametrize("G", [2, 3])
def test_rloo_is_the_policy_gradient_in_expectation(G):
    policy = TablePolicy(1)
    got = expected_gradient(policy, G, scale="leave_one_out", loss_type="dr_grpo") * HORIZON
    torch.testing.assert_close(got, policy_gradient(policy), atol=1e-10, rtol=0)


@pytest.mark.parametrize("G", [2, 3, 4])
def test_max_rl_climbs_a_truncated_log_likelihood_of_success(G):
    """For rewards of 0 and 1, p the probability of success: ∇ of -Σ_{k<G} (1-p)^k / k, which for
    many samples is ∇ log p. (A group without a success gives nothing, hence G - 1 terms.)"""
    policy, success = TablePolicy(1), (REWARD > 0.5).double()
    got = expected_gradient(policy, G, scale="mean", loss_type="dr_grpo", reward=success) * HORIZON
    p = (policy.probabilities() * success).sum()
    likelihood = -sum((1 - p) ** k / k for k in range(1, G))
    torch.testing.assert_close(got, gradient(likelihood, policy.logits), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("scale", "loss_type", "stated"),  # README states them
    [
        ("group", "grpo", 12.3),
        ("group", "dr_grpo", 7.1),
        ("none", "grpo", 8.6),
        ("none", "dapo", 2.4),
    ],
)
def test_std_scaling_and_length_normalisation_bend_the_gradient(scale, loss_type, stated):
    policy = TablePolicy(1)
    true = policy_gradient(policy).flatten()
    got = expected_gradient(policy, 3, scale=scale, loss_type=loss_type).flatten()
    degrees = math.degrees(torch.cosine_similarity(true, got, dim=0).acos().item())
    print(f"{loss_type} with scale {scale}: {degrees:.1f} degrees off the policy gradient")
    assert degrees == pytest.approx(stated, abs=0.05)


def test_length_bias_goes_away_when_all_completions_are_equally_long():
    policy = TablePolicy(2)
    with torch.no_grad():
        policy.logits[0, 0] = -60.0  # never ends at once: all completions have two tokens
    got = expected_gradient(policy, 2, scale="none", loss_type="grpo")
    torch.testing.assert_close(got, policy_gradient(policy) / 2 / HORIZON, atol=1e-10, rtol=0)


def kl_loss_gradient(
    policy: TablePolicy, ref: TablePolicy, estimator: str, horizon: int, correction: bool = False
) -> torch.Tensor:
    """E over samples of ∇ of the KL term alone, through grpo_loss."""
    mask = policy.mask.clone()
    mask[:, horizon:] = False
    logps, p, total = policy.logps(), policy.probabilities().detach(), 0.0
    for row in range(len(COMPLETIONS)):
        one = slice(row, row + 1)
        loss, _ = grpo_loss(
            logps[one], logps[one].detach(), torch.zeros(1, dtype=torch.float64), mask[one],
            ref_logps=ref.logps().detach()[one], beta=1.0, kl_estimator=estimator,
            use_bias_correction_kl=correction, loss_type="dr_grpo", max_completion_length=1,
        )  # fmt: skip
        total = total + p[row] * loss
    return gradient(total, policy.logits)


def state_kl(policy: TablePolicy, ref: TablePolicy, state: int, reverse: bool) -> torch.Tensor:
    log_p, log_q = policy.logits[state].log_softmax(-1), ref.logits[state].detach().log_softmax(-1)
    return (
        (log_p.exp() * (log_p - log_q)).sum() if reverse else (log_q.exp() * (log_q - log_p)).sum()
    )


def test_kl_gradients_by_enumeration():
    """As losses, in expectation: k1 does nothing, k2 follows the reverse KL and k3 the forward KL,
    state by state."""
    policy, ref = TablePolicy(3), TablePolicy(4)
    for horizon in (1, 2):
        # E over prefixes
        visits = [1.0] if horizon == 1 else [1.0, *policy.logits[0].softmax(-1)[1:].tolist()]
        for estimator, reverse in (("k2", True), ("k3", False)):
            exact = sum(
                v * gradient(state_kl(policy, ref, s, reverse), policy.logits)
                for s, v in enumerate(visits)
            )
            got = kl_loss_gradient(policy, ref, estimator, horizon)
            torch.testing.assert_close(got, exact, atol=1e-10, rtol=0)
        assert kl_loss_gradient(policy, ref, "k1", horizon).abs().max() < 1e-10
        # times ρ (use_bias_correction_kl) k1 and k3 follow the reverse KL, and k2, which did
        # without, no longer does
        reverse_kl = sum(
            v * gradient(state_kl(policy, ref, s, True), policy.logits)
            for s, v in enumerate(visits)
        )
        corrected = {
            k: kl_loss_gradient(policy, ref, k, horizon, correction=True)
            for k in ("k1", "k2", "k3")
        }
        torch.testing.assert_close(corrected["k1"], reverse_kl, atol=1e-10, rtol=0)
        torch.testing.assert_close(corrected["k3"], reverse_kl, atol=1e-10, rtol=0)
        assert (corrected["k2"] - reverse_kl).abs().max() > 0.01
    log_p, log_q = policy.logps().sum(1), ref.logps().detach().sum(1)
    sequence_kl = gradient((log_p.exp() * (log_p - log_q)).sum(), policy.logits)
    apart = kl_loss_gradient(policy, ref, "k2", 2) - sequence_kl
    assert apart.abs().max() > 0.01  # beyond one token they differ


# ---------------------------------------------------------------------------------- drawing a token


def draws(probabilities: list[float], *uniforms: float) -> list[int]:
    log_probs = torch.tensor([probabilities] * len(uniforms), dtype=torch.float64).log()
    return draw_tokens(log_probs, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_each_token_has_its_share_of_the_uniform_numbers_from_its_lower_bound_up_to_the_next():
    quarters = [0.25, 0.25, 0.5]  # [0, 0.25) [0.25, 0.5) [0.5, 1); a bound belongs to the upper
    assert draws(quarters, 0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999) == [0, 0, 1, 1, 2, 2]


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.125, 0.25, 1.0]), min_size=1, max_size=8).filter(any),
    st.floats(0, 1, exclude_max=True),
)
def test_a_token_of_probability_zero_is_never_drawn(weights, uniform):
    whole, sums = sum(weights), itertools.accumulate(weights)
    bounds = [x / whole for x in sums if x < whole]  # where one that could slip in would lie
    drawn = draws([w / whole for w in weights], 0.0, uniform, *bounds)
    assert all(weights[token] > 0 for token in drawn)


@pytest.mark.parametrize("total", [0.9, 1.1])
def test_draws_do_not_depend_on_how_far_rounding_left_the_sum_of_the_probabilities_from_one(total):
    shares = [0.3, 0.3, 0.4]
    uniforms = [0.0, 0.28, 0.299, 0.301, 0.32, 0.56, 0.599, 0.601, 0.65, 0.95, 0.999]
    assert draws([total * p for p in shares], *uniforms) == draws(shares, *uniforms)
    assert draws(shares, *uniforms) == [0] * 3 + [1] * 4 + [2] * 4


# ---------------------------------------------------------------------------------- LoRA, one layer


class Toy(nn.Module):
    """Two linear layers and a Conv1D, in float64; `out` shares nothing with `embed`."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up, self.mix, self.out = nn.Linear(6, 10, bias=bias), Conv1D(8, 10), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(torch.tanh(self.up(self.embed(ids))))))


def toy(
    config: LoRAConfig,
    seed: int = 0,
    random_adapters: bool = True,
    dtype: torch.dtype = torch.float64,
    **kwargs,
):
    """A toy with adapters that matter, a copy of its base, and inputs."""
    torch.manual_seed(seed)
    base = Toy(**kwargs).to(dtype).eval()
    model = apply_lora(copy.deepcopy(base), config)
    if random_adapters:
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                nn.init.normal_(p, std=0.3)
            elif p.requires_grad:
                p.data.mul_(1 + 0.1 * torch.rand_like(p))
    return model, base, torch.randint(9, (4, 3))


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa+dora": {"init_lora_weights": "pissa", "use_dora": True},
    "patterns": {"rank_pattern": {"up": 2, "m.x": 5}, "alpha_pattern": {"out": 32}},
    "saved": {"modules_to_save": ["out"], "target_modules": ["up", "mix"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_adds_s_b_a_and_nothing_else(kind):
    config = LoRAConfig(r=3, lora_alpha=6, **KINDS[kind])
    model, base, ids = toy(config, random_adapters=False)
    # every initialisation starts at the base model's function
    torch.testing.assert_close(model(ids), base(ids))
    model, base, ids = toy(config)
    dense = copy.deepcopy(base)
    for name in ("up", "mix", "out"):
        layer = getattr(model, name)
        if kind == "saved" and name == "out":
            dense.out = layer.trained
            continue
        r = config.rank_pattern.get({"mix": "m.x"}.get(name, name), 3)
        assert layer.lora_A.weight.shape[0] == r
        s = config.alpha_pattern.get(name, 6) / (math.sqrt(r) if config.use_rslora else r)
        W0, delta = getattr(base, name).weight, s * layer.lora_B.weight @ layer.lora_A.weight
        W0 = W0.T if name == "mix" else W0
        if layer.residual is not None:
            U, S, V = torch.linalg.svd(W0)
            W0 = W0 - U[:, :r] * S[:r] @ V[:r]
        W = W0 + delta
        if config.use_dora:
            W = W * (layer.lora_magnitude_vector / W.norm(dim=1)).unsqueeze(1)
        getattr(dense, name).weight = nn.Parameter(W.T if name == "mix" else W)
    torch.testing.assert_close(model(ids), dense(ids))
    with torch.no_grad(), lora_merged(model):
        torch.testing.assert_close(model(ids), dense(ids))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_adapters_off_is_the_base_model_to_the_bit_through_nesting_and_exceptions(kind, seed):
    model, base, ids = toy(LoRAConfig(r=2, **KINDS[kind]), seed, dtype=torch.float32)
    on, off = model(ids), base(ids)
    assert not torch.equal(on, off)
    with lora_disabled(model):
        assert torch.equal(model(ids), off)
        with lora_disabled(model):
            assert torch.equal(model(ids), off)
        # leaving the inner one must not switch adapters back on
        assert torch.equal(model(ids), off)
        with torch.no_grad(), lora_merged(model):
            assert torch.equal(model(ids), off)
    assert torch.equal(model(ids), on)
    with pytest.raises(KeyError), lora_disabled(model):
        raise KeyError
    assert torch.equal(model(ids), on)
    with torch.no_grad(), lora_merged(model), lora_disabled(model):
        assert torch.equal(model(ids), off)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_adapters_only_and_match_finite_differences(kind):
    model, _, ids = toy(LoRAConfig(r=2, **KINDS[kind]))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("out.trained") for name in trainable)
    weights = torch.randn(4, 3, 5, dtype=torch.float64)
    (model(ids) * weights).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)
    for name, p in trainable.items():
        if "dora" in kind and "magnitude" not in name:
            continue  # DoRA detaches its norm on purpose: see the next test
        with torch.no_grad():
            step, flat = 1e-6, p.view(-1)
            flat[0] += step
            up = (model(ids) * weights).sum()
            flat[0] -= 2 * step
            down = (model(ids) * weights).sum()
            flat[0] += step
        assert p.grad.view(-1)[0].item() == pytest.approx(
            ((up - down) / (2 * step)).item(), rel=1e-5, abs=1e-7
        )


def test_with_dropout_all_that_dora_adds_sees_the_dropped_inputs_and_base_does_not():
    """y = base(x) + (m/n - 1) W d(x) + (m/n) s B A d(x)"""
    config = LoRAConfig(r=2, use_dora=True, lora_dropout=0.5)
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 4).double(), 2, 3.0, config).train()
    nn.init.normal_(layer.lora_B.weight, std=0.3)
    layer.lora_magnitude_vector.data.mul_(1.3)
    x, W = torch.randn(5, 6).double(), layer.base_layer.weight
    A, B, s = layer.lora_A.weight, layer.lora_B.weight, layer.scaling
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    d = layer.lora_dropout(x)
    ratio = layer.lora_magnitude_vector / (W + s * B @ A).norm(dim=1)
    want = layer.base_layer(x) + (ratio - 1) * (d @ W.T) + ratio * s * (d @ A.T @ B.T)
    torch.testing.assert_close(y, want)
    assert not torch.equal(d, x)


def test_pissa_takes_any_rank_up_to_the_smaller_side():
    config = LoRAConfig(init_lora_weights="pissa")
    base = nn.Linear(6, 4)
    layer = LoRALinear(base, 4, 8.0, config)
    assert layer.residual.abs().max() < 1e-5  # all of W is in A and B
    with pytest.raises(ValueError, match="r = 5"):
        LoRALinear(base, 5, 8.0, config)


def test_dora_gradient_is_that_with_the_norm_held_fixed():
    model, base, ids = toy(LoRAConfig(r=2, use_dora=True, target_modules=["out"]))
    layer, hidden = model.out, {}
    layer.register_forward_pre_hook(lambda module, args: hidden.update(x=args[0].detach()))
    (model(ids) ** 2).sum().backward()
    A, B, m = (
        p.detach().clone().requires_grad_()
        for p in (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    )
    norm = (base.out.weight + 4 * B @ A).norm(dim=1).detach()
    y = F.linear(
        hidden["x"],
        (m / norm).unsqueeze(1) * (base.out.weight.detach() + 4 * B @ A),
        base.out.bias.detach(),
    )
    (y**2).sum().backward()
    for ours, exact in (
        (layer.lora_A.weight, A),
        (layer.lora_B.weight, B),
        (layer.lora_magnitude_vector, m),
    ):
        torch.testing.assert_close(ours.grad, exact.grad)


def test_initialisations_have_the_distributions_they_name():
    torch.manual_seed(0)
    make = lambda **kwargs: apply_lora(
        nn.Sequential(nn.Linear(400, 300)), LoRAConfig(r=64, **kwargs)
    )[0]
    layer = make()
    A = layer.lora_A.weight
    assert not layer.lora_B.weight.any() and A.abs().max() <= 1 / 20
    assert A.var().item() == pytest.approx(1 / (3 * 400), rel=0.03)  # uniform on ±1/sqrt(in)
    layer = make(init_lora_weights="gaussian")
    assert not layer.lora_B.weight.any() and layer.lora_A.weight.std().item() == pytest.approx(
        1 / 64, rel=0.03
    )
    kurtosis = (layer.lora_A.weight**4).mean() / layer.lora_A.weight.var() ** 2
    assert kurtosis.item() == pytest.approx(3.0, rel=0.1)
    layer = make(init_lora_weights="pissa")
    S = torch.linalg.svdvals(layer.base_layer.weight)
    product = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(torch.linalg.svdvals(product)[:64], S[:64], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.residual)[:200], S[64:264], atol=1e-4, rtol=1e-4
    )


def test_backward_is_refused_while_weights_are_merged():
    model, _, ids = toy(LoRAConfig(r=2))
    outside = model(ids).sum()
    with lora_merged(model):
        with pytest.raises(RuntimeError, match="merged"):
            outside.backward()
        inside = model(ids).sum()
    with pytest.raises(RuntimeError, match="merged"):
        inside.backward()
    model(ids).sum().backward()  # and afterwards all is as before


def test_dropout_acts_in_training_mode_on_the_adapter_alone():
    model, base, ids = toy(LoRAConfig(r=2, lora_dropout=0.5, target_modules=["out"]))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    with lora_disabled(model):
        assert torch.equal(model(ids), base(ids))
    torch.manual_seed(0)
    mean = torch.stack([model(ids) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, model.eval()(ids), atol=0.1, rtol=0.05)


def test_param_groups_give_each_kind_its_rate_and_miss_nothing():
    model, *_ = toy(
        LoRAConfig(r=2, use_dora=True, modules_to_save=["out"], target_modules=["up", "mix"])
    )
    found = {
        g["name"]: g for g in param_groups(model, 1e-3, lora_plus_ratio=16, modules_to_save_lr=1e-5)
    }
    assert {name: g["lr"] for name, g in found.items()} == {"A": 1e-3, "B": 1.6e-2, "full": 1e-5}
    assert {name: len(g["params"]) for name, g in found.items()} == {
        "A": 2,
        "B": 4,
        "full": 2,
    }  # B and magnitudes
    assert {id(p) for g in found.values() for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert {g["lr"] for g in param_groups(model, 1e-3)} == {1e-3}


def test_adapters_are_float32_on_a_bf16_base_and_outputs_stay_bf16():
    model, base, ids = toy(LoRAConfig(r=2), dtype=torch.bfloat16)
    assert model.up.lora_A.weight.dtype == torch.float32 and model(ids).dtype == torch.bfloat16
    with lora_disabled(model):
        assert torch.equal(model(ids), base(ids))


def test_doras_magnitude_keeps_small_updates_on_a_bf16_base():
    model, _, ids = toy(LoRAConfig(r=2, use_dora=True), dtype=torch.bfloat16)
    magnitude = model.up.lora_magnitude_vector
    before = magnitude.detach().clone()
    model(ids).float().square().sum().backward()
    torch.optim.AdamW([magnitude], lr=1e-4, weight_decay=0).step()
    assert (magnitude != before).all()  # near 0.5 the numbers of bf16 are 0.002 to 0.004 apart


# ------------------------------------------------------------------------------------------ rewards

numbers = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)


@given(numbers, numbers)
def test_numbers_are_equal_exactly_when_the_fractions_are(a, b):
    forms = [
        lambda x: f"{x.numerator}/{x.denominator}",
        lambda x: rf"\frac{{{x.numerator}}}{{{x.denominator}}}",
        lambda x: rf"${'-' if x < 0 else ''}\dfrac{{{abs(x.numerator)}}}{{{x.denominator}}}$.",
        lambda x: f"{x.numerator * 100}/{x.denominator}%",
    ]
    for write, write_b in itertools.product(forms, forms):
        assert answers_match(write(a), write_b(a))
        assert (
            answers_match(write(a), write_b(b)) == answers_match(write_b(b), write(a)) == (a == b)
        )


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_decimals_percent_separators_and_exponents_are_exact(n, places):
    decimal = f"{n / 10**places:.{places}f}"
    exact = Fraction(n, 10**places)
    assert canonical_answer(decimal) == exact == canonical_answer(f"{n}e-{places}")
    assert canonical_answer(f"{decimal}%") == exact / 100 == canonical_answer(f"{decimal}\\%")
    assert canonical_answer(f"{n:,}") == n == canonical_answer(f"{n:,}".replace(",", "{,}"))


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (r"-\frac{-1}{2}", "1/2", True), (r"\frac{-1}{2}", "-0.5", True),
        (r"-\frac{1}{2}", "0.5", False), ("1", "12345", False), ("2**3", "8", False),
        ("12", "1 2", False), ("1 1/2", "1.5", True), ("1 1/2", "11/2", False),
        ("0.1", "1/10", True), ("0.3333", "1/3", False), ("50%", "0.5", True), ("50%", "50", False),
        (r"1\frac12", "3/2", True), ("$18", "18.", True), ("x = 5", "5", True),
        ("1/0", "1/0", True), ("1/0", "0", False), ("5²", "52", False), ("٣", "3", False),
        ("１", "1", False), ("\u200f18\u200e", "18", True), ("−3", "-3", True),
        ("12,34", "1234", False), ("A", "a", True), (r"\text{yes}", "Yes", True),
        ("x + 1", "x+1", True), ("1e999999999", "1e999999998", False), ("-0", "0", True),
        ("97**98**99", "97**98**99", True), ("nan", "nan", True), (".5", "0.5", True),
        ("2", "2.0000000000000000000001", False), (18, "18", True), ("", "0", False),
        ("0" * 999 + "7", "7", True), ("0" * 1000 + "7", "7", False),  # so long: taken for text
        # different answers
        ("5!", "5", False), (r"11/2 \text{ hours}", r"1 1/2 \text{ hours}", False),
        ("(1 1/2, 3)", "(11/2, 3)", False), (r"1 1/2\pi", r"11/2\pi", False), ("x=3", "y=3", False),
        ("x=3,y=4", "3,y=4", False), (r"(12\ 3)", r"(1\ 2\ 3)", False),
        (r"\gamma", r"\Gamma", False),
        ("1", "1 000/3", False), ("12 345", "1 2345", False), (r"x^{10}", "x^10", False),
        ("10101_3", "10101_4", False), ("(1,234)", "1234", False), ("0{,}333", "333", False),
        ("1,234,5", "12345", False), ("(1,2)", "(2,1)", False), ("1,2", "(1,2)", False),
        ("[0,1)", "(0,1)", False), (r"\{1,1,2\}", r"\{1,2\}", False),
        ("no solution", "nosolution", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", False),
        (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{bmatrix}1&2&3&4\end{bmatrix}", False),
        (r"\pi r", r"\pir", False), ("1/2x", r"\frac12x", False), ("1..5", "1.5", False),
        ("1 02/3", "5/3", False), (r"1\frac{-1}{2}", "0.5", False), ("10^12", "10^{12}", False),
        (r"2\cdot3", "6", False), ("1/2/3", "1/6", False), (r"\sqrt[3]{2}", r"\sqrt{2}", False),
        ("x^2+5", "x^25", False), (r"\sqrt{2}+1", r"\sqrt21", False), ("R-r", "r-R", False),
        ("12, 144", "12144", False), ("{1, 234}", "1234", False),
        (r"\{\{1,2\},\{3,4\}\}", r"\{\{1,4\},\{3,2\}\}", False),
        (r"\{[1,2],[3,4]\}", r"\{[1,4],[3,2]\}", False),
        # one answer, written twice
        ("x = 0.5", "x=1/2", True), ("x = 5 cm", "x = 5", True), ("NONE", "none", True),
        (r"\begin{pmatrix}+1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        ("3", "x = 3", True), (r"\theta=30", "30", True), (r"\frac1{72}", r"\frac{1}{72}", True),
        (r"\frac{3}4", "0.75", True), (r"\frac{1}{-2}", "-0.5", True),
        (r"\sqrt2", r"\sqrt{2}", True),
        (r"\frac{\sqrt3}{3}", r"\frac{\sqrt{3}}3", True), (r"\frac x2", r"\frac{x}{2}", True),
        (r"2516_{8}", "2516_8", True), (r"x^{2}+1", "x^2+1", True), (r"\text{(C)}", "c", True),
        ("No  solution", r"\text{no solution}", True), (r"\(18\)", "18", True),
        (r"\[18\]", "18", True),
        ("**73**", "73", True), (r"11,\!111", "11111", True), (r"12\,345", "12345", True),
        (r"\begin{pmatrix}-1/3\\0\end{pmatrix}",
         r"\begin{pmatrix} -\frac{1}{3} \\ 0 \end{pmatrix}", True),
        (r"\left\{2, 1\right\}", r"\{1,2\}", True), (r"\{(1,2),\frac12\}", r"\{0.5,(1,2)\}", True),
        (r"\left(\frac12, 3\right)", "(0.5,3)", True), (r"[0,\infty)", r"[0, \infty)", True),
        ("10^{3}", "1000", True), (r"2\times 10^3", "2000", True), (r"2\cdot10^{-2}", "0.02", True),
        ("-10^{3}", "-1000", True), (r"2 \pi", r"2\pi", True), (r"x \leq 3", r"x\le3", True),
        # a unit on one side
        ("5 Million", "5", False), ("7 tenths", "7", False), ("1 in six", "1", False),
        ("3 sin x", "3", False), ("2 abc", "2", False), (r"5\mathrm{i}", "5", False),
        ("5cm", "5", True), (r"5\ \text{cm}", "5", True), ("5 miles per hour", "5", True),
        (r"10\text{ cm}", "10", True), (r"10\text{ cm}", r"10\text{ m}", False),
        (r"10\text{ cm}", "10 cm", True), (r"15\mbox{ cm}^2", r"15\text{ cm}^{2}", True),
        (r"15\text{ cm}^2", r"15\text{ cm}^3", False), (r"5\mbox{ units}", "5", True),
        ("5 apples", "5", True), ("5 apples", "5 oranges", False), ("10x", "10", False),
        ("3 fourths", "3", False), ("7 millionths", "7", False), ("0.3 repeating", "0.3", False),
        ("3 sixteenths", "3", False), ("5 twelfths", "5", False), ("101 binary", "101", False),
        ("10 xy", "10", False), (r"5\text{ million}", "5", False), ("5 dozen", "5", False),
        (r"5\text{ (mod 7)}", "5", False), ("5:00 p.m.", "5:00", False), ("7 pm", "7", False),
        ("30°", r"30^{\circ}", True), ("30", r"30^\circ", True), (r"\$18", "18", True),
        (r"\$18", "€18", False), ("1 1/2 hours", r"1.5\text{ hours}", True),
        ("1 3/2", "5/2", False), ("0.333...", "0.333", False), ("1, 2, 3, ...", "1, 2, 3", False),
        ("3 crore", "3", False), ("5 grand", "5", False), ("5 gross", "5", False),
        ("11 octal", "11", False), ("11 hex", "11", False), ("5 percentages", "5", False),
        ("5 negative", "5", False), ("5 gallons.", "5", True), ("AB", "ab", False),
        ("CO", "Co", False), (r"0.\overline{09}", r"0.\overline{9}", False), ("0,05", "0,5", False),
        ("0.(03)", "0.(3)", False), ("(1,000)", "(1,0)", False), ("xy = 1", "1", False),
        ("2mg", "2", False), (r"5\text{ MPa}", r"5\text{ mPa}", False), (r"5\text{k}", "5", False),
        (r"5\text{M}", "5", False), ("3 twentieths", "3", False), ("5 elevenths", "5", False),
        ("1 in twenty", "1", False), ("5 less than twelve", "5", False), ("7 sinx", "7", False),
        ("2 theta", "2", False), ("21 June", "21", False), ("3 times two meters", "3", False),
        ("$5", "€5", False), ("$5", r"5\text{ kg}", False), ("$5", "5", True),
        ("3€50", "350", False), ("5 m", "5", False), ("5 g", "5", False), ("5 kg", "5", True),
        ("5 mph", "5", True), ("12 inches", "12", True), (r"9\text{ m/s}^2", "9", True),
        ("45°30", "4530", False), ("1234{,}567", "1234567", False), ("0.333...,", "0.333", False),
        (r"\{1{,}5, 2{,}7\}", r"\{1{,}7, 2{,}5\}", False), (r"-\$5", "-5", True),
        (r"\{(1,\ln(2)),(3,\ln(4))\}", r"\{(1,\ln(4)),(3,\ln(2))\}", False),
        (r"\{Anna, eve\}", r"\{eve, anna\}", True), ("2 cos theta", "2", False),
        ("2 rs", "2", False), ("5 is wrong", "5", False), ("101 in binary", "101", False),
        ("2 sec theta", "2", False), ("5 k dollars", "5", False), ("3 sixes", "3", False),
        ("5 factorial ways", "5", False), ("2 twenties", "2", False), ("3$50", "350", False),
        ("-$5", "-€5", False), ("5$", "5", True), ("-0,5", "0,5", False), ("~p", "p", False),
        ("2.000,00 €", "2,00 €", False), ("(1;2)", "1;2", False), ("{}", "()", False),
        (r"\{1,5; 2,7\}", r"\{7,5; 2,1\}", False), ("3. 5", "3.5", False), ("5 .", "5", True),
        (r"\begin{pmatrix}1\end{pmatrix}+5", r"\begin{pmatrix}1\end{pmatrix}5", False),
        ("Mgh", "mgh", False), ("Ответ", "ответ", True), (r"5\text{ cm}.", "5", True),
        (r"12\text{ in}", "12", True), ("5 hrs", "5", True), ("6 months", "6", True),
        ("5 €", "5", True),
    ],
)  # fmt: skip
def test_answers_match_examples(left, right, same):
    assert answers_match(left, right) == answers_match(right, left) == same


def test_a_set_that_never_closes_is_passed_over_at_once():
    start = time.process_time()
    assert not answers_match(r"\{" + r"\frac" * 11 + "[", "5")
    assert time.process_time() - start < 1


def test_what_is_longer_than_a_thousand_characters_is_compared_as_it_stands():
    longest = "7" * 993
    assert len(longest + " apples") == 1000 and answers_match(longest + " apples", longest)
    assert not answers_match(longest + "7 apples", longest + "7")


def test_a_missing_answer_equals_nothing_not_even_another():
    assert (
        not answers_match(None, None)
        and not answers_match(None, "None")
        and not answers_match("x", None)
    )
    assert accuracy_reward(None, ["no answer here"], [None]) == [None]
    assert accuracy_reward(None, ["no answer here", r"\boxed{}"], ["7", "7"]) == [0.0, 0.0]
    golds = [math.nan, "", [], ["5"], ("5",), r"so \boxed{5}"]
    assert accuracy_reward(None, [r"\boxed{nan}"] * 3 + [r"\boxed{5}"] * 3, golds) == [
        None, None, None, 1.0, 1.0, 1.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{a{b}{c{d}}e}", "a{b}{c{d}}e"), (r"\boxed{3", None),
        (r"\boxed{3} and \boxed{4", "3"), (r"{ \boxed{5}", "5"), (r"} \boxed {6} }", "6"),
        (r"\boxed{\{7\}}", r"\{7\}"), (r"\boxed{\boxed{8}}", "8"), ("<answer> 9 </answer>", "9"),
        ("<answer>1</answer><answer>2</answer>", "2"), ("<answer>1</answer> <answer>2", "1"),
        ("#### 3 \nmore", "3"), ("#### 3\n#### 4", "4"), (r"<answer>\boxed{5}</answer>", "5"),
        (r"\boxed{ } <answer>6</answer>", "6"),
        (r"<think>\boxed{1}</think> <answer>2</answer>", "2"), ("I count 12345 ways", None),
        ("", None), ("####", None), ("</answer>7<answer>", None), ("7</answer>", None),
        ("<answer>7", None), (r"so \boxed 2", "2"), (r"\boxed is how", None),
        (r"\boxed 2\pi", None), (r"$\boxed 2$.", "2"), (r"\boxed 50\%", None),
        (r"\boxed 3 1/2", None),
        (r"\boxed{6} or \boxed{ }", "6"), ("#### **73**", "73"),
        ("#### 72, altogether", "72, altogether"), (r"\\boxed{5}", None), (r"\\\boxed{5}", "5"),
        (r"<answer>\(18\)</answer>", "18"), (r"<think>try \boxed{5}, no wait", None),
        (r"<think>\boxed{5}</think> so 6", None), (r"\boxed{5} <think> or \boxed{6}", "5"),
        ("#### 42 ####", "42"), ("<answer>5</answer><answer></answer>", "5"),
        (r"<answer>6</answer> \boxed{$$}", "6"),
    ],
)  # fmt: skip
def test_extract_answer_examples(text, answer):
    assert extract_answer(text) == answer


def test_reward_values_by_hand():
    def score(name, *completions, **columns):
        columns |= {"prompts": ["p"] * len(completions), "completions": list(completions)}
        return REWARDS[name](**columns)

    good = "<think>\nStep 1: add\n</think>\n<answer>3</answer>"
    bad = [good + " bye", "x" + good, good.replace("</think>", ""), good * 2]
    assert score("format", good, *bad) == [1, 0, 0, 0, 0]
    assert score("tag_count", good, "<think><think></think>", "") == [1.0, 0.25, 0.0]
    steps = ["1. a\n2. b\n3. c\n4. d", "First, a. Next, b.", "none"]
    assert score("reasoning_steps", *steps) == [1.0, 2 / 3, 0.0]
    repeats = ["a b c d", "a b c a b c", "A b"]
    assert score("repetition_penalty", *repeats) == [0.0, -0.25, 0.0]

    tokens = lambda *lengths: {"completion_ids": [[0] * n for n in lengths]}
    right, wrong, ones = "#### 1", "#### 2", {"answer": ["1"] * 4}
    got = score("length", right, wrong, right, wrong, **ones, **tokens(10, 20, 30, 20))
    assert got == [0.5, 0.0, -0.5, 0.0]
    two = {"prompts": ["p", "q"], "completions": [right] * 2, "answer": ["1"] * 2}
    assert REWARDS["length"](**two, **tokens(10, 20)) == [0, 0]  # each in a group of its own
    got = score("length", wrong, right, answer=["1"] * 2, **tokens(10, 20))
    assert got == [0.0, -0.5]  # short, but wrong
    got = score("cosine", right, right, right, wrong, **ones, **tokens(0, 50, 999, 0), max_len=100)
    assert got == pytest.approx([1.0, 0.75, 0.5, -1.0])
    got = score("cosine", wrong, wrong, answer=["1"] * 2, **tokens(50, 200), max_len=100)
    assert got == pytest.approx([-0.75, -0.5])
    over = {"max_completion_len": 100, "soft_punish_cache": 20}
    got = score("soft_overlong_penalty", *"abcde", **tokens(80, 81, 90, 100, 101), **over)
    assert got == [0.0, -0.05, -0.5, -1.0, -1.0]

    # the run's length, where there is one: then L = 80 and C = 20
    run = lambda n: {"trainer_state": types.SimpleNamespace(max_completion_length=n)}
    assert score("soft_overlong_penalty", "a", "b", **tokens(60, 70), **run(80)) == [0.0, -0.5]
    assert score("cosine", right, answer=["1"], **tokens(40), **run(80)) == pytest.approx([0.75])
    # a cache of one token, not of none
    assert score("soft_overlong_penalty", "a", "b", **tokens(1, 2), **run(2)) == [0.0, -1.0]
    # none: DAPO's 16384 and 4096; and 1000
    assert score("soft_overlong_penalty", "a", **tokens(14336)) == [-0.5]
    assert score("cosine", right, answer=["1"], **tokens(500)) == pytest.approx([0.75])
