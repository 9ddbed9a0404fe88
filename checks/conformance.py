"""Check yours: is another implementation of GRPO and LoRA right, and which definition is it?

    python -m checks.conformance FILE.py [--json]

FILE.py is an adapter, some ten lines around your own code. It may define any of these:

    DECLARES = {"eps": 1e-6, "ddof": 0}     # the definition it implements, as far as you know it
    def group_advantages(rewards): ...                           # (P, G) -> (P, G)
    def completion_mask(completion_ids, eos_token_ids): ...      # (B, T), a list of ids -> (B, T)
    def kl_penalty(logps, ref_logps): ...                        # (B, T), (B, T) -> (B, T)
    def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0): ...   # -> scalar
    def lora_linear(base, r, alpha): ...    # nn.Linear -> nn.Module with a trainable low-rank part

There are three kinds of statement. A *universal* one holds for every right implementation: where it
fails there is a bug. A *definition* is a choice, as of eps: the kit finds out which one yours is, and
fails only where it is not what you declared. *Robustness* gives warnings.

Your functions get torch tensors in float64 (float32 where that is the question). They may compute in
another precision, or in numpy or JAX. Gradients are autograd's where there are any, else finite
differences. Exit status: 0 no FAIL, 1 a FAIL, 2 the adapter cannot be loaded.

From pytest: `require(check_grpo_loss(my_loss, {"loss_type": "dapo"}))`, and likewise
check_advantages, check_mask, check_kl and check_lora.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

PASS, FAIL, DIFFERS, WARNING = "pass", "FAIL", "differs by definition", "warning"
NOT_DEFINED = "not defined"
NEAR = 2e-3  # so far a right implementation in float32 may be off, relative to the largest number


@dataclass
class Statement:
    """One thing that was checked. `details` are lines: the smallest input, got, right, equation."""

    about: str  # the adapter's function
    kind: str  # universal, definition or robustness
    what: str
    status: str
    details: list[str]
    gallery: list[int]  # numbers of bugs that look like this


class Findings:
    """Statements about one function, in the order in which they are made."""

    def __init__(self, about: str) -> None:
        self.about, self.all = about, list[Statement]()

    def add(self, kind: str, what: str, status: str, *details: str, gallery: Any = ()) -> None:
        shown = list(details) if status != PASS or kind == "definition" else []
        self.all.append(Statement(self.about, kind, what, status, shown, list(gallery)))

    @contextlib.contextmanager
    def universal(
        self, what: str, equation: str, gallery: Any = ()
    ) -> Iterator[Callable[..., None]]:
        """Within it, call wrong(input, got, right) for the first counter-example."""
        found: list[str] = []

        def wrong(given: Any, got: Any, right: Any) -> None:
            if not found:
                found.extend(
                    [f"input: {show(given)}", f"got:   {show(got)}", f"right: {show(right)}"]
                )

        try:
            yield wrong
        except (Exception, SystemExit) as error:
            first, gallery = str(error).partition("\n")[0], ()
            found.append(f"raised {type(error).__name__}: {first}")
        status = FAIL if found else PASS
        self.add("universal", what, status, *found, f"equation: {equation}", gallery=gallery)

    def warn(self, what: str, attempt: Callable[[], str | None]) -> None:
        """A warning where the attempt raises, or returns words."""
        try:
            words = attempt()
        except (Exception, SystemExit) as error:
            words = (
                f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        self.add("robustness", what, WARNING if words else PASS, *([words] if words else []))


def show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {show(x)}" for name, x in value.items())
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    return str(value)


def tensor(value: Any) -> Tensor:
    """What an adapter returned, as float64: a tensor, an array of any library, a number."""
    shapes = [getattr(x, "shape", None) for x in value] if isinstance(value, list) else []
    if shapes and shapes[0] and shapes == shapes[:1] * len(shapes):
        value = torch.stack([tensor(row) for row in value])  # a list of rows
    elif isinstance(value, tuple) or (shapes and shapes[0] is not None):
        value = value[0]  # a loss with its metrics
    if not isinstance(value, Tensor):
        import numpy

        value = torch.from_numpy(numpy.array(value, dtype="float64"))
    return value.detach().cpu().to(torch.float64)


def near(got: Tensor, right: Tensor, tolerance: float = NEAR) -> bool:
    if got.shape != right.shape or not got.isfinite().all():
        return False
    return bool((got - right).abs().max() <= tolerance * max(1e-3, float(right.abs().max())))


def require(findings: list[Statement]) -> None:
    """For pytest: AssertionError with the statements that fail."""
    failed = [
        line for s in findings if s.status == FAIL for line in (f"{s.about}: {s.what}", *s.details)
    ]
    assert not failed, "\n".join(failed)


def check_declared(declares: dict[str, Any], known: dict[str, Any]) -> None:
    """Raises ValueError for a name, or a value, that means nothing to the kit."""
    choices: dict[str, Any] = {
        "scale": ADVANTAGE_SCALES, "loss_type": TYPES, "surrogate": SURROGATES,
        "aggregation": AGGREGATIONS, "level": ("token", "sequence"), "kl_estimator": ESTIMATORS,
        "empty_rows": ("counted", "dropped"), "cap": ("absolute", "1 + epsilon"),
        "init": ("kaiming", "gaussian"), "missing": ("left_out",),
    }  # fmt: skip
    for name, value in declares.items():
        if name not in known:
            raise ValueError(f"DECLARES: {name!r} is unknown (all: {', '.join(known)})")
        allowed = choices.get(name)
        if name == "divisor" and isinstance(value, str):
            allowed = DIVISORS
        if allowed and value is not None and value not in list(allowed):
            raise ValueError(f"DECLARES: {name} {value!r} is none of {', '.join(allowed)}")


# ------------------------------------------------------------------------------------- advantages

# batch: by the std of all rewards; whitened: by that of all R - mean_g (REINFORCE++ baseline)
ADVANTAGE_SCALES = ("group", "batch", "none", "mean", "leave_one_out", "whitened")
EPSILONS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# the definition of grpo_lora.py; the divisor may also be √(std² + eps) or max(std, eps)
ADVANTAGES = {"scale": "group", "eps": 1e-4, "ddof": 1, "divisor": "std + eps"}
DIVISORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "std + eps": lambda std, eps: std + eps,
    "sqrt(var + eps)": lambda std, eps: (std.square() + eps).sqrt(),
    "max(std, eps)": lambda std, eps: std.clamp(min=eps),
}


def advantages_as(rewards: Tensor, scale: str, eps: float, ddof: int, divisor: str) -> Tensor:
    """(P, G) -> (P, G), by one of the known definitions."""
    mean = rewards.mean(dim=1, keepdim=True)
    divide = lambda std: DIVISORS[divisor](std, eps)
    G = rewards.shape[1]
    if scale == "none":
        A = rewards - mean
    elif scale == "leave_one_out":
        A = (rewards - mean) * G / (G - 1)
    elif scale == "mean":
        A = torch.where(mean == 0, 0.0, (rewards - mean) / mean)
    elif scale in ("batch", "whitened"):
        spread = rewards if scale == "batch" else rewards - mean
        A = (rewards - mean) / divide(spread.std(correction=ddof))
    else:
        A = (rewards - mean) / divide(rewards.std(dim=1, keepdim=True, correction=ddof))
    return torch.where(rewards == rewards[:, :1], A * (rewards != mean), A)


def definitions_of_advantages() -> Iterator[dict[str, Any]]:
    for scale in ADVANTAGE_SCALES:
        if scale in ("group", "batch", "whitened"):
            for eps, ddof in itertools.product(EPSILONS, (1, 0)):
                yield {"scale": scale, "eps": eps, "ddof": ddof}
            for eps, ddof, divisor in itertools.product(EPSILONS[1:], (1, 0), list(DIVISORS)[1:]):
                yield {"scale": scale, "eps": eps, "ddof": ddof, "divisor": divisor}
        else:
            yield {"scale": scale}


def check_advantages(function: Callable[..., Any], declares: Any = None) -> list[Statement]:
    """What holds of advantages, and which definition they follow."""
    declares = dict(declares or {})
    check_declared(declares, ADVANTAGES | {"missing": "left_out", "group_of_one": 0.0})
    out = Findings("group_advantages")
    A = lambda rewards: tensor(function(rewards.clone()))
    g = torch.Generator().manual_seed(0)
    usual = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.5, 2.0, 1.0, 0.25]])
    usual = usual.double()
    tight = 0.5 + 1e-4 * torch.rand(3, 5, generator=g, dtype=torch.float64)  # here eps shows
    inputs = [usual, tight, 3 + torch.rand(2, 3, generator=g, dtype=torch.float64)]

    # the definition: the one that is nearest on all inputs
    def distance(definition: dict[str, Any]) -> float:
        full = ADVANTAGES | definition
        right = [advantages_as(r, **full) for r in inputs]
        far = 0.0
        for mine, theirs in zip(got, right, strict=True):
            if mine.shape != theirs.shape or not mine.isfinite().all():
                return math.inf
            far = max(far, float((mine - theirs).abs().max() / theirs.abs().max()))
        return far

    scale = None
    try:
        got = [A(r) for r in inputs]
        fixed = {k: v for k, v in declares.items() if k in ADVANTAGES}
        all_of_them = [d | {k: v for k, v in fixed.items() if k in d or k == "scale"}
                       for d in definitions_of_advantages()]  # fmt: skip
        nearest = min(all_of_them, key=distance)
        anywhere = min(definitions_of_advantages(), key=distance)
        matched = distance(nearest) < NEAR
        scale = anywhere["scale"] if distance(anywhere) < NEAR else None
        scale = nearest["scale"] if matched else scale
        words = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in nearest.items()
        )
        default = distance({}) < NEAR
        if matched:
            status = PASS if default or fixed else DIFFERS
            out.add("definition", "the definition", status, f"this is {words}")
        else:
            found = ", ".join(f"{k} {v}" for k, v in anywhere.items())
            far = f"off by {distance(nearest):.2g} of the largest"
            lines = [f"nearest is {words}, {far}"] if not fixed else [
                f"declared {show(fixed)}, {far}; nearest is {found} ({distance(anywhere):.2g})"]  # fmt: skip
            out.add("definition", "the definition", FAIL if fixed else DIFFERS, *lines)
    except (Exception, SystemExit) as error:
        out.add("definition", "the definition", FAIL if declares else DIFFERS, f"raised {error}")

    with out.universal("their mean in each group is 0", "mean_g A = 0", (5, 6)) as wrong:
        for r in (usual, tight):
            mean, size = A(r).mean(dim=1), float(A(r).abs().max())
            if not near(mean / max(size, 1e-9) + 1, torch.ones_like(mean)):
                wrong({"rewards": r}, mean, torch.zeros_like(mean))
    with out.universal(
        "the better completion has the larger advantage", "R_i > R_j ⇒ A_i > A_j"
    ) as wrong:
        for r in (usual, inputs[2]):
            a = A(r)
            ahead, behind = r.unsqueeze(2) > r.unsqueeze(1), a.unsqueeze(2) <= a.unsqueeze(1)
            if a.shape != r.shape or (ahead & behind).any():
                wrong({"rewards": r}, a, "in the order of the rewards")
    if scale == "mean":
        with out.universal("a common factor changes nothing", "A(c R) = A(R)") as wrong:
            if not near(A(3 * usual), A(usual)):
                wrong({"rewards": 3 * usual}, A(3 * usual), A(usual))
    else:
        with out.universal("a shift of all rewards changes nothing", "A(R + c) = A(R)") as wrong:
            for c in (1.0, -7.0):
                if not near(A(usual + c), A(usual)):
                    wrong({"rewards": usual + c}, A(usual + c), A(usual))
    equation = "R_i = R_j for all i, j ⇒ A = 0"
    with out.universal("equal rewards give no advantage, in float32", equation, (5,)) as wrong:
        values = (0.0, 1.0, 0.1, 0.3, 0.7, 1 / 3, -0.2, 5.3)
        for P, G, value in itertools.product((1, 3), (2, 3, 4, 7, 8, 16), values):
            if P == 1 or scale not in ("batch", "whitened", None):
                a = A(torch.full((P, G), value, dtype=torch.float32))
                if not a.isfinite().all() or a.abs().max() > 0.1:
                    wrong({"rewards": [[value] * G] * P, "dtype": "float32"}, a[0], [0.0] * G)
    with out.universal("the order of completions does not matter", "A(σR) = σA(R)", (12,)) as wrong:
        order = [2, 0, 3, 1]
        if not near(A(usual[:, order]), A(usual)[:, order]):
            wrong({"rewards": usual[:, order]}, A(usual[:, order]), A(usual)[:, order])
    with out.universal("the order of groups does not matter", "groups are independent") as wrong:
        order = [2, 0, 1]
        if not near(A(usual[order]), A(usual)[order]):
            wrong({"rewards": usual[order]}, A(usual[order]), A(usual)[order])
    if scale not in ("batch", "whitened"):
        with out.universal(
            "a group does not depend on the others", "A_g is a function of R_g", (6,)
        ) as wrong:
            alone, together = A(usual[:1]), A(usual)[:1]
            if not near(together, alone):
                wrong({"rewards": usual}, together, alone)

    def one() -> str | None:
        a = A(torch.tensor([[2.0], [3.0]], dtype=torch.float64))
        return None if a.isfinite().all() else f"a group of one: {show(a)}"

    def missing() -> str | None:
        rest = torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
        hole = torch.full((2, 1), math.nan, dtype=torch.float64)
        a, whole = A(torch.cat([rest[:, :1], hole, rest[:, 1:]], dim=1)), A(rest)
        right = torch.cat([whole[:, :1], torch.zeros(2, 1), whole[:, 1:]], dim=1)
        words = f"[1, NaN, 0, 1] gives {show(a[0])}; left out it would be {show(right[0])}"
        return None if near(a, right) else words

    if declares.get("missing"):
        try:
            words = missing()
        except (Exception, SystemExit) as error:
            words = f"raised {type(error).__name__}: {error}"
        out.add(
            "definition", "a missing reward (NaN)", FAIL if words else PASS, words or "left out"
        )
    else:
        out.warn("a missing reward (NaN) leaves the others whole", missing)
    if declares.get("group_of_one") is not None:
        ones = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
        wanted = (
            ones if declares["group_of_one"] == "reward" else 0 * ones + declares["group_of_one"]
        )
        try:
            got_of_one: Any = A(ones)
            right = near(got_of_one, wanted)
        except (Exception, SystemExit) as error:
            got_of_one, right = f"{type(error).__name__}: {error}", False
        line = f"rewards {show(ones)} give {show(got_of_one)}; declared {declares['group_of_one']}"
        out.add("definition", "a group of one completion", PASS if right else FAIL, line)
    else:
        out.warn("a group of one completion", one)
    return out.all


# ----------------------------------------------------------------------------------------- mask


def mask_as(ids: list[int], eos: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return [int(i <= first) for i in range(len(ids))]


def check_mask(function: Callable[..., Any], declares: Any = None) -> list[Statement]:
    """The mask ends with the first EOS, of any id, whatever the padding."""
    out = Findings("completion_mask")
    run = lambda ids, eos: (tensor(function(torch.tensor(ids), list(eos))) != 0).int().tolist()
    cases: dict[str, tuple[list[list[int]], Any]] = {
        "the first EOS itself counts, and nothing after it": ([[2], [3, 4]], (1, 2)),
        "each of several EOS ids ends a row": ([[2, 5], [5, 2, 7]], (26,)),
    }
    for what, (choices, gallery) in cases.items():
        equation = "mask_t = no EOS before t"
        with out.universal(what, equation, gallery) as wrong:
            for length, eos in itertools.product((1, 2, 3), choices):
                for row in itertools.product((2, 5, 9), repeat=length):
                    got, right = run([list(row)], eos), [mask_as(list(row), eos)]
                    if got != right:
                        wrong({"completion_ids": [list(row)], "eos_token_ids": eos}, got, right)
    with out.universal("rows do not see each other", "each row by itself") as wrong:
        rows = [[5, 9, 2, 2], [9, 9, 9, 9], [2, 2, 2, 2]]
        got, right = run(rows, [2]), [mask_as(row, [2]) for row in rows]
        if got != right:
            wrong({"completion_ids": rows, "eos_token_ids": [2]}, got, right)
    out.warn("no EOS id at all: every token counts",
             lambda: None if run([[5, 9]], []) == [[1, 1]] else show(run([[5, 9]], [])))  # fmt: skip
    return out.all


# ------------------------------------------------------------------------------------------- KL

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {  # of d = ref_logp - logp
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: d.exp() - d - 1,
    "abs": lambda d: d.abs(),  # no estimate of the KL, but some have it
}


def policies() -> tuple[Tensor, Tensor]:
    """Log-probs of two policies over three tokens."""
    logits = torch.tensor([[0.3, -0.5, 0.9], [-0.4, 0.2, 0.5]], dtype=torch.float64)
    return logits[0].log_softmax(0), logits[1].log_softmax(0)


def check_kl(function: Callable[..., Any], declares: Any = None) -> list[Statement]:
    """The penalty estimates KL(π ‖ π_ref)."""
    declares = dict(declares or {})
    check_declared(declares, {"kl_estimator": "k3", "kl_clamp": None})
    out = Findings("kl_penalty")
    run = lambda logps, ref: tensor(function(logps.clone(), ref.clone()))
    d = torch.tensor([[-1.5, -0.4, 0.0, 0.3, 1.2]], dtype=torch.float64)
    logps = torch.full_like(d, -2.0)
    try:
        got = run(logps, logps + d)
        found = [name for name, k in ESTIMATORS.items() if near(got, k(d))]
        said = declares.get("kl_estimator")
        status = (PASS if said in found else FAIL) if said else (PASS if "k3" in found else DIFFERS)
        words = (
            f"this is {found[0]}" if found else f"none of k1, k2, k3: {show(got)} for d = {show(d)}"
        )
        out.add(
            "definition", "the estimator", status, words + (f"; declared {said}" if said else "")
        )
    except Exception as error:
        found = []
        out.add("definition", "the estimator", FAIL if declares else DIFFERS, f"raised {error}")
    # far apart: does it grow without end, or stop?
    far = torch.tensor([[-60.0, -45.0, 9.0, 12.0]], dtype=torch.float64)
    try:
        values = run(0 * far - 70, far - 70)[0].tolist()
        ends = {
            x for pair in (values[:2], values[2:]) for x in pair if abs(pair[0] - pair[1]) < 1e-6
        }
        clamp = min(map(abs, ends), default=None)
        words = "it is not clamped" if clamp is None else f"it is clamped at {clamp:g}"
        said = declares.get("kl_clamp")
        same = clamp == said if None in (clamp, said) else abs(clamp - said) < NEAR * said
        known = "kl_clamp" in declares
        status = (PASS if same else FAIL) if known else PASS if clamp is None else DIFFERS
        words += f"; declared {said}" if known else ""
        out.add("definition", "its clamp", status, words)
    except Exception as error:
        status = FAIL if "kl_clamp" in declares else DIFFERS
        out.add("definition", "its clamp", status, f"raised {error}")
    with out.universal("it is 0 where the policies are equal", "π = π_ref ⇒ KL = 0") as wrong:
        same = run(logps, logps)
        if not near(same + 1, torch.ones_like(same)):
            wrong({"logps": logps, "ref_logps": logps}, same, torch.zeros_like(same))
    log_p, log_q = policies()
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    equation = "E_π[k] = KL(π ‖ π_ref) for k1 and k3; E_π[∇k2] = ∇KL(π ‖ π_ref)"
    with out.universal("what it estimates is KL(π ‖ π_ref)", equation, (9,)) as wrong:
        values = run(log_p.view(3, 1), log_q.view(3, 1)).view(3)
        mean = float((log_p.exp() * values).sum())
        if abs(mean - exact) > NEAR * exact and not {"k2", "abs"} & {*found}:
            given = {"logps": log_p, "ref_logps": log_q, "probabilities": log_p.exp()}
            wrong(given, f"{mean:.6f} on average", f"{exact:.6f}")
    far = torch.tensor([[-30.0, 30.0, 94.0]], dtype=torch.float32)
    here = torch.full_like(far, -100.0)
    out.warn("94 nats apart, in float32, it is finite", lambda: None if run(here, here + far).isfinite()
             .all() else show(run(here, here + far)))  # fmt: skip
    return out.all


# ------------------------------------------------------------------------------------------ loss

LOSS = {  # what may be declared of a loss, and the definition of grpo_lora.py
    "loss_type": None, "surrogate": "clip", "aggregation": "token", "level": "token",
    "epsilon": 0.2, "epsilon_high": None, "delta": None, "kl_estimator": "k3",
    "use_bias_correction_kl": True, "divisor": None, "empty_rows": "counted",
    "cap": "absolute", "opmd_tau": 1.0, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
}  # fmt: skip
SURROGATES = ("clip", "none", "reinforce", "cispo", "sapo", "vespo", "dppo", "gmpo", "opmd")
AGGREGATIONS = ("token", "sequence", "constant", "row_sum", "sum")
TYPES = {  # loss_type, as in grpo_lora.py -> surrogate and aggregation
    "grpo": ("clip", "sequence"), "dapo": ("clip", "token"), "bnpo": ("clip", "token"),
    "dr_grpo": ("clip", "constant"), "luspo": ("clip", "row_sum"), "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"), "vespo": ("vespo", "token"), "dppo": ("dppo", "token"),
    "gmpo": ("gmpo", "sequence"), "opmd": ("opmd", "token"),
}  # fmt: skip


def loss_as(
    logps: Tensor, old: Tensor, A: Tensor, mask: Tensor, ref: Tensor | None, beta: float, d: Any
) -> Tensor:
    """The loss by a definition d (see LOSS), in the plainest words. It equals grpo_lora.grpo_loss
    where that has the definition: test_the_kits_own_loss_is_that_of_grpo_lora."""
    m, A = mask.to(logps.dtype), A.unsqueeze(1)
    logps, old = torch.where(mask, logps, 0.0), torch.where(mask, old, 0.0)
    lengths = m.sum(1, keepdim=True).clamp(min=1)
    low, high = d["epsilon"], d["epsilon"] if d["epsilon_high"] is None else d["epsilon_high"]
    gap = logps - old
    ratio = gap.exp()
    if d["level"] == "sequence":
        ratio = ((gap * m).sum(1, keepdim=True) / lengths).exp().expand_as(gap)
    kind = d["surrogate"]
    if kind == "none":
        loss = -ratio * A
    elif kind == "reinforce":
        loss = -A * logps
    elif kind == "cispo":
        cap = 1 + high if d["cap"] == "1 + epsilon" else high
        loss = -ratio.clamp(max=cap).detach() * A * logps
    elif kind == "sapo":
        tau = torch.where(A > 0, d["sapo_temperature_pos"], d["sapo_temperature_neg"]).to(A)
        loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    elif kind == "vespo":
        w = (gap.clamp(-20, 20) * m).sum(1, keepdim=True).clamp(math.log(1e-8), 20)
        k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
        loss = -(lam + k * w - lam * w.exp()).exp().detach() * A * logps
    elif kind == "dppo":
        moved = logps.exp() - old.exp()
        near_enough = torch.where(A > 0, moved <= high, moved >= -low)
        loss = -(ratio.clamp(max=20) * near_enough).detach() * A * logps
    elif kind == "gmpo":
        c = torch.where(A > 0, gap.clamp(max=high), gap.clamp(min=-low))
        loss = (-A * ((c * m).sum(1, keepdim=True) / lengths).exp()).expand_as(gap)
    elif kind == "opmd":
        loss = -A * logps + d["opmd_tau"] / 2 * gap.square()
    else:
        bounded = ratio if d["delta"] is None else ratio.clamp(max=d["delta"])
        loss = -torch.min(bounded * A, ratio.clamp(1 - low, 1 + high) * A)
    if beta and ref is not None:
        kl = ESTIMATORS[d["kl_estimator"]](torch.where(mask, ref, 0.0) - logps)
        loss = loss + beta * kl * (ratio if d["use_bias_correction_kl"] else 1.0)
    loss = loss * m
    rows = len(m) if d["empty_rows"] == "counted" else max(1, int(mask.any(1).sum()))
    if d["aggregation"] == "token":
        return loss.sum() / max(1.0, float(m.sum()))
    if d["aggregation"] == "sequence":
        return (loss.sum(1, keepdim=True) / lengths).sum() / rows
    if d["aggregation"] == "constant":
        return loss.sum() / (rows * (d["divisor"] or m.shape[1]))
    return loss.sum() / (rows if d["aggregation"] == "row_sum" else 1)


class Loss:
    """An adapter's loss with its slope: autograd's, or by differences where there is none."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.differences = function, True
        self.mask_dtype = torch.bool
        logps = torch.tensor([[-0.5, -1.0]], dtype=torch.float64, requires_grad=True)
        one, mask = torch.ones(1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
        # some want numbers in the mask: 1 - mask has no meaning for bool
        for dtype, x in itertools.product((torch.bool, torch.float64), (logps, logps.detach())):
            try:
                self.mask_dtype = dtype
                loss = self.call(x, logps.detach() - 0.01, one, mask)
                self.differences = not (isinstance(loss, Tensor) and loss.requires_grad)
                return
            except Exception:
                continue
        self.mask_dtype = torch.bool

    def call(self, logps: Tensor, old: Tensor, A: Tensor, mask: Tensor, **kl: Any) -> Any:
        loss = self.function(
            logps, old.clone(), A.clone(), mask.to(self.mask_dtype, copy=True), **kl
        )
        return loss[0] if isinstance(loss, tuple | list) else loss

    def value(self, logps: Tensor, *rest: Any, **kl: Any) -> float:
        value = tensor(self.call(logps.detach().clone(), *rest, **kl))
        if value.numel() != 1:
            raise ValueError(f"grpo_loss returned shape {tuple(value.shape)}, must be a scalar")
        return float(value)

    def slope(self, logps: Tensor, *rest: Any, **kl: Any) -> Tensor:
        if self.differences:
            return differences(lambda x: self.value(x, *rest, **kl), logps)
        x = logps.detach().clone().requires_grad_()
        loss = self.call(x, *rest, **kl)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return torch.zeros_like(x)  # a constant, here
        (slope,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
        return torch.zeros_like(x) if slope is None else slope.double()


def differences(function: Callable[[Tensor], float], x: Tensor, h: float = 2e-3) -> Tensor:
    x, slope = x.detach(), torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1)
        step[i] = h
        step = step.view_as(x)
        slope.view(-1)[i] = (function(x + step) - function(x - step)) / (2 * h)
    return slope


def random_batch(seed: int, spread: float = 0.3, B: int = 5, T: int = 4) -> tuple[Tensor, ...]:
    """logps, old_logps, advantages, mask and ref_logps; rows of different lengths, none empty."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda s: s * torch.randn(B, T, generator=g, dtype=torch.float64)
    logps = -0.3 - noise(1.0).abs()
    old, ref = logps + noise(spread), logps + noise(spread)
    A = torch.randn(B, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B, 1), generator=g)
    lengths[0], lengths[1] = T, 1
    return logps, old, A - A.mean(), torch.arange(T) < lengths, ref


def at_ratio(loss: Loss, ratio: float, advantage: float) -> float:
    """Slope of one token's loss, with respect to its log-prob, at a ratio."""
    logp = torch.full((1, 1), -1.0 + min(0.0, math.log(ratio)), dtype=torch.float64)
    A, mask = torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    return float(loss.slope(logp, logp - math.log(ratio), A, mask))


def edge(moves: Callable[[float], bool], inside: float, outside: float) -> float | None:
    """Where `moves`, true at inside, turns false on the way to outside; None if it never does."""
    if not moves(inside) or moves(outside):
        return None
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if moves(middle) else (inside, middle)
    return (inside + outside) / 2


def find_bounds(loss: Loss) -> dict[str, Any]:
    """epsilon, epsilon_high and delta of a loss that clips the ratio, from where its slope ends."""
    still = 1e-4 * max(abs(at_ratio(loss, 1.0, 1.0)), 1e-12)
    moves = lambda advantage: lambda ratio: abs(at_ratio(loss, ratio, advantage)) > still
    high, low = edge(moves(1.0), 1.0, 60.0), edge(moves(-1.0), 1.0, 0.02)
    found = {"epsilon_high": high and high - 1, "epsilon": low and 1 - low}
    found["delta"] = edge(moves(-1.0), 1.0, 200.0)
    tidy = lambda x: None if x is None else float(f"{x:.3g}")
    return {name: tidy(x) for name, x in found.items()}


def find_numbers(loss: Loss, bounds: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the numbers of a surrogate would be, from slopes of one token: surrogate -> settings."""
    unit = abs(at_ratio(loss, 1.0, 1.0)) or 1.0
    slope = lambda ratio, A: -at_ratio(loss, ratio, A) / A / unit  # 1 at ratio 1
    tidy = lambda x: float(f"{x:.4g}")
    found: dict[str, list[dict[str, Any]]] = {}
    if 0.1 < (cap := slope(60.0, 1.0)) < 59:
        found["cispo"] = [{"epsilon_high": tidy(cap), "cap": "absolute"}]
        found["cispo"] += [{"epsilon_high": tidy(cap - 1), "cap": "1 + epsilon"}] * (cap > 1)
    if (tau := (1 - slope(math.exp(0.5), 1.0)) / 0.5) > 0:
        found["opmd"] = [{"opmd_tau": tidy(tau)}]
    # 4 σ(z)(1 - σ(z)) ρ = slope, z = τ (ρ - 1): ρ / slope = cosh²(z/2)
    two = {"pos": slope(2.0, 1.0), "neg": slope(2.0, -1.0)}
    if all(0 < x < 2 for x in two.values()):
        found["sapo"] = [{f"sapo_temperature_{sign}": tidy(2 * math.acosh(math.sqrt(2 / x)))
                          for sign, x in two.items()}]  # fmt: skip
    low, high = bounds["epsilon"], bounds["epsilon_high"]
    if low is not None and high is not None and low < 1:
        p = math.exp(-1)  # at_ratio's larger probability
        found["dppo"] = [{"epsilon": tidy(p * low), "epsilon_high": tidy(p * high / (1 + high))}]
        found["gmpo"] = [
            {"epsilon": tidy(-math.log(1 - low)), "epsilon_high": tidy(math.log1p(high))}
        ]
    return found


def find_divisor(loss: Loss) -> int | float | None:
    """What a loss that is summed over tokens and averaged over rows is divided by besides, if that
    is one number whatever the shapes; else None."""
    found = []
    for seed, B, T in ((0, 5, 4), (1, 3, 7)):
        logps, _, A, mask, _ = random_batch(seed, B=B, T=T)
        weight = (loss.slope(logps, logps, A, mask) / -A.unsqueeze(1))[mask]
        if not near(weight, weight.mean().expand_as(weight), 0.02) or weight.mean() <= 0:
            return None
        found.append(float(1 / (B * weight.mean())))
    same = abs(found[0] - found[1]) < 0.01 * found[1] and abs(found[0] - 1) > 0.01
    rounded = float(f"{found[0]:.4g}")
    return (int(rounded) if rounded == int(rounded) else rounded) if same else None


def definitions_of_loss(
    bounds: dict[str, Any], numbers: Any, divisor: Any, declares: dict[str, Any]
) -> Iterator[Any]:
    """Definitions that this loss could follow: all choices, with the numbers that were found."""
    fixed = {k: v for k, v in declares.items() if k in LOSS and k != "loss_type"}
    if declares.get("loss_type"):
        fixed = (
            dict(zip(("surrogate", "aggregation"), TYPES[declares["loss_type"]], strict=True))
            | fixed
        )
    known = {k: v for k, v in bounds.items() if v is not None}
    caps = (0.2, 0.28, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)
    for surrogate, aggregation, level, empty in itertools.product(
        SURROGATES, AGGREGATIONS, ("token", "sequence"), ("counted", "dropped")
    ):
        d = {**LOSS, "surrogate": surrogate, "aggregation": aggregation, "level": level}
        d |= {"empty_rows": empty, "divisor": divisor}
        own: list[dict[str, Any]] = [{}]
        if surrogate == "clip":
            own = [known, {}]  # by finite differences an edge is not found to the last digit
        elif surrogate in numbers:
            own = numbers[surrogate]
        elif surrogate == "cispo":
            own = [{"epsilon_high": c, "cap": w} for w in ("absolute", "1 + epsilon") for c in caps]
        elif surrogate in ("dppo", "gmpo"):
            own = [
                {"epsilon": a, "epsilon_high": b}
                for a in (0.1, 0.15, 0.2, 0.3, 0.4)
                for b in (a, 0.28)
            ]
        elif surrogate == "opmd":
            own = [{"opmd_tau": tau} for tau in (0.1, 0.5, 1.0, 2.0)]
        given = {k: v for k, v in fixed.items() if v is not None}
        if all(d[k] == given.get(k, d[k]) for k in ("surrogate", "aggregation", "level")):
            wholes = [d | more | given for more in own]  # with a given bound some are the same
            yield from (whole for i, whole in enumerate(wholes) if whole not in wholes[:i])


def words_for(d: dict[str, Any]) -> str:
    parts = [
        f"surrogate {d['surrogate']}",
        f"{d['level']} ratios",
        f"aggregation {d['aggregation']}",
    ]
    if d["surrogate"] in ("clip", "dppo", "gmpo"):
        parts.append(f"epsilon {d['epsilon']:g}")
        if d["epsilon_high"] not in (None, d["epsilon"]):
            parts.append(f"epsilon_high {d['epsilon_high']:g}")
    if d["surrogate"] == "opmd":
        parts.append(f"opmd_tau {d['opmd_tau']:g}")
    if d["surrogate"] == "sapo":
        parts.append(f"tau {d['sapo_temperature_pos']:g} and {d['sapo_temperature_neg']:g}")
    if d["surrogate"] == "cispo":
        parts.append(f"cap {d['epsilon_high']:g}" + (" + 1" if d["cap"] != "absolute" else ""))
    if d["delta"] is not None and d["surrogate"] == "clip":
        parts.append(f"delta (dual clip) {d['delta']:g}")
    if d["aggregation"] == "constant":
        parts.append(f"divisor {d['divisor'] or 'the width of the batch'}")
    if d["empty_rows"] == "dropped":
        parts.append("empty rows not counted")
    names = [
        n for n, pair in TYPES.items() if pair == (d["surrogate"], d["aggregation"]) and n != "bnpo"
    ]
    if d["surrogate"] == "clip" and d["level"] == "sequence":
        names = {"sequence": ["gspo"], "row_sum": ["luspo"]}.get(d["aggregation"], [])
    return ", ".join(parts) + (f": {names[0]}" if names else "")


def aggregations_at_ratio_one(
    loss: Loss, batches: list[tuple[Tensor, ...]], divisor: Any
) -> set[tuple[str, str]]:
    """The aggregations, and ways to count empty rows, that the slopes at ratio 1 allow."""
    allowed = set()
    mine = [loss.slope(logps, logps, A, mask) for logps, _, A, mask, _ in batches]
    for aggregation, empty in itertools.product(AGGREGATIONS, ("counted", "dropped")):
        d = {**LOSS, "surrogate": "none", "aggregation": aggregation, "empty_rows": empty}
        right = []
        for logps, _, A, mask, _ in batches:
            x = logps.clone().requires_grad_()
            value = loss_as(x, logps, A, mask, None, 0.0, d | {"divisor": divisor})
            right.append(torch.autograd.grad(value, x)[0])
        if all(near(a, b, 0.02) for a, b in zip(mine, right, strict=True)):
            allowed.add((aggregation, empty))
    return allowed


def nearest_definition(loss: Loss, declares: dict[str, Any]) -> tuple[dict[str, Any] | None, float]:
    """The definition whose values and slopes are nearest on random batches, and how near."""
    batches = [random_batch(seed, spread) for seed, spread in ((1, 0.05), (2, 0.6), (3, 2.0))]
    logps, old, A, mask, ref = random_batch(4, 0.3)
    mask[2] = False  # an empty row
    batches.append((logps, old, A, mask, ref))
    mine = [(loss.value(*b[:4]), loss.slope(*b[:4])) for b in batches]
    bounds = find_bounds(loss)
    numbers = {} if loss.differences else find_numbers(loss, bounds)
    divisor = declares.get("divisor") or find_divisor(loss)
    best, least = None, math.inf
    every = list(definitions_of_loss(bounds, numbers, divisor, declares))
    # at ratio 1 all surrogates have one slope, so that the aggregation shows alone
    kinds = aggregations_at_ratio_one(loss, [batches[0], batches[3]], divisor)
    some = [d for d in every if (d["aggregation"], d["empty_rows"]) in kinds]

    def distance(d: dict[str, Any], i: int) -> float:
        """How far value and slope are from those of a definition, on batch i."""
        (value, slope), (logps, *rest, _) = mine[i], batches[i]
        own = lambda x: loss_as(x, *rest, None, 0.0, d)
        x = logps.clone().requires_grad_()
        loss_of_d = own(x)
        wanted = loss_of_d.item()
        if loss.differences:
            right = differences(lambda x: float(own(x)), logps)
        else:
            (right,) = torch.autograd.grad(loss_of_d, x)
        far = float((slope - right).abs().max() / right.abs().max().clamp(min=1e-9))
        size = max(abs(wanted), float(right.abs().sum()))
        off = abs(value - wanted)
        if i == 3:  # with one ratio a row, 1 of a row without tokens, that row adds -A to the sum
            off = min(off, abs(value - wanted + float(A[2]) / len(A)))
        return max(far, off / max(size, 1e-9))

    # by the batch that tells most; where that alone is further than the best, so are all others
    first = [distance(d, 2) for d in some or every]
    for far, d in sorted(zip(first, some or every, strict=True), key=lambda pair: pair[0]):
        if far >= least:
            break
        far = max(far, *(distance(d, i) for i in (0, 1, 3)))
        if far < least:
            best, least = d, far
    return best, least


def takes_kl(loss: Loss) -> bool:
    """Whether beta changes something."""
    logps, old, A, mask, ref = random_batch(10)
    try:
        return loss.value(logps, old, A, mask, ref_logps=ref, beta=0.5) != loss.value(
            logps, old, A, mask
        )
    except (Exception, SystemExit):
        return False


def takes_normalizer(function: Callable[..., Any]) -> bool:
    """Whether it has a parameter `normalizer` for a number."""
    try:
        parameter = inspect.signature(function).parameters.get("normalizer")
    except (TypeError, ValueError):  # a scripted function has none
        return False
    return parameter is not None and not isinstance(parameter.default, str)


def universal_of_values(out: Findings, loss: Loss, found: Any, tolerance: float) -> None:
    """What holds of every loss, whatever the direction of its gradient."""
    function = loss.function
    by_width = found is not None and found["aggregation"] == "constant" and not found["divisor"]
    if by_width:
        words = "it divides by the width of the batch, so that padding shrinks the loss"
        out.warn("more padding changes nothing", lambda: words)
    else:
        equation = "L depends on what the mask covers, and so does its KL"
        with out.universal("more padding changes nothing", equation, (1, 15)) as wrong:
            logps, old, A, mask, ref = random_batch(11)
            wide = [nn.functional.pad(x, (0, 3)) for x in (logps, old, mask, ref)]
            for beta in (0.0, 0.5):
                kl, wide_kl = {"ref_logps": ref, "beta": beta}, {"ref_logps": wide[3], "beta": beta}
                try:
                    right = loss.value(logps, old, A, mask, **(kl if beta else {}))
                except Exception:
                    if beta:
                        continue  # it has no KL
                    raise
                got = loss.value(wide[0], wide[1], A, wide[2], **(wide_kl if beta else {}))
                if abs(got - right) > tolerance * max(1e-3, abs(right)):
                    wrong({"mask": wide[2].int(), "beta": beta}, got, right)
    with out.universal(
        "finite padding has no influence", "L depends on what the mask covers", (1, 15)
    ) as wrong:
        logps, old, A, mask, ref = random_batch(5)
        cases: Any = [({}, {}, junk) for junk in (0.0, -3.0, -20.0)]
        if takes_kl(loss):
            cases += [({"beta": 0.5, "ref_logps": ref}, {"beta": 0.5, "ref_logps": x}, junk)
                      for junk in (0.0, -3.0) for x in [torch.where(mask, ref, 2 * junk)]]  # fmt: skip
        for kl, dirty_kl, junk in cases:
            dirty = [torch.where(mask, x, junk) for x in (logps, old)]
            clean = loss.value(logps, old, A, mask, **kl), loss.slope(logps, old, A, mask, **kl)
            got = loss.value(*dirty, A, mask, **dirty_kl), loss.slope(*dirty, A, mask, **dirty_kl)
            same = abs(got[0] - clean[0]) <= tolerance * max(1e-3, abs(clean[0]))
            if not same or not near(got[1] * mask, clean[1] * mask, tolerance):
                wrong(
                    {"logps": dirty[0], "old_logps": dirty[1], "mask": mask.int()}, got[0], clean[0]
                )
    with out.universal("the order of rows does not matter", "L(σ rows) = L(rows)") as wrong:
        logps, old, A, mask, _ = random_batch(6)
        order = [3, 1, 4, 0, 2]
        got = loss.value(*(x[order] for x in (logps, old, A, mask)))
        right = loss.value(logps, old, A, mask)
        if abs(got - right) > tolerance * max(1e-3, abs(right)):
            wrong({"logps": logps[order], "advantages": A[order]}, got, right)
    if takes_normalizer(function):
        with out.universal(
            "micro-batches add up to the batch", "Σ L(part, N) = L(batch, N)", (13,)
        ) as wrong:
            logps, old, A, mask, _ = random_batch(7)
            for N in (float(mask.sum()), float(len(mask))):
                with_n = Loss(lambda *a, **k: function(*a, normalizer=N, **k))  # noqa: B023
                parts = [slice(0, 2), slice(2, 5)]
                got = sum(with_n.value(logps[s], old[s], A[s], mask[s]) for s in parts)
                right = with_n.value(logps, old, A, mask)
                if abs(got - right) > tolerance * max(1e-3, abs(right)):
                    wrong({"logps": logps, "normalizer": N, "rows": "0-1, 2-4"}, got, right)


def check_grpo_loss(function: Callable[..., Any], declares: Any = None) -> list[Statement]:
    """What holds of every loss of the family, and which one this is."""
    declares = dict(declares or {})
    check_declared(declares, LOSS)
    out, loss = Findings("grpo_loss"), Loss(function)
    with out.universal(
        "it can be called", "grpo_loss(logps, old_logps, advantages, mask)"
    ) as wrong:
        value = loss.value(*random_batch(0)[:4])
        if not math.isfinite(value):
            wrong("a batch of 5 rows, none empty", value, "a finite number")
    if out.all[-1].status == FAIL:
        return out.all
    found: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    far = math.inf
    tolerance = 0.02 if loss.differences else NEAR
    said = {
        k: v for k, v in declares.items() if k not in ("kl_estimator", "use_bias_correction_kl")
    }
    try:
        best, far = nearest_definition(loss, {})
        found = best if far < tolerance else None
        if said:
            best, far = nearest_definition(loss, said)
        ours = found is not None and all(
            found[k] == LOSS[k] or (k == "epsilon_high" and found[k] == found["epsilon"])
            for k in (
                "surrogate",
                "aggregation",
                "level",
                "epsilon",
                "epsilon_high",
                "delta",
                "empty_rows",
            )
        )
        if best is not None and far < tolerance:
            out.add(
                "definition",
                "the definition",
                PASS if said or ours else DIFFERS,
                f"this is {words_for(best)}",
            )
        elif best is None:
            out.add(
                "definition",
                "the definition",
                FAIL,
                f"declared {show(said)}: no loss is defined so",
            )
        else:
            lines = [f"nearest is {words_for(best)}, off by {far:.2g} of the largest slope"]
            if said:
                lines = [f"declared {show(said)}: off by {far:.2g} of the largest slope"]
                lines += [f"this is {words_for(found)}"] if found else []
            out.add("definition", "the definition", FAIL if said else DIFFERS, *lines)
    except (Exception, SystemExit) as error:
        out.add(
            "definition",
            "the definition",
            FAIL if said else DIFFERS,
            f"raised {type(error).__name__}: {error}",
        )
    if "delta" in said and (best or LOSS)["surrogate"] == "clip":
        bound, wanted = find_bounds(loss)["delta"], said["delta"]
        same = wanted == bound if None in (wanted, bound) else abs(wanted - bound) < 0.01 * wanted
        words = f"a ratio counts up to {bound:g}" if bound else "a ratio counts without a bound"
        line = f"where A < 0, {words}; declared {wanted}"
        out.add("definition", "delta (dual clip)", PASS if same else FAIL, line)

    if loss.differences and found and found["surrogate"] in ("cispo", "vespo", "dppo"):
        lines = "its gradient is stopped in part, and there is no autograd to ask"
        out.add("universal", "the gradient's direction", NOT_DEFINED, lines)
        universal_of_values(out, loss, found, tolerance)
        check_kl_in_loss(out, loss, declares, found, tolerance)
        return out.all
    equation = "∂L/∂logp = -w A with w > 0, the same in a row"
    with out.universal("at ratio 1 the gradient is along -A ∇logp", equation, (7, 15)) as wrong:
        for seed in range(3):
            logps, _, A, mask, _ = random_batch(seed)
            slope = loss.slope(logps, logps, A, mask)
            weight = torch.where(mask, slope / -A.unsqueeze(1), 0.0)  # (B, T)
            per_row = weight.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            even = near(weight, per_row * mask, 10 * tolerance)
            if not even or (per_row <= 0).any() or (slope * ~mask).abs().max() > tolerance:
                wrong({"logps = old_logps": logps, "advantages": A, "mask": mask.int()}, slope,
                      "-A times one positive number a row, and 0 outside the mask")  # fmt: skip
    if found is None or found["surrogate"] != "opmd":
        equation = "sign(∂l/∂logp) = -sign(A), or 0 where the ratio has gone far enough"
        with out.universal(
            "no token is pushed the wrong way, in all quadrants", equation, (7,)
        ) as wrong:
            for ratio, advantage in itertools.product((0.2, 0.6, 1.0, 1.5, 9.0), (1.0, -1.0)):
                slope = at_ratio(loss, ratio, advantage)
                if slope * advantage > tolerance:
                    wrong({"ratio": ratio, "advantage": advantage}, f"slope {slope:.4g}",
                          f"slope {'<=' if advantage > 0 else '>='} 0")  # fmt: skip
        equation = "l = -min(ρA, clip(ρ)A): the min keeps the slope where ρ has gone the wrong way"
        with out.universal(
            "a ratio that went the wrong way keeps its gradient", equation, (7,)
        ) as wrong:
            for ratio, advantage in ((0.6, 1.0), (1.5, -1.0)):
                slope, unit = at_ratio(loss, ratio, advantage), at_ratio(loss, 1.0, advantage)
                if abs(slope) < 1e-2 * abs(unit):
                    wrong({"ratio": ratio, "advantage": advantage}, f"slope {slope:.4g}",
                          f"a slope of sign {-advantage:+.0f}")  # fmt: skip
    universal_of_values(out, loss, found, tolerance)
    check_soft_slopes(out, loss, said, best if far < tolerance else None, tolerance)
    check_kl_in_loss(out, loss, declares, found, tolerance)

    def padding_of_nan() -> str | None:
        logps, old, A, mask, _ = random_batch(8)
        dirty = [torch.where(mask, x, math.nan) for x in (logps, old)]
        value, slope = loss.value(*dirty, A, mask), loss.slope(*dirty, A, mask)
        slope = torch.where(mask, slope, 0.0)
        fine = math.isfinite(value) and bool(slope.isfinite().all())
        return None if fine else f"NaN where the mask is 0: loss {value:g}"

    def far_apart() -> str | None:
        x = torch.full((1, 1), -1.0, dtype=torch.float32)
        one, mask = torch.ones(1, dtype=torch.float32), torch.ones(1, 1, dtype=torch.bool)
        value, slope = loss.value(x, x - 94, one, mask), loss.slope(x, x - 94, one, mask)
        fine = math.isfinite(value) and bool(slope.isfinite().all())
        return (
            None
            if fine
            else f"logp - old_logp = 94 in float32: loss {value:g}, slope {show(slope)}"
        )

    def empty() -> str | None:
        logps, old, A, mask, _ = random_batch(9)
        value = loss.value(logps, old, A, torch.zeros_like(mask))
        return None if value == 0 else f"all rows empty: loss {value:g}"

    def empty_row() -> str | None:
        logps, old, A, mask, _ = random_batch(9)
        mask[2] = False
        value, slope = loss.value(logps, old, A, mask), loss.slope(logps, old, A, mask)
        fine = math.isfinite(value) and bool(slope.isfinite().all())
        return None if fine else f"one row empty: loss {value:g}"

    out.warn("a row without any token", empty_row)
    out.warn("NaN in the padding does no harm", padding_of_nan)
    out.warn("94 nats between the policies, in float32", far_apart)
    out.warn("a batch without any token", empty)
    return out.all


def check_soft_slopes(out: Findings, loss: Loss, said: Any, found: Any, tolerance: float) -> None:
    """The slopes of a surrogate that does not clip, at ratios below, at and far above 1."""
    named = TYPES.get(str(said.get("loss_type")), (said.get("surrogate"),))[0]
    surrogate = named or (found or LOSS)["surrogate"]
    if surrogate not in ("sapo", "cispo", "vespo", "opmd", "dppo", "gmpo"):
        return
    d = {**LOSS, **(found if found and found["surrogate"] == surrogate else {}), **said}
    d |= {"surrogate": surrogate, "aggregation": "sum"}
    what = f"{surrogate}'s slopes at ratios 0.2, 1 and 9"
    if surrogate == "cispo" and d["epsilon_high"] is None:
        out.add("definition", what, NOT_DEFINED, "its cap was not declared (epsilon_high)")
        return
    right = Loss(lambda *batch: loss_as(*batch, None, 0.0, d))
    right.differences = loss.differences
    lines = []
    try:
        unit, theirs = at_ratio(loss, 1.0, 1.0), at_ratio(right, 1.0, 1.0)
        for ratio, advantage in itertools.product((0.2, 1.0, 9.0), (1.0, -1.0)):
            got = at_ratio(loss, ratio, advantage) / (unit or 1) * theirs
            want = at_ratio(right, ratio, advantage)
            if abs(got - want) > tolerance * max(1.0, abs(want)):
                lines.append(f"ratio {ratio:g}, A = {advantage:g}: {got:.4g}, must be {want:.4g}")
    except (Exception, SystemExit) as error:
        lines = [f"raised {type(error).__name__}: {error}"]
    out.add("definition", what, (FAIL if named else DIFFERS) if lines else PASS, *lines)


def check_kl_in_loss(
    out: Findings, loss: Loss, declares: Any, found: Any, tolerance: float
) -> None:
    """The KL penalty within a loss, where it takes one."""
    logps, old, A, mask, ref = random_batch(10)
    said = {k: declares[k] for k in ("kl_estimator", "use_bias_correction_kl") if k in declares}
    try:
        with_kl = loss.value(logps, old, A, mask, ref_logps=ref, beta=0.5)
        if with_kl == loss.value(logps, old, A, mask):
            raise TypeError("beta changes nothing")
    except (Exception, SystemExit) as error:
        status = FAIL if said else NOT_DEFINED
        out.add("definition", "the KL penalty in the loss", status, str(error).partition("\n")[0])
        return
    with out.universal(
        "the penalty does not see the advantages", "L(β) - L(0) = f(π, π_ref)"
    ) as wrong:
        parts = []
        for sign in (1.0, -1.0):
            batch = logps, old, sign * A, mask
            value = loss.value(*batch, ref_logps=ref, beta=0.5) - loss.value(*batch)
            slope = loss.slope(*batch, ref_logps=ref, beta=0.5) - loss.slope(*batch)
            parts.append(torch.cat([slope.flatten(), torch.tensor([value]).double()]))
        if not near(parts[1], parts[0], 5 * tolerance):
            wrong({"advantages": "A and -A", "beta": 0.5}, parts[1], parts[0])
    with out.universal("the penalty is 0 where π = π_ref", "π = π_ref ⇒ L(β) = L(0)") as wrong:
        got = loss.value(logps, old, A, mask, ref_logps=logps, beta=1.0)
        right = loss.value(logps, old, A, mask)
        if abs(got - right) > tolerance * max(1e-2, abs(right)):
            wrong({"ref_logps": "logps", "beta": 1.0}, got, right)
    # one token, three choices: the expected gradient of the penalty alone, on-policy
    log_p, log_q = policies()
    p, q = log_p.exp(), log_q.exp()
    one, A1 = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    slopes = []
    for i in range(3):
        x, y = log_p[i].view(1, 1), log_q[i].view(1, 1)
        alone = float(loss.slope(x, x, A1, one))  # -1, times whatever factor the loss has
        slope = float(loss.slope(x, x, A1, one, ref_logps=y, beta=1.0)) - alone
        slopes.append(slope / (abs(alone) or 1.0))
    # ∇_logits log π(i) = e_i - p
    got = sum(p[i] * slopes[i] * (torch.eye(3).double()[i] - p) for i in range(3))
    reverse = p * ((log_p - log_q) - (p * (log_p - log_q)).sum())
    known = {
        "nothing (k1 uncorrected)": torch.zeros(3).double(),
        "the forward KL (k3 uncorrected)": p - q,
    }
    known |= {"the reverse KL (k2, or k1 and k3 times ρ)": reverse}
    ratio = p * (log_p - log_q) ** 2 / 2 + p * (log_p - log_q)
    known["k2 times ρ"] = ratio - p * ratio.sum()
    close = [
        name
        for name, g in known.items()
        if (got - g).abs().max() < 5 * tolerance * reverse.abs().max()
    ]
    equation = "E_π ∇k1 = 0, E_π ∇k2 = ∇KL(π‖π_ref), E_π ∇k3 = ∇KL(π_ref‖π)"
    what = "the penalty's expected gradient is that of a KL towards the reference"
    with out.universal(what, equation, (8, 9)) as wrong:
        if not any(slopes):
            wrong({"π": p, "π_ref": q}, "no gradient at all", "a gradient")
        if not close:
            wrong(
                {"π": p, "π_ref": q}, got, f"{show(reverse)} (reverse) or {show(p - q)} (forward)"
            )
    base = found or {**LOSS, **{k: v for k, v in declares.items() if v is not None}}
    if named := TYPES.get(str(base.get("loss_type"))):
        base |= dict(zip(("surrogate", "aggregation"), named, strict=True))
    # the factor of a loss that no definition has: 1 / accumulation steps, say
    like = Loss(lambda *batch: loss_as(*batch, None, 0.0, base))
    ours, theirs = (x.slope(logps, logps, A, mask) for x in (loss, like))
    factor = 1.0 if found else float((ours * theirs).sum() / theirs.square().sum())
    choices = [
        {"kl_estimator": k, "use_bias_correction_kl": c}
        for k, c in itertools.product(("k3", "k1", "k2"), (True, False))
    ]

    def distance(choice: dict[str, Any]) -> float:
        d = {**LOSS, **base, **choice}
        own = lambda x, beta: factor * loss_as(x, old, A, mask, ref, beta, d)
        if loss.differences:
            right = differences(lambda x: float(own(x, 0.5) - own(x, 0.0)), logps)
        else:
            x = logps.clone().requires_grad_()
            (right,) = torch.autograd.grad(own(x, 0.5) - own(x, 0.0), x)
        mine = loss.slope(logps, old, A, mask, ref_logps=ref, beta=0.5)
        mine = mine - loss.slope(logps, old, A, mask)
        value = with_kl - loss.value(logps, old, A, mask)
        off = abs(value - float(own(logps, 0.5) - own(logps, 0.0)))
        return max(
            float((mine - right).abs().max() / right.abs().max()), off / max(abs(value), 1e-9)
        )

    fitting = [c for c in choices if c | said == c]
    if not fitting:
        line = f"declared {show(said)}: no penalty in a loss is defined so"
        out.add("definition", "the KL penalty in the loss", FAIL, line)
        return
    best = min(fitting, key=distance)
    far, matched = distance(best), distance(best) < 5 * tolerance
    words = (
        f"{best['kl_estimator']}, {'times ρ' if best['use_bias_correction_kl'] else 'not times ρ'}"
    )
    status = PASS if matched and (said or best == choices[0]) else FAIL if said else DIFFERS
    lines = f"this is {words}" if matched else f"nearest is {words}, off by {far:.2g}"
    out.add("definition", "the KL penalty in the loss", status, lines)


# ------------------------------------------------------------------------------------------ LoRA


def check_lora(function: Callable[..., Any], declares: Any = None) -> list[Statement]:
    """y = base(x) + s B A x, with B A = 0 at first and gradients for A and B alone."""
    declares = dict(declares or {})
    check_declared(declares, {"use_rslora": False, "init": "kaiming"})
    out = Findings("lora_linear")
    r, alpha, sizes = 3, 6.0, (7, 5)

    def fresh(alpha: float = alpha) -> tuple[Tensor, Tensor, nn.Module]:
        """W and the bias, as they were, and the adapted layer."""
        torch.manual_seed(0)
        base = nn.Linear(*sizes)
        W, bias = base.weight.detach().clone(), base.bias.detach().clone()
        return W, bias, function(base, r, alpha)

    def low_rank(layer: nn.Module) -> tuple[Any, Any]:
        """The trainable A and B, whichever way they lie."""
        trained = [p for p in layer.parameters() if p.requires_grad]
        A = [p for p in trained if sorted(p.shape) == sorted((r, sizes[0]))]
        B = [p for p in trained if sorted(p.shape) == sorted((r, sizes[1]))]
        if len(A) != 1 or len(B) != 1:
            shapes = [tuple(p.shape) for p in trained]
            raise ValueError(f"trainable are {shapes}; one (r, in) and one (out, r) are expected")
        return A[0], B[0]

    x = torch.randn(2, 4, sizes[0], generator=torch.Generator().manual_seed(1))
    with out.universal("at first it is the base layer", "B A = 0 ⇒ y = base(x)", (19,)) as wrong:
        W, bias, layer = fresh()
        want = nn.functional.linear(x, W, bias)
        got = layer(x)
        if not near(tensor(got), tensor(want), 1e-5):
            wrong({"x": x[0, 0]}, got[0, 0], want[0, 0])
    with out.universal(
        "only A and B have gradients", "∂L/∂W: none; A and B: not both without", (17, 19, 20)
    ) as wrong:
        _, _, layer = fresh()
        A, B = low_rank(layer)
        frozen = {n: p for n, p in layer.named_parameters() if p is not A and p is not B}
        before = {n: p.detach().clone() for n, p in frozen.items()}
        layer(x).square().sum().backward()
        others = [n for n, p in frozen.items() if p.requires_grad]
        if any(p.grad is not None and p.grad.any() for p in frozen.values()):
            wrong({"x": x[0, 0]}, "a gradient of the base weight", "none")
        if others:
            wrong({"r": r}, f"trainable besides A and B: {', '.join(others)}", "A and B alone")
        if not any(p.grad is not None and p.grad.any() for p in (A, B)):
            wrong({"x": x[0, 0]}, "neither A nor B has a gradient", "one of them has: it can learn")
        torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
        if not all(torch.equal(p, before[n]) for n, p in frozen.items()):
            wrong({"x": x[0, 0]}, "an optimiser step changed the base weight", "it stays")
    try:
        torch.manual_seed(0)
        wide = function(nn.Linear(300, 40), 8, alpha)
        spread = max(float(p.detach().std()) for p in wide.parameters() if p.requires_grad)
        known = {"kaiming": 1 / math.sqrt(3 * 300), "gaussian": 1 / 8}
        name = next((n for n, x in known.items() if abs(spread - x) < 0.06 * x), None)
        line = (
            f"this is {name}"
            if name
            else f"its standard deviation is {spread:.3g} for r = 8, in = 300"
        )
        line += "" if name else "; U(±1/√in) has 0.0333, N(0, 1/r²) 0.125"
        said = declares.get("init")
        status = (
            (PASS if name == said else FAIL) if said else (PASS if name == "kaiming" else DIFFERS)
        )
        out.add("definition", "how A starts", status, line, gallery=(19,))
    except Exception as error:
        out.add("definition", "how A starts", DIFFERS, f"raised {error}")
    scales = {"alpha / r": alpha / r, "alpha / sqrt(r)": alpha / math.sqrt(r)}
    wanted = "alpha / sqrt(r)" if declares.get("use_rslora") else "alpha / r"
    with out.universal(
        "what it adds is low-rank and linear", "y = base(x) + s B A x", (19,)
    ) as wrong:
        W, bias, layer = fresh()
        A, B = low_rank(layer)
        with torch.no_grad():
            for p in (A, B):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        a = (A if A.shape == (r, sizes[0]) else A.T).detach()
        b = (B if B.shape == (sizes[1], r) else B.T).detach()
        plain = x @ a.T @ b.T
        layer.train()
        below = x.clone().requires_grad_()  # what a layer below gives
        (slope,) = torch.autograd.grad(layer(below).sum(), below, allow_unused=True)
        layer.eval()  # some merge now
        with torch.no_grad():
            change = layer(x) - nn.functional.linear(x, W, bias)
        s = float((change * plain).sum() / plain.square().sum())
        if not near(tensor(change), tensor(s * plain), 1e-4):
            wrong({"A": A, "B": B, "x": x[0, 0]}, change[0, 0], s * plain[0, 0])
        right = (W + s * b @ a).sum(0).expand_as(x)
        if slope is None or not near(tensor(slope), tensor(right), 1e-3):
            got = "none" if slope is None else slope[0, 0]
            wrong({"∂ sum(y) / ∂ x, at x": x[0, 0]}, got, right[0, 0])
        name = next((n for n, value in scales.items() if abs(s - value) < 1e-3 * value), None)
        declared = "use_rslora" in declares
        if name == wanted:
            out.add("definition", "the scale s", PASS, f"this is {name}")
        elif name and not declared:
            out.add("definition", "the scale s", DIFFERS, f"this is {name}")
        else:
            lines = f"s = {s:.5g} for r = {r}, alpha = {alpha:g}; {wanted} is {scales[wanted]:.5g}"
            out.add(
                "definition" if declared else "universal", "the scale s", FAIL, lines, gallery=(19,)
            )
    return out.all


# --------------------------------------------------------------------------------------- the whole

CHECKS: dict[str, Callable[..., list[Statement]]] = {
    "group_advantages": check_advantages,
    "completion_mask": check_mask,
    "kl_penalty": check_kl,
    "grpo_loss": check_grpo_loss,
    "lora_linear": check_lora,
}
KEYS = {  # what DECLARES may say, and of which functions
    "group_advantages": {*ADVANTAGES, "missing", "group_of_one"},
    "completion_mask": set(),
    "kl_penalty": {"kl_estimator", "kl_clamp"},
    "grpo_loss": {*LOSS},
    "lora_linear": {"use_rslora", "init"},
}


def load_adapter(path: str) -> Any:
    """The module in a file. Raises ValueError, in one line, if there is none."""
    if not os.path.isfile(path):
        raise ValueError(
            f"{path}: no such file; it must be an adapter (python -m checks.conformance -h)"
        )
    if not path.endswith(".py"):
        raise ValueError(f"{path}: not a Python file")
    module = types.ModuleType("conformance_adapter")
    module.__file__ = path
    # first, as with any script: what stands beside an adapter is what it means. (But our adapters
    # of public libraries are named like these.)
    folder = os.path.dirname(os.path.abspath(path))
    field = os.path.join(os.path.dirname(os.path.abspath(__file__)), "field")
    sys.path.insert(len(sys.path) if folder == field else 0, folder)
    sys.modules[module.__name__] = module  # a dataclass looks for it there
    try:
        with open(path, encoding="utf-8") as file:  # an import could take what was compiled before
            exec(compile(file.read(), path, "exec"), vars(module))
    except BaseException as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: cannot be loaded: {type(error).__name__}: {first}") from None
    if not any(callable(getattr(module, name, None)) for name in CHECKS):
        raise ValueError(f"{path}: defines none of {', '.join(CHECKS)}")
    declares = getattr(module, "DECLARES", {})
    if not isinstance(declares, dict):
        raise ValueError(f"{path}: DECLARES is a {type(declares).__name__}, must be a dict")
    check_declared(declares, dict.fromkeys(sorted(set().union(*KEYS.values()))))
    return module


def check_adapter(module: Any) -> list[Statement]:
    """All statements about what an adapter defines."""
    found: list[Statement] = []
    declares = getattr(module, "DECLARES", {})
    for name, check in CHECKS.items():
        function = getattr(module, name, None)
        if not callable(function):
            found.append(Statement(name, "-", "all of it", NOT_DEFINED, [], []))
            continue
        own = {key: value for key, value in declares.items() if key in KEYS[name]}
        if isinstance(own.get("divisor"), str) != (name == "group_advantages"):
            own.pop("divisor", None)  # of advantages it is text, of a loss a number
        try:
            found += check(function, own)
        except (Exception, SystemExit) as error:
            line = f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            found.append(Statement(name, "universal", "it can be judged", FAIL, [line], []))
    return found


def print_findings(findings: list[Statement]) -> None:
    for s in findings:
        print(f"{s.status:<22} {s.about:<17} {s.what}")
        for line in s.details:
            print(f"{'':<22} {line}")
        if s.status == FAIL and s.gallery:
            print(f"{'':<22} looks like: checks/GALLERY.md, {', '.join(map(str, s.gallery))}")
    counts = {
        status: sum(s.status == status for s in findings)
        for status in (PASS, FAIL, DIFFERS, WARNING)
    }
    print("\n" + ", ".join(f"{n} {status}" for status, n in counts.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without ∂
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what an adapter prints is not ours
            module = load_adapter(options.file)
            findings = check_adapter(module)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(s) for s in findings], indent=1))
    else:
        print_findings(findings)
    return int(any(s.status == FAIL for s in findings))


if __name__ == "__main__":
    sys.exit(main())
