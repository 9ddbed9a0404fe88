"""golden.json is what the code gives, and what pen and paper give."""

import json
import math

import pytest
import torch

from checks.golden import CLOSED, FILE, page

CASES = {case["name"]: case for case in json.loads(FILE.read_text(encoding="utf-8"))["cases"]}


def numbers(value):
    if isinstance(value, dict | list):
        for x in value.values() if isinstance(value, dict) else value:
            yield from numbers(x)
    elif isinstance(value, int | float):
        yield float(value)


def test_the_file_is_current():
    old, new = (json.loads(text)["cases"] for text in (FILE.read_text(encoding="utf-8"), page()))
    assert [c["name"] for c in old] == [c["name"] for c in new], "python -m checks.golden"
    for before, now in zip(old, new, strict=True):
        assert before["settings"] == now["settings"] and before["rests_on"] == now["rests_on"]
        for part in ("inputs", "outputs"):
            assert [*numbers(before[part])] == pytest.approx([*numbers(now[part])], abs=1e-12)
    assert 38 <= len(old) == len(CASES)


@pytest.mark.parametrize("name", CLOSED)
def test_pen_and_paper_agree(name):
    loss, gradient = CLOSED[name][3]
    got = CASES[name]["outputs"]
    assert got["loss"] == pytest.approx(loss, abs=1e-12)
    assert got["gradient"][0][0] == pytest.approx(gradient, abs=1e-12)


def test_masks_and_weights_by_hand():
    assert CASES["mask, EOS [2]"]["outputs"]["result"] == [
        [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0],
    ]  # fmt: skip
    assert CASES["mask, EOS [2, 7]"]["outputs"]["result"][1] == [1, 1, 1, 0]
    assert CASES["mask, EOS []"]["outputs"]["result"] == [[1] * 4] * 4
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        case = CASES[f"sampler weights, {mode}"]
        given = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["inputs"].items()}
        gap = (given["old_logps"] - given["sampled_logps"]) * given["mask"]
        for row, weights in zip(gap.tolist(), case["outputs"]["result"], strict=True):
            row = [sum(row)] * len(row) if mode.startswith("sequence") else row
            for x, got in zip(row, weights, strict=True):
                w = min(max(math.exp(x), 0.5), 2.0)
                w = 0.0 if mode.endswith("mask") and w != math.exp(x) else w
                assert got == pytest.approx(w)


def test_every_case_says_what_it_rests_on():
    kinds = {word.strip() for c in CASES.values() for word in c["rests_on"].split(",")}
    assert kinds == {"closed form", "enumeration", "parity: TRL", "parity: verl"}
