"""Golden vectors: inputs and right answers in float64, for those who do not write Python.

    python -m checks.golden       # writes checks/golden.json

Each case says what confirms it, besides the code of this project:

    closed form    worked out by hand, in `CLOSED`
    enumeration    all samples of a small policy were listed, in test_math.py
    parity         TRL 1.16 or verl 0.9.1 gives the same, in checks/test_parity_*.py

test_golden.py checks that the file is current, and each closed form.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from checks.conformance import random_batch
from grpo_lora import (
    AGGREGATION,
    completion_mask,
    group_advantages,
    grpo_loss,
    kl_penalty,
    sampler_weights,
)

FILE = Path(__file__).parent / "golden.json"
SCALES = {
    "group": "parity: TRL", "batch": "parity: TRL", "none": "enumeration, parity: TRL",
    "mean": "enumeration", "leave_one_out": "enumeration, parity: verl",
}  # fmt: skip
LOSSES = dict.fromkeys(AGGREGATION, "parity: TRL") | dict.fromkeys(
    ("dppo", "gmpo", "opmd"), "parity: verl"
)


def plain(value: Any) -> Any:
    """Numbers as JSON has them. NaN, which it lacks, is null."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    if isinstance(value, list):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def loss_case(name: str, rests_on: str, batch: Any, **settings: Any) -> dict[str, Any]:
    logps, old, A, mask, ref = batch
    logps = logps.detach().requires_grad_()
    given = {"ref_logps": ref} if settings.get("beta") else {}
    loss, _ = grpo_loss(logps, old, A, mask, **given, **settings)
    (gradient,) = torch.autograd.grad(loss, logps)
    inputs = {"logps": logps, "old_logps": old, "advantages": A, "mask": mask.int()} | given
    outputs = {"loss": loss, "gradient": gradient}
    return {"name": name, "function": "grpo_loss", "rests_on": rests_on, "settings": settings} | {
        "inputs": {key: plain(x) for key, x in inputs.items()},
        "outputs": {key: plain(x) for key, x in outputs.items()},
    }


def other_case(name: str, rests_on: str, function: Any, inputs: Any, **settings: Any) -> Any:
    output = function(*inputs.values(), **settings)
    output = output.int() if output.dtype == torch.bool else output
    return {"name": name, "function": function.__name__, "rests_on": rests_on} | {
        "settings": settings,
        "inputs": {key: plain(x) for key, x in inputs.items()},
        "outputs": {"result": plain(output)},
    }


def one_token(ratio: float, advantage: float) -> Any:
    """A batch of one token, of log-prob log 0.25, at a ratio."""
    logp = torch.full((1, 1), math.log(0.25), dtype=torch.float64)
    A, mask = torch.tensor([advantage]).double(), torch.ones(1, 1, dtype=torch.bool)
    return logp, logp - math.log(ratio), A, mask, logp - math.log(2)


# name -> its settings, ratio, advantage, and what pen and paper give: (loss, gradient)
CLOSED: dict[str, Any] = {
    "clip: above 1 + epsilon, A > 0": ({"loss_type": "dapo"}, 1.5, 2.0, (-2.4, 0.0)),
    "clip: above 1 + epsilon, A < 0": ({"loss_type": "dapo"}, 1.5, -2.0, (3.0, 3.0)),
    "clip: below 1 - epsilon, A > 0": ({"loss_type": "dapo"}, 0.5, 2.0, (-1.0, -1.0)),
    "clip: below 1 - epsilon, A < 0": ({"loss_type": "dapo"}, 0.5, -2.0, (1.6, 0.0)),
    "clip: within": ({"loss_type": "dapo"}, 1.1, 2.0, (-2.2, -2.2)),
    "delta bounds what clip does not": ({"loss_type": "dapo", "delta": 4.0}, 9.0, -1.0, (4.0, 0.0)),
    "cispo: the cap is on the weight": (
        {"loss_type": "cispo", "epsilon_high": 5.0}, 9.0, 1.0, (5 * math.log(4), -5.0)),
    "opmd": ({"loss_type": "opmd", "opmd_tau": 2.0}, math.e, 1.0, (math.log(4) + 1, 1.0)),
    "KL alone, k3 times the ratio, at ratio 1": (
        {"loss_type": "dapo", "beta": 1.0}, 1.0, 0.0,
        (0.5 - 1 + math.log(2), math.log(2))),
    "KL alone, k2 without": (
        {"loss_type": "dapo", "beta": 1.0, "kl_estimator": "k2", "use_bias_correction_kl": False},
        1.0, 0.0, (math.log(2) ** 2 / 2, math.log(2))),
}  # fmt: skip


def cases() -> list[dict[str, Any]]:
    found = []
    rewards = torch.tensor(
        [[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [2.0, 0.5, -1.0, 0.25]]
    ).double()
    for scale, rests_on in SCALES.items():
        given = {"rewards": rewards}
        found.append(
            other_case(f"advantages, {scale}", rests_on, group_advantages, given, scale=scale)
        )
    missing = torch.tensor(
        [[1.0, math.nan, 0.0, 1.0], [math.nan, math.nan, 2.0, math.nan]]
    ).double()
    name = "advantages, null: no reward"
    found.append(
        other_case(name, "parity: TRL", group_advantages, {"rewards": missing}, scale="group")
    )
    ids = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 5, 2, 0], [5, 7, 2, 0]])
    for eos in ([2], [2, 7], []):
        given = {"completion_ids": ids, "eos_token_ids": torch.tensor(eos, dtype=torch.long)}
        found.append(other_case(f"mask, EOS {eos}", "closed form", mask_of, given))
    logps, _, _, _, ref = random_batch(20, spread=1.0, B=2, T=3)
    for estimator in ("k1", "k2", "k3"):
        given = {"logps": logps, "ref_logps": ref}
        found.append(other_case(f"KL, {estimator}", "enumeration, parity: TRL", kl_penalty, given,
                                estimator=estimator))  # fmt: skip
    for name, (settings, ratio, advantage, _) in CLOSED.items():
        found.append(loss_case(name, "closed form", one_token(ratio, advantage), **settings))
    for loss_type, rests_on in LOSSES.items():
        settings: dict[str, Any] = {"loss_type": loss_type, "max_completion_length": 6}
        settings |= {"epsilon_high": 5.0} if loss_type == "cispo" else {}
        batch = random_batch(21, spread=0.6)
        batch[3][2] = False  # an empty row, which counts
        found.append(loss_case(f"loss, {loss_type}", rests_on, batch, **settings))
    for settings in (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "beta": 0.1}, {"loss_type": "dapo", "beta": 0.1, "kl_estimator": "k1"},
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
        {"loss_type": "dapo", "epsilon_high": 0.28}, {"loss_type": "dapo", "normalizer": 100.0},
    ):  # fmt: skip
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        found.append(loss_case(name, "parity: TRL", random_batch(22, spread=0.6), **settings))
    logps, old, _, mask, _ = random_batch(23, spread=1.0)
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        given = {"old_logps": logps, "sampled_logps": old, "mask": mask}
        found.append(other_case(f"sampler weights, {mode}", "closed form", sampler_weights, given,
                                mode=mode, low=0.5, high=2.0))  # fmt: skip
    return found


def mask_of(completion_ids: torch.Tensor, eos_token_ids: torch.Tensor) -> torch.Tensor:
    return completion_mask(completion_ids, eos_token_ids.tolist())


mask_of.__name__ = "completion_mask"


def page() -> str:
    about = "float64; made by python -m checks.golden; null is NaN; a mask is 0 or 1"
    lines = [json.dumps(case) for case in cases()]
    return json.dumps({"about": about})[:-1] + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
