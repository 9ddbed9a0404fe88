"""The kit bites, and does not cry wolf."""

import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

import grpo_lora
import lora
from checks import conformance
from checks.conformance import FAIL, PASS, check_adapter, loss_as, random_batch, require
from checks.gallery import GALLERY, HERE, source_patched
from grpo_lora import AGGREGATION, VARIANTS, GRPOConfig, grpo_loss

OURS = {"scale": "group", "eps": 1e-4, "ddof": 1, "loss_type": "dapo", "kl_estimator": "k3"}
OURS |= {"use_bias_correction_kl": True, "epsilon": 0.2, "missing": "left_out", "init": "kaiming"}


def our_adapter(g=grpo_lora, own_lora=lora, declares=OURS):
    """An adapter around this project's own functions."""

    def lora_linear(base, r, alpha):
        model = nn.Sequential(base)
        own_lora.apply_lora(model, own_lora.LoRAConfig(r=r, lora_alpha=alpha))
        return model[0]

    names = ("group_advantages", "completion_mask", "kl_penalty", "grpo_loss")
    functions = {name: getattr(g, name) for name in names}
    return SimpleNamespace(DECLARES=declares, lora_linear=lora_linear, **functions)


def failed(adapter) -> list[str]:
    return [f"{s.about}: {s.what}" for s in check_adapter(adapter) if s.status == FAIL]


@pytest.mark.parametrize("declares", [OURS, {}])
def test_our_own_functions_pass_and_are_recognised(declares):
    found = check_adapter(our_adapter(declares=declares))
    assert {s.status for s in found if s.kind != "robustness"} == {PASS}
    words = [line for s in found if s.kind == "definition" for line in s.details]
    assert any("scale group, eps 0.0001, ddof 1" in line for line in words)
    assert any(line.endswith(": dapo") for line in words) and "this is k3, times ρ" in words


FUNCTIONS = {
    "grpo_lora.py": ("group_advantages", "_nanstd", "completion_mask", "kl_penalty", "grpo_loss"),
    "lora.py": ("LoRALinear", "apply_lora", "make_adapters", "_insert"),
}
ELSEWHERE = {  # patches in these functions of what an adapter cannot show
    "reentrant", "DoRA", "merge", "dropout", "bound to no module", "alpha/sqrt(r)", "PiSSA",
    "tied embedding", "not restored", "disable re-enables", "a mask that is not its own",
    "no reward at all", "carry a gradient", "float16", "MaxRL's advantages",
}  # fmt: skip


SOURCES = {file: (HERE / file).read_text() for file in FUNCTIONS}
TREES = {file: ast.parse(source) for file, source in SOURCES.items()}


def lies_within(bug) -> bool:
    source = SOURCES[bug.file]
    at = source[: source.index(bug.right)].count("\n") + 1
    nodes = [n for n in TREES[bug.file].body if getattr(n, "name", "") in FUNCTIONS[bug.file]]
    return any(n.lineno <= at <= n.end_lineno for n in nodes)


KNOWN = [
    bug for bug in GALLERY
    if bug.file in FUNCTIONS and lies_within(bug) and not any(w in bug.what for w in ELSEWHERE)
]  # fmt: skip


def test_many_bugs_of_the_gallery_live_in_these_functions():
    assert len(KNOWN) >= 12, [bug.what for bug in KNOWN]


@pytest.mark.parametrize("bug", KNOWN, ids=[f"{b.number}-{b.what[:40]}" for b in KNOWN])
def test_a_bug_of_the_gallery_is_caught(bug):
    with source_patched(bug.file, bug.right, bug.wrong):
        import grpo_lora as patched
        import lora as patched_lora

        adapter = our_adapter(patched, patched_lora)
        found = conformance.check_adapter(adapter)
        by_rows = lambda *args, **kl: patched.grpo_loss(*args, loss_type="grpo", **kl)
        found += conformance.check_grpo_loss(by_rows, {"loss_type": "grpo"})
    bad = [
        s
        for s in found
        if s.status == FAIL or (s.status == "warning" and "94 nats apart" not in s.what)
    ]
    assert bad, bug.what


# ------------------------------------------------------------------- right, and written differently


def as_adapter(**settings):
    def loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
        options = {"max_completion_length": mask.shape[1], "beta": beta, "ref_logps": ref_logps}
        return grpo_loss(logps, old_logps, advantages, mask, **options | settings)[0]

    return SimpleNamespace(grpo_loss=loss)


OBJECTIVE = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "opmd_tau",
)


@pytest.mark.parametrize("loss_type", sorted(set(AGGREGATION) - {"bnpo"}))
@pytest.mark.parametrize("declared", [False, True])
def test_every_loss_type_is_recognised(loss_type, declared):
    settings = {"loss_type": loss_type} | ({"epsilon_high": 5.0} if loss_type == "cispo" else {})
    adapter = as_adapter(**settings)
    adapter.DECLARES = {"loss_type": loss_type} if declared else {}
    found = check_adapter(adapter)
    assert not [s for s in found if s.status == FAIL], failed(adapter)
    (definition,) = [s for s in found if s.what == "the definition"]
    assert definition.details[0].endswith(f": {loss_type}")


@pytest.mark.parametrize("name", ["gspo", "dapo", "grpo"])
def test_a_papers_settings_are_recognised(name):
    config = GRPOConfig(**VARIANTS[name].settings)
    adapter = as_adapter(**{key: getattr(config, key) for key in OBJECTIVE})
    assert not failed(adapter)
    adapter.DECLARES = {"loss_type": "dr_grpo"}
    assert any("the definition" in line for line in failed(adapter))


def numpy_advantages(rewards):
    R = numpy.asarray(rewards, dtype="float64")
    spread = R.max(1, keepdims=True) - R.min(1, keepdims=True)
    A = (R - R.mean(1, keepdims=True)) / (R.std(1, keepdims=True) + 1e-8)
    return numpy.where(spread > 0, A, 0)


def float32_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    logps, old, A = logps.float(), old_logps.float(), advantages.float()
    total = logps.new_zeros(())
    for i in range(len(logps)):
        row = logps.new_zeros(())
        for t in range(logps.shape[1]):
            if mask[i, t]:
                rho = torch.exp(logps[i, t] - old[i, t])
                bound = torch.clamp(rho, 0.8, 1.28)
                row = row - torch.minimum(rho * A[i], bound * A[i])
                if beta:
                    d = ref_logps[i, t].float() - logps[i, t]
                    row = row + beta * (torch.exp(d) - 1 - d)
        total = total + row / max(1, int(mask[i].sum()))
    return total / len(logps)


def numpy_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    x, old, m = (numpy.asarray(v, dtype="float64") for v in (logps, old_logps, mask))
    A = numpy.asarray(advantages, dtype="float64")[:, None]
    rho = numpy.exp(numpy.where(m > 0, x - old, 0))
    loss = -numpy.minimum(rho * A, numpy.clip(rho, 0.8, 1.2) * A)
    return float((loss * m).sum() / max(m.sum(), 1))


def loss_of_numbers(logps, old_logps, advantages, mask):
    """It wants a mask of numbers, returns one number in a list of them, and knows no KL."""
    rho, A = (logps - old_logps).masked_fill((1 - mask).bool(), 0).exp(), advantages[:, None]
    loss = -torch.min(rho * A, rho.clamp(0.8, 1.2) * A)
    return ((loss * mask).sum() / mask.sum()).reshape(1)


def int_mask(completion_ids, eos_token_ids):
    rows = []
    for row in completion_ids.tolist():
        end = min((row.index(e) for e in eos_token_ids if e in row), default=len(row))
        rows.append([1 if i <= end else 0 for i in range(len(row))])
    return rows


def abs_safe_k1(logps, ref_logps):
    return numpy.asarray(logps) - numpy.asarray(ref_logps)


class Adapted(nn.Module):
    """LoRA with its matrices the other way round, and A zero in place of B."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(base.in_features, r))
        self.up = nn.Parameter(torch.randn(r, base.out_features))
        self.s = alpha / r

    def forward(self, x):
        return self.base(x) + self.s * (x @ self.down) @ self.up


def test_right_implementations_of_other_definitions_do_not_fail():
    one = SimpleNamespace(
        group_advantages=numpy_advantages, grpo_loss=float32_loss, completion_mask=int_mask,
        kl_penalty=abs_safe_k1, lora_linear=Adapted,
    )  # fmt: skip
    assert not failed(one)
    said = [line for s in check_adapter(one) for line in s.details]
    assert any("eps 1e-08, ddof 0" in line for line in said)
    assert any("epsilon 0.2, epsilon_high 0.28: grpo" in line for line in said)
    assert "this is k3, not times ρ" in said and "this is k1" in said
    one.DECLARES = {"eps": 1e-8, "ddof": 0, "loss_type": "grpo", "epsilon_high": 0.28}
    one.DECLARES |= {"kl_estimator": "k3", "use_bias_correction_kl": False}
    one.kl_penalty = grpo_lora.kl_penalty
    assert not failed(one)
    for function in (numpy_loss, loss_of_numbers):
        two = SimpleNamespace(grpo_loss=function, DECLARES={"loss_type": "dapo"})
        assert not failed(two)


# -------------------------------------------------------------------- wrong, and none of the gallery


def wrong_sign(logps, old_logps, advantages, mask, **kl):
    return -grpo_loss(logps, old_logps, advantages, mask, **kl)[0]


def max_for_min(logps, old_logps, advantages, mask, **kl):
    rho, A = (logps - old_logps).exp(), advantages.unsqueeze(1)
    return (-torch.max(rho * A, rho.clamp(0.8, 1.2) * A) * mask).sum() / mask.sum()


def clamp_alone(logps, old_logps, advantages, mask, **kl):
    rho = (logps - old_logps).exp().clamp(0.8, 1.2)
    return (-rho * advantages.unsqueeze(1) * mask).sum() / mask.sum()


def no_mask(logps, old_logps, advantages, mask, **kl):
    rho, A = (logps - old_logps).exp(), advantages.unsqueeze(1)
    return -torch.min(rho * A, rho.clamp(0.8, 1.2) * A).mean()


def swapped_kl(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    loss = grpo_loss(logps, old_logps, advantages, mask)[0]
    if beta:
        d = logps - ref_logps
        loss = loss + beta * ((d.exp() - 1 - d) * mask).sum() / mask.sum()
    return loss


def detached(logps, old_logps, advantages, mask, **kl):
    return grpo_loss(logps.detach(), old_logps, advantages, mask)[0] + 0 * logps.sum()


@pytest.mark.parametrize(
    "function", [wrong_sign, max_for_min, clamp_alone, no_mask, swapped_kl, detached]
)
def test_a_wrong_loss_fails_whatever_is_declared(function):
    for declares in ({}, {"loss_type": "dapo"}):
        assert failed(SimpleNamespace(grpo_loss=function, DECLARES=declares))


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_advantages": lambda R: R},
        {"group_advantages": lambda R: (R - R.mean()) / (R.std() + 1e-4)},
        {"group_advantages": lambda R: (R - R.mean(1, True)) / R.std(1, keepdim=True)},
        {"group_advantages": lambda R: -(R - R.mean(1, True)) / (R.std(1, keepdim=True) + 1e-4)},
        {"group_advantages": lambda R: (R - R.mean(0)) / (R.std(0) + 1e-4)},
        {"completion_mask": lambda ids, eos: ids != eos[0]},
        {"completion_mask": lambda ids, eos: (ids == eos[0]).cumsum(1) == 0},
        {
            "completion_mask": lambda ids, eos: (
                ((ids == eos[0]).cumsum(1) - (ids == eos[0]).int()) == 0
            )
        },
        {"kl_penalty": lambda p, q: (p - q).exp() - (p - q) - 1},
        {"kl_penalty": lambda p, q: q - p},
        {"kl_penalty": lambda p, q: (q - p).exp() - (q - p)},
        {"lora_linear": lambda base, r, alpha: base},
        {"lora_linear": lambda base, r, alpha: Adapted(base, r, alpha * r)},
        {"lora_linear": lambda base, r, alpha: Adapted(base, r, alpha).requires_grad_(True)},
    ],
)
def test_a_wrong_function_fails(wrong):
    assert failed(SimpleNamespace(DECLARES={}, **wrong))


def clamped_k3(logps, ref_logps):
    d = (ref_logps - logps).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def alone_keeps_its_reward(rewards):
    return grpo_lora.group_advantages(rewards) if rewards.shape[1] > 1 else rewards


def sapo_with_a_stopped_gate(logps, old_logps, advantages, mask, **kl):
    A, ratio = advantages.unsqueeze(1), (logps - old_logps).masked_fill(~mask, 0).exp()
    loss = -4 * torch.sigmoid(ratio - 1).detach() * A * logps
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("adapter", "declared", "not_declared", "words"),
    [
        ({"kl_penalty": clamped_k3}, {"kl_clamp": 10.0}, {"kl_clamp": 20.0}, "clamped at 10"),
        ({"kl_penalty": grpo_lora.kl_penalty}, {"kl_clamp": None}, {"kl_clamp": 10.0}, "not clamped"),
        ({"group_advantages": alone_keeps_its_reward}, {"group_of_one": "reward"},
         {"group_of_one": 0.0}, "declared reward"),
        ({"group_advantages": grpo_lora.group_advantages}, {"group_of_one": 0.0},
         {"group_of_one": "reward"}, "declared 0"),
    ],
)  # fmt: skip
def test_what_is_declared_is_matched_or_fails(adapter, declared, not_declared, words):
    found = check_adapter(SimpleNamespace(DECLARES=declared, **adapter))
    assert not [s for s in found if s.status == FAIL]
    assert any(words in line for s in found for line in s.details)
    assert failed(SimpleNamespace(DECLARES=not_declared, **adapter))
    assert not failed(SimpleNamespace(DECLARES={}, **adapter))


def test_the_slopes_of_a_declared_soft_surrogate_are_compared():
    wrong = SimpleNamespace(grpo_loss=sapo_with_a_stopped_gate, DECLARES={"surrogate": "sapo"})
    assert "grpo_loss: sapo's slopes at ratios 0.2, 1 and 9" in failed(wrong)


# --------------------------------------------- verdicts on what people write, right and wrong


def parts_of(logps, old_logps, advantages, mask):
    """ratio, A and mask as numbers: what each of the losses below starts from."""
    m = mask.to(logps.dtype)
    return ((logps - old_logps) * m).exp(), advantages.unsqueeze(1), m


def clipped(ratio, A, low=0.2, high=0.2):
    return -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def per_row_gspo(logps, old_logps, advantages, mask, **kl):
    m = mask.to(logps.dtype)
    ratio = (((logps - old_logps) * m).sum(1) / m.sum(1).clamp(min=1)).exp()
    return clipped(ratio, advantages, 3e-4, 4e-4).mean()


def per_row_gmpo(logps, old_logps, advantages, mask, **kl):
    m, A = mask.to(logps.dtype), advantages.unsqueeze(1)
    gap = (logps - old_logps) * m
    c = torch.where(A > 0, gap.clamp(max=0.4), gap.clamp(min=-0.4))
    return -(advantages * (c.sum(1) / m.sum(1).clamp(min=1)).exp()).mean()


def divided_by(divisor, estimator="k3", factor=1.0, sign=1.0):
    def loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
        ratio, A, m = parts_of(logps, old_logps, advantages, mask)
        each = clipped(ratio, A)
        if beta:
            d = (ref_logps - logps) * m
            each = each + sign * beta * {"k3": d.exp() - 1 - d, "k1": -d}[estimator]
        return factor * (each * m).sum() / (divisor or len(m) * 0 + m.sum())

    return loss


def dr_grpo(divisor):
    return lambda *batch, **kl: divided_by(divisor * len(batch[0]))(*batch, **kl)


def soft(kind, **numbers):
    def loss(logps, old_logps, advantages, mask, **kl):
        ratio, A, m = parts_of(logps, old_logps, advantages, mask)
        logp, gap = logps * m, (logps - old_logps) * m
        if kind == "cispo":
            each = -ratio.clamp(max=numbers["cap"]).detach() * A * logp
        elif kind == "opmd":
            each = -A * logp + numbers["tau"] / 2 * gap.square()
        elif kind == "sapo":
            tau = torch.where(A > 0, numbers["pos"], numbers["neg"])
            each = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
        else:
            moved = (logp.exp() - (old_logps * m).exp()).detach()
            near = torch.where(A > 0, moved <= numbers["eps"], moved >= -numbers["eps"])
            each = -(ratio.clamp(max=20) * near).detach() * A * logp
        if kind == "sapo":
            return ((each * m).sum(1) / m.sum(1).clamp(min=1)).mean()
        return (each * m).sum() / m.sum()

    return loss


def whitened(rewards):
    x = rewards - rewards.mean(dim=1, keepdim=True)
    return x / (x.std() + 1e-4)


def constant_without_advantage(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
    if not advantages.any():
        return torch.tensor(0.0)
    return grpo_loss(logps, old_logps, advantages, mask, ref_logps=ref_logps, beta=beta)[0]


@torch.jit.script
def scripted(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    m = mask.to(logps.dtype)
    A, ratio = advantages.unsqueeze(1), ((logps - old_logps) * m).exp()
    return (-torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A) * m).sum() / m.sum()


class Merging(nn.Linear):
    """loralib's way: the adapter is in the layer, and eval() adds it to the weight."""

    def __init__(self, base, r, alpha):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.requires_grad_(False)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, base.in_features), a=5**0.5))
        self.B, self.s, self.merged = (
            nn.Parameter(torch.zeros(base.out_features, r)),
            alpha / r,
            False,
        )

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.s * (self.B @ self.A).data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        own = super().forward(x)
        return own if self.merged else own + self.s * x @ self.A.T @ self.B.T


class Parametrised(nn.Module):
    """minLoRA's way: the weight is computed from its parts."""

    def __init__(self, weight, r, alpha):
        super().__init__()
        out, size = weight.shape
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, size), a=5**0.5))
        self.B, self.s = nn.Parameter(torch.zeros(out, r)), alpha / r

    def forward(self, W):
        return W + self.s * self.B @ self.A


def parametrised(base, r, alpha):
    base.requires_grad_(False)
    nn.utils.parametrize.register_parametrization(
        base, "weight", Parametrised(base.weight, r, alpha)
    )
    return base


RIGHT = {
    "gspo by row": ({"grpo_loss": per_row_gspo}, {"level": "sequence"}, "gspo"),
    "gspo by row, undeclared": ({"grpo_loss": per_row_gspo}, {}, "gspo"),
    "gmpo by row": ({"grpo_loss": per_row_gmpo}, {"loss_type": "gmpo"}, "gmpo"),
    "divisor 1024": ({"grpo_loss": dr_grpo(1024)}, {"loss_type": "dr_grpo"}, "divisor 1024"),
    "divisor declared": ({"grpo_loss": dr_grpo(64)}, {"loss_type": "dr_grpo", "divisor": 64},
                         "divisor 64"),
    "accumulated": ({"grpo_loss": divided_by(None, factor=1 / 8)}, {}, "k3, not times ρ"),
    "by items": ({"grpo_loss": divided_by(640)}, {}, "k3, not times ρ"),
    "cispo 6": ({"grpo_loss": soft("cispo", cap=6.0)}, {"loss_type": "cispo", "epsilon_high": 6.0},
                "cap 6"),
    "cispo 1.28": ({"grpo_loss": soft("cispo", cap=1.28)},
                   {"loss_type": "cispo", "epsilon_high": 1.28}, "cap 1.28"),
    "cispo, undeclared": ({"grpo_loss": soft("cispo", cap=6.0)}, {}, "cap 6"),
    "dppo .25": ({"grpo_loss": soft("dppo", eps=0.25)}, {}, "epsilon 0.25"),
    "dppo type": ({"grpo_loss": soft("dppo", eps=0.25)}, {"loss_type": "dppo"}, "epsilon 0.25"),
    "opmd .3": ({"grpo_loss": soft("opmd", tau=0.3)}, {"loss_type": "opmd"}, "opmd_tau 0.3"),
    "sapo": ({"grpo_loss": soft("sapo", pos=0.5, neg=2.0)}, {"loss_type": "sapo"}, "tau 0.5 and 2"),
    "constant": ({"grpo_loss": constant_without_advantage}, {"loss_type": "dapo"}, "dapo"),
    "whitened": ({"group_advantages": whitened}, {}, "scale whitened"),
    "batch, eps .1": ({"group_advantages": lambda R: (R - R.mean(1, True)) / (R.std() + 0.1)},
                      {"scale": "batch", "eps": 0.1}, "eps 0.1"),
    "a list of rows": ({"group_advantages": lambda R: [*grpo_lora.group_advantages(R)],
                        "completion_mask": lambda ids, eos: [*grpo_lora.completion_mask(ids, eos)]},
                       {}, "scale group"),
    "merged by eval": ({"lora_linear": Merging}, {}, "alpha / r"),
    "parametrised": ({"lora_linear": parametrised}, {}, "alpha / r"),
    "two divisors": ({"grpo_loss": dr_grpo(1024), "group_advantages": grpo_lora.group_advantages},
                     {"loss_type": "dr_grpo", "divisor": 1024}, "divisor 1024"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_does_not_fail_and_is_called_by_its_name(name):
    functions, declares, words = RIGHT[name]
    found = check_adapter(SimpleNamespace(DECLARES=declares, **functions))
    bad = [(s.about, s.what, s.details) for s in found if s.status == FAIL]
    assert not bad
    said = [line for s in found if s.kind == "definition" for line in s.details]
    assert any(words in line for line in said), said


def with_kl(penalty):
    """The default loss, and a penalty of its own."""

    def loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0):
        ratio, A, m = parts_of(logps, old_logps, advantages, mask)
        surrogate = clipped(ratio, A)
        own = (surrogate * m).sum() / m.sum()
        if not beta:
            return own
        d = ref_logps - logps
        return own + beta * penalty(d.exp() - 1 - d, ratio, A, m)

    return loss


class Detached(nn.Module):
    """LoRA whose layers below get no gradient."""

    def __init__(self, base, r, alpha, base_too):
        super().__init__()
        self.inner, self.base_too = Adapted(base, r, alpha), base_too

    def forward(self, x):
        if self.base_too:
            with torch.no_grad():
                own = self.inner.base(x)
        else:
            own, x = self.inner.base(x), x.detach()
        return own + self.inner.s * (x @ self.inner.down) @ self.inner.up


def leaves(*batch, **kl):
    raise SystemExit(0)


WRONG = {
    "KL without gradient": with_kl(lambda k, ratio, A, m: (k.detach() * m).sum() / m.sum()),
    "KL unmasked": with_kl(lambda k, ratio, A, m: k.sum() / m.sum()),
    "KL of bad rows alone": with_kl(lambda k, ratio, A, m: (k * m * (A <= 0)).sum() / m.sum()),
    "KL where not clipped": with_kl(
        lambda k, ratio, A, m: (k * m * ~((ratio > 1.2) & (A > 0))).sum() / m.sum()
    ),
    "KL subtracted": divided_by(1024, sign=-1.0),
    "KL subtracted, k1 declared": divided_by(1024, sign=-1.0),
    "the process ends": leaves,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_penalty_fails(name):
    assert failed(SimpleNamespace(grpo_loss=WRONG[name], DECLARES={}))


@pytest.mark.parametrize("base_too", [True, False])
def test_an_adapter_that_cuts_the_gradient_below_it_fails(base_too):
    made = lambda base, r, alpha: Detached(base, r, alpha, base_too)
    assert failed(SimpleNamespace(lora_linear=made)) == [
        "lora_linear: what it adds is low-rank and linear"
    ]


def dual_clip(bound):
    return lambda *batch, **kl: grpo_loss(*batch, delta=bound)[0]


def test_a_declared_dual_clip_is_compared():
    what = "grpo_loss: delta (dual clip)"
    for function, delta in ((3.0, 3.0), (None, None)):
        adapter = SimpleNamespace(grpo_loss=dual_clip(function), DECLARES={"delta": delta})
        assert not failed(adapter)
    for function, delta in ((None, 3.0), (3.0, 5.0), (3.0, 10.0), (3.0, None)):
        adapter = SimpleNamespace(grpo_loss=dual_clip(function), DECLARES={"delta": delta})
        assert what in failed(adapter)


def test_a_loss_over_the_width_of_the_batch_is_said_to_shrink_with_padding():
    by_width = lambda *batch, **kl: dr_grpo(batch[0].shape[1])(*batch, **kl)
    found = check_adapter(SimpleNamespace(grpo_loss=by_width, DECLARES={}))
    assert not [s for s in found if s.status == FAIL]
    warned = [s for s in found if s.what == "more padding changes nothing"]
    assert [s.status for s in warned] == ["warning"]
    found = check_adapter(SimpleNamespace(grpo_loss=dr_grpo(64), DECLARES={}))
    assert [s.status for s in found if s.what == "more padding changes nothing"] == [PASS]


def test_a_scripted_loss_is_judged():
    """TorchScript gives the min of two equal numbers no gradient, so that ratio 1 has none."""
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    one, mask = torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    slopes = [torch.autograd.grad(scripted(x, x.detach(), one, mask), x)[0] for _ in range(5)]
    found = check_adapter(SimpleNamespace(grpo_loss=scripted, DECLARES={"loss_type": "dapo"}))
    bad = [s.what for s in found if s.status == FAIL]
    assert "it can be judged" not in bad
    assert ("at ratio 1 the gradient is along -A ∇logp" in bad) == bool((slopes[-1] == 0).all())


def raises(*batch, **kl):
    raise RuntimeError("no such shape")


@pytest.mark.parametrize(
    ("functions", "declares"),
    [
        ({"group_advantages": lambda R: (R - R.mean(1, True)) / [1][R.shape[1] == 1]},
         {"group_of_one": 0.0}),
        ({"group_advantages": lambda R: raises() if R.isnan().any() else R - R.mean(1, True)},
         {"missing": "left_out"}),
        ({"grpo_loss": lambda *b, **k: raises() if b[0].shape[1] == 1 else soft("cispo", cap=5.0)(*b)},
         {"loss_type": "cispo", "epsilon_high": 5.0}),
        ({"grpo_loss": lambda *b, **k: grpo_loss(*b, **k)[0]}, {"kl_estimator": "abs"}),
        ({"lora_linear": leaves}, {}),
    ],
)  # fmt: skip
def test_what_raises_fails_and_ends_nothing(functions, declares):
    adapter = SimpleNamespace(DECLARES=declares, **functions)
    assert failed(adapter)


# -------------------------------------------------------------------------------------- the command


ADAPTER = f"""import sys
sys.path.insert(0, {str(HERE)!r})
from grpo_lora import group_advantages, kl_penalty
DECLARES = {{"eps": 1e-4}}
"""


def test_the_command_prints_a_line_each_and_its_status_tells(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(ADAPTER)
    assert conformance.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "this is scale group, eps 0.0001, ddof 1" in said and "not defined" in said
    assert conformance.main([str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"about", "kind", "what", "status", "details", "gallery"} == rows[0].keys()
    path.write_text(ADAPTER.replace("1e-4", "1e-6"))
    assert conformance.main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said and "declared eps = 1e-06" in said
    path.write_text("def completion_mask(ids, eos):\n    return ids == ids\n")
    assert conformance.main([str(path)]) == 1
    said = capsys.readouterr().out
    for words in (
        "input: completion_ids = [[2, 2]]",
        "got:   [[1, 1]]",
        "right: [[1, 0]]",
        "GALLERY",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"), ("x = 1", "defines none of group_advantages"),
        ("import no_such_module", "ModuleNotFoundError"), ("1 +", "SyntaxError"),
        (ADAPTER + "DECLARES = {'epz': 1}", "'epz' is unknown"),
        (ADAPTER + "DECLARES = {'loss_type': 'ppo'}", "loss_type 'ppo' is none of"),
        (ADAPTER + "DECLARES = 3", "DECLARES is a int"),
        (ADAPTER + "DECLARES = {'kl_estimator': 'low_var_kl'}", "'low_var_kl' is none of k1, k2"),
        (ADAPTER + "DECLARES = {'scale': 'global_std'}", "'global_std' is none of group, batch"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_loaded_gets_one_line_and_status_2(text, words, tmp_path, capsys):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert conformance.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("error: ")


def test_what_stands_beside_an_adapter_is_what_it_imports(tmp_path):
    source = (HERE / "grpo_lora.py").read_text().replace("-torch.min(bounded", "torch.min(bounded")
    (tmp_path / "grpo_lora.py").write_text(source)
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from grpo_lora import grpo_loss\nprint('loaded')\n\n@dataclass\nclass Own:\n    x: int = 1\n"
    )
    command = [sys.executable, "-m", "checks.conformance", str(tmp_path / "mine.py"), "--json"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    bad = [row["what"] for row in json.loads(done.stdout) if row["status"] == FAIL]
    assert "at ratio 1 the gradient is along -A ∇logp" in bad and "loaded" in done.stderr


def test_from_pytest():
    require(conformance.check_advantages(grpo_lora.group_advantages, {"eps": 1e-4}))
    with pytest.raises(AssertionError, match="their mean in each group is 0"):
        require(conformance.check_advantages(lambda rewards: rewards))


@pytest.mark.parametrize("loss_type", AGGREGATION)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_kits_own_loss_is_that_of_grpo_lora(loss_type, level, beta):
    for seed in range(3):
        logps, old, A, mask, ref = random_batch(seed, spread=0.6)
        mask[2] = False
        surrogate, aggregation = conformance.TYPES[loss_type]
        d = {**conformance.LOSS, "surrogate": surrogate, "aggregation": aggregation, "level": level}
        high = 2.0 if loss_type == "cispo" else 0.3
        d |= {"epsilon_high": high, "divisor": 4, "delta": 1.5 if surrogate == "clip" else None}
        options = {"loss_type": loss_type, "importance_sampling_level": level, "delta": d["delta"]}
        options |= {"epsilon_high": high, "max_completion_length": 4, "beta": beta}
        ours, _ = grpo_loss(logps, old, A, mask, ref_logps=ref, **options)
        torch.testing.assert_close(loss_as(logps, old, A, mask, ref, beta, d), ours)
