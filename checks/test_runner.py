"""The runner: files, resuming, warnings, faults, the command line, tuning, the report."""

import ast
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, MambaConfig

import grpo_lora
import rewards
from checks.helpers import (
    CLI_RUN,
    HERE,
    INTERRUPTING,
    PLAIN,
    SMALL,
    lines,
    run,
    run_trainer,
    same_files,
    same_run,
)
from grpo_lora import SAMPLER_GAP, GRPOConfig, GRPOTrainer, completion_mask
from lora import LoRAConfig, load_lora, save_lora
from runner import checkpoints, cli, demo, report, watch
from runner.checkpoints import Checkpoints, ResumeError
from runner.cli import main
from runner.report import printable
from test_training import (
    ROWS,
    TOKENIZER,
    VOCAB,
    adapters_of,
    one_by_one,
    tiny_model,
    trainer,
    with_adapters,
)


def test_updates_that_are_not_finite_are_skipped_and_counted_and_three_in_a_row_end_the_run_saved(
    tmp_path,
):
    bad = {1, 3, 4, 5}  # by number of the update, from 0
    t = run_trainer(max_steps=9, output_dir=str(tmp_path))
    next(iter(t.params.values())).register_hook(lambda g: g * math.nan if t.step in bad else g)
    after = {}
    original = t.update

    def watched(rows):
        metrics = original(rows)
        after[t.step - 1] = adapters_of(t.model)
        return metrics

    t.update = watched
    with pytest.raises(
        FloatingPointError, match=r"update 6: 3 updates in a row.*lower learning_rate"
    ):
        t.train()
    unchanged = {
        n for n in range(1, 6) if all(torch.equal(after[n][k], after[n - 1][k]) for k in after[n])
    }
    assert unchanged == bad
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 1, 1, 1] and rows[1][
        "grad_norm"
    ] is None
    assert "skipped_updates is 1: " in rows[1]["warnings"][-1]
    assert (tmp_path / "checkpoint-6/state.json").exists()  # though save_steps is 0
    assert not (tmp_path / "adapter").exists()


def test_a_policy_that_is_not_finite_itself_is_not_saved(tmp_path):
    t = run_trainer(max_steps=9, output_dir=str(tmp_path), save_steps=1)
    B = next(p for name, p in t.params.items() if "lora_B" in name)
    original = t.update

    def watched(rows):
        metrics = original(rows)
        if t.step == 3:
            B.detach().fill_(math.inf)
        return metrics

    t.update = watched
    with pytest.raises(FloatingPointError, match="update 6"):
        t.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_three_bad_updates_ended_ends_at_once_when_it_is_resumed(tmp_path):
    for updates in (3, 4):
        t = run_trainer(max_steps=9, save_steps=1, output_dir=str(tmp_path), resume=updates > 3)
        t.update = lambda rows, original=t.update: original(rows) | {"skipped_updates": 1}
        with pytest.raises(
            FloatingPointError, match=f"update {updates}: {updates} updates in a row"
        ):
            t.train()


@pytest.mark.parametrize(
    "settings", [{}, {"top_entropy_quantile": 0.5}, {"mask_truncated_completions": True}]
)
def test_what_an_update_did_to_each_token_is_recorded(settings, tmp_path):
    t = run_trainer(
        num_completions_to_log=8,
        log_tokens_steps=1,
        max_steps=1,
        output_dir=str(tmp_path),
        temperature=0.7,
        **settings,
    )
    t.train()
    rows, (rollout, batches) = lines(tmp_path / "completions.jsonl"), t.last_batch
    whole = dataclasses.replace(
        rollout, completion_mask=completion_mask(rollout.completion_ids, t.eos_token_ids)
    )
    after = one_by_one(t.model, whole)
    assert len(rows) == 8 and all(len(row["tokens"]) == row["length"] for row in rows)
    for i, row in enumerate(rows):
        n = row["length"]
        assert "".join(row["tokens"]) == TOKENIZER.decode(rollout.completion_ids[i, :n])
        assert row["logps_sampled"] == pytest.approx(rollout.logps[i, :n].tolist())
        assert row["logps_after"] == pytest.approx(after[i, :n].tolist(), abs=1e-4)
        if settings.get("mask_truncated_completions"):
            assert row["trained"] == [row["ended"]] * n
    if "top_entropy_quantile" in settings:
        assert all(row["trained"] == [True] * row["length"] for row in rows) is False
        kept = {p: m for b in batches for p, m in zip(b.prompts, b.uncertain.split(4), strict=True)}
        for i, row in enumerate(rows):
            assert row["trained"] == kept[i // 4][i % 4, : row["length"]].tolist()
    elif not settings:
        assert all(all(row["trained"]) for row in rows)


def hanging(completions, **columns):
    while True:
        try:
            time.sleep(5)
        except Exception:
            continue


async def hanging_async(completions, **columns):
    while True:
        with contextlib.suppress(Exception):
            await asyncio.sleep(5)


def hanging_lazily(completions, **columns):
    return (hanging(completions) for _ in completions)


def hanging_in_c(completions, **columns):
    """A regular expression that backtracks for ever, and lets no other thread run meanwhile."""
    return [re.match(r"(a+)+$", "a" * 60 + "b")]


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("name", ["hanging", "hanging_async", "hanging_lazily", "hanging_in_c"])
def test_a_reward_that_hangs_ends_the_process_and_is_named(name, thread, tmp_path):
    limited = watch.with_time_limit(globals()[name], 0.2)
    run = lambda: rewards.call_rewards([limited], [{"prompt": ""}], [""], [[]])
    started, child = time.monotonic(), os.fork()
    if child == 0:
        signal.alarm(60)  # ends the child, if nothing else does
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        if thread:
            other = threading.Thread(target=run)
            other.start()
            other.join()
        else:
            run()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 1 and time.monotonic() - started < 40
    said = (tmp_path / "stderr").read_text()
    if name == "hanging_in_c":
        assert "Timeout" in said and "in hanging_in_c" in said
    else:
        text = f"error: reward {name} took longer than reward_timeout = 0.2 s"
        assert said.strip().splitlines()[-1] == text


def test_a_reward_with_a_time_limit_may_set_alarms_of_its_own_and_keeps_its_columns():
    seen = []

    def alarmed(completions, answer, **columns):
        """As math_verify does."""
        old = signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
        signal.signal(signal.SIGALRM, old)
        return [1.0] * len(completions)

    limited = watch.with_time_limit(alarmed, 60)
    rows = [{"prompt": "", "answer": "1"}]
    assert rewards.call_rewards([limited], rows, [""], [[]]) == ([[1.0]], {})
    assert seen == ["alarm"] and limited.__name__ == "alarmed"
    with pytest.raises(ValueError, match=r"reward alarmed: missing a required.*'answer'"):
        run_trainer(reward=limited, rows=[{"prompt": "1"}])


def test_running_out_of_memory_names_the_settings_that_need_less(model_dir, data, tmp_path, capsys):
    huge = [
        "--num_generations",
        "20000000",
        "--max_completion_length",
        "30",
        "--per_device_train_batch_size",
        "4",
    ]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    command = [
        "--model",
        str(model_dir),
        "--data",
        str(data),
        *SMALL,
        *huge,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    command += ["--device", "cpu"]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, limits[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: out of memory: lower per_device_train_batch_size")
    torch_error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(MemoryError, match="per_device_train_batch_size"), watch.memory_advice():
        raise torch_error


# ----------------------------------------------------------------------------------- early warnings


def equal_rewards(completions, **columns):
    return [0.5] * len(completions)


def noise(completions, **columns):
    """Tells completions apart, and cannot be learnt."""
    return [random.random() for _ in completions]


def first_is_20(completion_ids, **columns):
    return [float(ids[0] == 20) for ids in completion_ids]


def warned(reward=noise, **args) -> set[str]:
    """The metrics that a small run was warned of."""
    model = args.pop("model", None) or with_adapters(
        tiny_model(), random=False, target_modules=["down_proj", "lm_head"]
    )
    defaults = {
        "max_steps": 12,
        "max_completion_length": 4,
        "prompts_per_step": 2,
        "num_generations": 8,
    }
    defaults |= {"per_device_train_batch_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        t = run_trainer(model, reward, output_dir=folder, **defaults | args)
        t.train()
        rows = lines(Path(folder) / "metrics.jsonl")
    texts = [text for row in rows for text in row.get("warnings", ())]
    assert len(texts) == len(set(texts))
    return {text.partition(" is ")[0] for text in texts}


def test_warning_equal_rewards_and_no_gradient():
    assert {"frac_reward_zero_std", "grad_norm"} <= warned(equal_rewards)


def test_warning_no_reward_at_all_is_no_crash():
    assert "reward" not in warned(
        lambda completions, **columns: [None] * len(completions), max_steps=41
    )


def test_warning_flat_reward():
    assert "reward" in warned(max_steps=42, learning_rate=1e-5)


def test_warning_kl_entropy_and_clipping_at_a_huge_learning_rate():
    assert {"kl"} <= warned(learning_rate=0.02, beta=1e-6, max_steps=30)
    assert "entropy/first" in warned(
        first_is_20, learning_rate=0.03, max_steps=40, max_completion_length=1, beta=1e-6
    )
    assert "clip_ratio/region_mean" in warned(learning_rate=0.1, num_iterations=8, max_steps=40)


def test_warning_truncation():
    assert "completions/clipped_ratio" in warned(max_completion_length=2)


def test_warning_a_gradient_that_jumps():
    outlier = lambda trainer_state, **columns: [
        x * (1000 if trainer_state.global_step == 11 else 1) for x in noise(**columns)
    ]
    assert "grad_norm/usual" in warned(outlier, scale_rewards="none")


def test_warning_the_sampler_is_not_the_policy_that_is_scored(monkeypatch):
    original = grpo_lora.generate
    monkeypatch.setattr(
        grpo_lora, "generate", lambda *a, **k: original(*a, **k | {"temperature": 2.0})
    )
    assert SAMPLER_GAP in warned(temperature=0.5)


def test_warning_adapters_that_stay_at_zero(capsys):
    mamba = tiny_model(config=MambaConfig, hidden_size=32, num_hidden_layers=2, state_size=4)
    run_trainer(
        with_adapters(mamba, random=False), max_steps=4
    ).train()  # it reads dt_proj.weight, and never calls the layer
    said = capsys.readouterr().err
    assert "layers.0.mixer.dt_proj.lora_B" in said and "recomputes its past, slowly" in said
    assert "adapters at zero" in warned(learning_rate=0.0)
    assert "slowly" not in capsys.readouterr().err  # a Llama's cache can be repeated


def test_warnings_stay_silent_on_a_healthy_run_and_each_is_in_the_table():
    first_is_even = lambda completion_ids, **columns: [
        float(ids[0] % 2 == 0) for ids in completion_ids
    ]
    model = with_adapters(tiny_model(), random=False, target_modules=["down_proj", "lm_head"])
    model.generation_config.eos_token_id = list(range(9, VOCAB, 2))  # completions end of themselves
    healthy = {
        "max_steps": 45,
        "learning_rate": 0.01,
        "prompts_per_step": 4,
        "max_completion_length": 16,
    }
    assert warned(first_is_even, model=model, **healthy) == set()
    assert {sign.metric for sign in watch.SIGNS} == {
        "frac_reward_zero_std", "reward", "kl", "entropy/first", "completions/clipped_ratio",
        "clip_ratio/region_mean", "grad_norm", "grad_norm/usual", "skipped_updates",
        "adapters at zero", SAMPLER_GAP,
    }  # fmt: skip


def said(rows):
    """What EarlyWarnings says of a run whose metrics are fine but for what the rows have."""
    fine = {"frac_reward_zero_std": 0.0, "completions/clipped_ratio": 0.0, "grad_norm": 1.0}
    warnings, fine = watch.EarlyWarnings(), fine | {"skipped_updates": 0.0}
    checked = (fine | {"step": i + 1, "reward": i / 50} | row for i, row in enumerate(rows))
    return [text for row in checked for text in warnings.check(row)]


def test_warning_entropy_though_an_early_update_had_no_gradient_and_so_no_entropy():
    rows = [{"entropy": 2.0 if i < 10 else 0.001} if i != 2 else {} for i in range(20)]
    assert "entropy/first is 0.0005" in said(rows)[0]
    assert not said([{"entropy": 2.0}] * 20)


def test_no_warning_of_a_reward_that_was_learnt_in_three_updates():
    assert not said([{"reward": reward} for reward in [0.1, 0.4, 0.7] + [0.9] * 37])
    assert "reward is 0.4: no higher" in said([{"reward": 0.4}] * 40)[0]


def test_no_warning_of_a_small_gradient_after_smaller_ones():
    assert not said([{"grad_norm": 0.002}] * 20 + [{"grad_norm": 0.1}])
    assert "grad_norm/usual" in said([{"grad_norm": 0.02}] * 20 + [{"grad_norm": 1.1}])[0]


def test_a_metric_that_a_reward_logs_as_idle_is_no_list_of_adapters():
    assert not said([{"idle": 2.0}] * 5)


def test_a_curve_of_a_long_run_keeps_its_peaks_and_its_end():
    points = [(step, 1.0 + step % 7) for step in range(1, 1235)]
    points[503], points[707] = (504, 1e3), (708, -1e3)
    kept = report.thinned(points)
    assert {points[0], points[503], points[707], points[-1]} <= {*kept} <= {*points}
    assert 250 <= len(kept) <= 504 and kept == sorted(kept)
    assert report.thinned(points[:400]) == points[:400]


def test_the_label_of_a_number_just_below_a_hundred(tmp_path):
    page = report.curve([{"step": 1, "x": 99.6}, {"step": 2, "x": 99.4}], ["x"])
    assert ">100<" in page and ">99<" in page


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


def test_stopping_and_resuming_is_the_same_run_to_the_bit(straight, tmp_path):
    assert run(tmp_path, stop_at=3).step == 3  # saves there, out of turn
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 4, "reward": 1}\n{"step": 5, "rew'
        )  # what a crash may leave behind: ahead, and torn
    run(tmp_path, resume=True)
    same_run(straight, tmp_path)


def test_several_iterations_and_a_reference_resume_to_the_bit(tmp_path):
    def go(name, steps, **more):
        args = {
            "num_iterations": 2,
            "beta": 0.1,
            "output_dir": str(tmp_path / name),
            "save_steps": 2,
        }
        run_trainer(max_steps=steps, **args | more).train()
        return (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()

    assert go("straight", 6) != go("resumed", 4)
    assert go("resumed", 6, resume=True) == go("straight2", 6)


def test_a_damaged_checkpoint_is_named_passed_over_and_left_alone(straight, tmp_path, capsys):
    run(tmp_path, stop_at=4)
    weights = tmp_path / "checkpoint-4/trainer.pt"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # a single bit
    weights.write_bytes(data)
    (tmp_path / "checkpoint-9").mkdir()  # torn before it had anything
    run(tmp_path, resume=True)
    said = capsys.readouterr().err
    assert (
        "checkpoint-4: trainer.pt has changed" in said
        and "checkpoint-9" in said
        and "checkpoint-2" in said
    )
    same_run(straight, tmp_path)
    assert bytes(data) in [p.read_bytes() for p in tmp_path.glob("torn-checkpoint-4-*/trainer.pt")]


def test_resuming_on_another_machine_says_what_differs_by_name(tmp_path, capsys, monkeypatch):
    run(tmp_path, stop_at=2)
    machine = checkpoints.machine()
    assert {"torch", "transformers", "threads", "processes", "machine"} <= machine.keys()
    monkeypatch.setattr(checkpoints, "machine", lambda: machine | {"threads": 99, "torch": "0.0"})
    run(tmp_path, resume=True, max_steps=3)
    said = [line for line in capsys.readouterr().err.splitlines() if "results may differ" in line]
    assert (
        len(said) == 2
        and "torch was" in said[0]
        and f"threads was {machine['threads']}, now 99" in said[1]
    )


def test_resuming_without_a_checkpoint_starts_over_and_says_so(straight, tmp_path, capsys):
    run(tmp_path, max_steps=0)
    run(tmp_path, resume=True)
    assert "no intact checkpoint" in capsys.readouterr().err
    same_run(straight, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "lora"),
    [
        ("learning_rate", {"learning_rate": 0.5}, {}),
        ("num_generations", {"num_generations": 2}, {}),
        ("train data", {"rows": ROWS[:39]}, {}),
        ("rewards", {"reward": "format"}, {}),
        ("base model", {"base": 1}, {}),
        ("lora.r", {}, {"r": 8}),
        ("lora.lora_alpha", {}, {"lora_alpha": 9}),
    ],
)
def test_resuming_another_run_is_refused_with_the_setting_named(straight, name, change, lora):
    change = dict(change)
    model = with_adapters(
        tiny_model(change.pop("base", 0)), **{"lora_dropout": 0.1, "random": False} | lora
    )
    same = {"max_steps": 6, "save_steps": 2, "eval_rows": ROWS[:5]}
    t = run_trainer(model, output_dir=str(straight), resume=True, **same | change)
    with pytest.raises(ValueError, match=f"resume: {name}.* was "):
        t.train()


def test_a_resumed_run_is_evaluated_on_the_rows_that_it_was(tmp_path):
    args = {"output_dir": str(tmp_path), "save_steps": 1}
    run_trainer(max_steps=1, eval_rows=ROWS[:5], **args).train()
    with pytest.raises(checkpoints.ResumeError, match="resume: eval data was "):
        run_trainer(max_steps=2, eval_rows=ROWS[:4], resume=True, **args).train()


def test_a_run_may_be_made_longer_where_its_learning_rates_stay(tmp_path):
    for schedule in ("linear", "constant"):
        folder = tmp_path / schedule
        run(folder, max_steps=2, lr_scheduler_type=schedule)
        ends = pytest.raises(ValueError, match="resume: max_steps was 2, now 4")
        with ends if schedule == "linear" else contextlib.nullcontext():
            run(folder, max_steps=4, lr_scheduler_type=schedule, resume=True)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == (2 if schedule == "linear" else 4)


def test_a_run_that_ended_without_a_checkpoint_is_not_written_over(tmp_path):
    run(tmp_path, max_steps=1, save_steps=0)
    for name in ("nothing", "metrics.jsonl"):  # is lost
        (tmp_path / name).unlink(missing_ok=True)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(checkpoints.ResumeError, match="holds the adapter of a run that ended"):
            run(tmp_path, max_steps=1, save_steps=0, resume=True)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_without_a_checkpoint_is_not_taken_for_another_when_it_is_resumed(tmp_path):
    args = {"output_dir": str(tmp_path), "save_steps": 2}
    run_trainer(**args).callbacks[-2].begin(run_trainer(**args))  # and is killed
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(checkpoints.ResumeError, match=r"resume: beta was 0.0, now 0.1"):
        run_trainer(resume=True, beta=0.1, **args).train()
    assert (tmp_path / "run.json").read_bytes() == before
    (tmp_path / "run.json").write_text("{torn")
    with pytest.raises(checkpoints.ResumeError, match=r"resume: .*run.json cannot be read: "):
        run_trainer(resume=True, **args).train()
    (tmp_path / "run.json").write_bytes(before)
    run_trainer(resume=True, **args).train()


def test_a_reference_and_a_reward_of_the_same_name_are_told_apart_when_a_run_is_resumed(tmp_path):
    def digits(completions, **columns):  # as test_training's is called
        return [0.5] * len(completions)

    args = {"output_dir": str(tmp_path), "save_steps": 1}
    run_trainer(with_adapters(tiny_model()), max_steps=1, **args).train()
    fresh = with_adapters(tiny_model(), random=False)
    with pytest.raises(checkpoints.ResumeError, match="reference was 'a copy', now 'the base"):
        run_trainer(fresh, max_steps=2, resume=True, **args).train()
    with pytest.raises(
        checkpoints.ResumeError, match=r"rewards was .*test_training:digits.*runner"
    ):
        again = with_adapters(tiny_model())
        run_trainer(again, digits, max_steps=2, resume=True, **args).train()


def test_an_update_is_saved_once(tmp_path):
    folder = tmp_path / "a" / "b"
    t = run(folder, max_steps=2)
    t.callbacks[-2].save(t)
    assert sorted(p.name for p in folder.glob("*checkpoint*")) == ["checkpoint-2"]


def test_processes_that_find_different_checkpoints_go_no_further(tmp_path, monkeypatch):
    run(tmp_path, max_steps=2)
    monkeypatch.setattr(checkpoints, "gather", lambda step: [step, 0])
    with pytest.raises(checkpoints.ResumeError, match="output_dir must be on a disk that all"):
        run(tmp_path, max_steps=4, resume=True)


def test_a_run_of_no_updates_ends_well(model_dir, data, tmp_path, capsys):
    command = ["--model", str(model_dir), "--data", str(data), *SMALL, "--max_steps", "0"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    assert "0 updates" in capsys.readouterr().out and (tmp_path / "out/adapter").is_dir()


@pytest.mark.parametrize("held", ["metrics.jsonl", "adapter", "summary.json", "checkpoint-3"])
def test_a_folder_that_holds_a_run_is_not_written_to_unless_it_is_resumed(held, tmp_path):
    (tmp_path / held).mkdir()
    with pytest.raises(ValueError, match=rf"holds another run \({held}\); resume it or name a new"):
        run_trainer(max_steps=1, output_dir=str(tmp_path), save_steps=1).train()
    assert [path.name for path in tmp_path.iterdir()] == [held]


def test_a_checkpoint_is_whole_is_made_at_the_end_and_keeps_nothing_of_a_torn_one(tmp_path):
    (tmp_path / ".checkpoint-3.tmp/torn").mkdir(parents=True)
    run(tmp_path, max_steps=3)
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    last = tmp_path / "checkpoint-3"
    files = {path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file()}
    weights = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files == weights | {"state.json", "trainer.pt"}


def test_a_checkpoint_that_cannot_be_begun_says_why(tmp_path, monkeypatch):
    t = run_trainer(max_steps=1, output_dir=str(tmp_path), save_steps=1)
    original = Path.mkdir

    def mkdir(path, *args, **options):
        if path.name.endswith(".tmp"):
            raise OSError("no room")
        original(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match="checkpoint-1 could not be written: no room"):
        t.train()


def test_a_base_model_is_told_by_a_sample_of_each_tensor_its_name_and_its_dtype():
    W = torch.arange(320.0)
    seen = {checkpoints.fingerprint([("W", W)]), checkpoints.fingerprint([("V", W)])}
    seen |= {checkpoints.fingerprint([("W", W.double())]), checkpoints.fingerprint([])}
    for place in (0, 110, 319 // 11 * 11):  # one in 11 is looked at
        other = W.clone()
        other[place] += 0.5
        seen.add(checkpoints.fingerprint([("W", other)]))
    assert len(seen) == 7


def test_lines_that_the_record_lacks_are_named_when_a_run_is_resumed(tmp_path, capsys):
    run(tmp_path, stop_at=4)
    run(tmp_path, resume=True, max_steps=5)
    assert "lacks" not in capsys.readouterr().err
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for lost, steps in ((3, 5), (5, 6)):
        kept = [line for line in whole.splitlines(True) if f'"step": {lost},' not in line]
        path.write_text("".join(kept))
        run(tmp_path, resume=True, max_steps=steps)
        said = capsys.readouterr().err
        assert f"metrics.jsonl lacks 1 of 5 lines, the first that of update {lost}" in said


def test_what_json_lacks_is_the_same_text_in_every_process():
    assert checkpoints.as_text({"b", "a"}) == ["'a'", "'b'"]
    assert checkpoints.as_text(run) == "run" and checkpoints.as_text(Path("a")) == "a"
    rows = [ROWS[0] | {"allowed": {"b", "a"}, "check": run}]
    assert checkpoints.identity(run_trainer(rows=rows))["train data"]


def test_old_checkpoints_go_and_a_full_disk_leaves_the_rest(tmp_path):
    run(tmp_path, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(p.stat().st_size for p in (tmp_path / "checkpoint-6").rglob("*"))
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (largest // 2, limits[1])
    )  # a write in the middle of a file fails
    try:
        with pytest.raises(
            OSError,
            match=r"checkpoint-8 could not be written.*earlier checkpoints are as they were",
        ):
            run(tmp_path, max_steps=8, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    run(tmp_path, max_steps=8, resume=True)
    assert (tmp_path / "checkpoint-8/state.json").exists()


def test_old_checkpoints_are_counted_from_the_present_update(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()  # damaged, and left alone
    run(tmp_path, save_total_limit=1, resume=True)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_a_snapshot_reference_survives_resuming(tmp_path):
    start = tmp_path / "start"
    save_lora(with_adapters(tiny_model()), start)
    args = {"output_dir": str(tmp_path / "run"), "save_steps": 1, "beta": 0.1}
    first = run_trainer(load_lora(tiny_model(), start), max_steps=2, **args)
    first.train()
    again = run_trainer(load_lora(tiny_model(), start), max_steps=3, resume=True, **args)
    again.train()
    for name, tensor in first.reference.tensors.items():
        assert torch.equal(tensor, again.reference.tensors[name])
        assert not torch.equal(tensor, again.params[name])


def test_the_command_line_trains_resumes_and_writes_what_it_says(
    model_dir, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = [
        "--model",
        str(model_dir),
        "--data",
        str(data),
        "--eval_size",
        "5",
        "--rewards",
        "accuracy,format",
        *SMALL,
    ]
    command += [
        "--output_dir",
        "out",
        "--variant",
        "gspo",
        "--epsilon",
        "0.1",
        "--save_steps",
        "1",
        "--r",
        "2",
    ]
    assert main(command) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert {
        "accuracy_before",
        "accuracy_after",
        "think_rate_before",
        "think_rate_after",
        "seconds",
        "seed",
    } <= set(summary)
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2] and lines(
        out / "completions.jsonl"
    )
    state = json.loads((out / "checkpoint-2/state.json").read_text())["run"]
    assert (
        state["epsilon"] == 0.1
        and state["epsilon_high"] == 4e-4
        and state["importance_sampling_level"] == "sequence"
    )
    assert state["lora.r"] == 2 and "before" in capsys.readouterr().out
    load_lora(AutoModelForCausalLM.from_pretrained(model_dir), out / "adapter")
    assert main(command) == 2 and "holds another run" in capsys.readouterr().err
    assert main([*command, "--resume", "--learning_rate", "1"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: resume: learning_rate was 0.0031, now 1.0")
    )
    assert main([*command, "--resume", "--max_steps", "3"]) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2, 3]
    goes_on = [*command[: command.index("--output_dir")], "--adapter", "out/adapter"]
    assert main(goes_on) == 0  # in a new folder under runs/
    assert len(list((tmp_path / "runs").glob("*/adapter"))) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--num_generations", "1"], "num_generations = 1"),
        (["--temperature", "0"], "temperature"), (["--epsilon", "-0.1"], "epsilon = -0.1"),
        (["--rewards", "acuracy"], "did you mean 'accuracy'"),
        (["--variant", "dapoo"], "did you mean 'dapo'"),
        (["--learning_rte", "1"], "'learning_rate'"), (["--use_vllm", "true"], "vLLM"),
        (["--top_p=0.9"], "untruncated"), (["--data", "none.jsonl"], "none.jsonl"),
        (["--model", "no/such/model"], "no/such/model"), (["--resume"], "output_dir"),
        (["--eval_size", "40"], "40 rows"), (["--rewards", "none.py:f"], "none.py"),
        (["--reward_weights", "1", "2"], "reward_weights"), (["stray"], "stray"),
        (["--target_modules", "nope"], "nope"), (["--device", "cuda:77"], "device"),
        (["--max_completion_length", "60"], "data.jsonl:1"),
        (["--delta", "2", "--variant", "cispo"], "delta"), (["--rewards", ""], "at least one"),
        (["--adapter", "nowhere"], "nowhere"), (["--learning_rate", "nan"], "learning_rate"),
        (["--beta", "x"], "--beta: invalid float"), (["--use-vllm"], "vLLM"),
        (["--loss_type", "gpro"], "grpo"), (["--r", "0"], "r = 0"), (["--seed", "-1"], "seed = -1"),
        (["--reward_timeout", "1e10"], "reward_timeout"),
        (["--lora_alpha", "nan"], "lora_alpha"), (["--adapter", "x", "--r", "64"], "--r"),
        (["--target_modules", "*_proj"], "regular expression"),
        (["--rank_pattern", "[1]"], "rank_pattern"), (["--device", "meta"], "device"),
        (["--num_iterations", "3"], "multiple"), (["--adapter", ""], "--adapter: is empty"),
        (["--output_dir="], "--output_dir: is empty"), (["--model="], "--model: is empty"),
        (["--eval_steps", "1"], "--eval_steps needs problems"),
        (["--eval_data", "d", "--eval_size", "2"], "choose one"),
        (["--prompt_column", "question"], "data.jsonl:1: --prompt_column question: the row has"),
        (["--rewards", "mine.py"], "write mine.py:FUNCTION"),
        (["--output_dir", __file__], "test_runner.py is a file; name another folder"),
        (["--output_dir", f"{__file__}/out"], "test_runner.py is a file; name another folder"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_line_and_exit_code_2(
    change, words, model_dir, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(model_dir), "--data", str(data), *SMALL, *change]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and words in said
    assert not (tmp_path / "runs").exists()  # and leaves nothing behind


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "1"\n', ":1: "), (b'{"prompt": "1", "answer": "2"}\n\n[1]\n', ":3: "),
        (b"", "no rows"), (b"\n \n", "no rows"),
        (b'{"prompt": "1", "answer": "2"}\n{"prompt": "1"}\n',
         ":2: reward accuracy_reward: missing a required"),
        (b'{"prompt": ""}', ":1: 'prompt'"), (b'{"answer": "2"}', ":1: 'prompt'"),
        (b'{"prompt": [{"role": "user"}]}', ":1: 'prompt'"), (b"\xff\xfe{}", ":1: "),
        (b'{"prompt": 7}', ":1: 'prompt'"), (b"[" * 100_000, ":1: "),
        (b'{"prompt": "' + b"1+" * 99 + b'", "answer": "1"}', ":1: the prompt has"),
        (b'{"question": "1", "answer": "2"}', "the row has question, answer"),
        (b'{"prompt": "1", "answer": "2", "images": []}', ":1: column 'images'"),
        (b'[{"prompt": "1"}]', ":1: looks like a JSON array, not JSONL: pandas.read_json"),
        (b'\xef\xbb\xbf[\n{"prompt": "1"}]', ":1: looks like a JSON array"),
        (b"prompt,answer\n1,2\n", ":1: looks like CSV, not JSONL: pandas.read_csv"),
        (b"prompt\tanswer\n1\t2\n", ":1: looks like CSV"),
        (b"PAR1\x15\x04", ":1: looks like parquet, not JSONL: pandas.read_parquet"),
        (b"\x1f\x8b\x08\x00\x00", ":1: looks like gzip, not JSONL: gunzip it"),
        ('{"prompt": "1"}'.encode("utf-16"), ":1: looks like UTF-16, not JSONL: iconv -f UTF-16"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_with_file_and_line(content, words, model_dir, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert (
        main(
            [
                "--model",
                str(model_dir),
                "--data",
                str(path),
                "--output_dir",
                str(tmp_path / "out"),
                *SMALL,
            ]
        )
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{path}" in said and words in said and not (tmp_path / "out").exists()


def test_a_tokenizer_without_eos_is_refused(data, tmp_path, capsys):
    model = tiny_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer = demo.demo_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--data", str(data), *SMALL]) == 2
    assert "EOS" in capsys.readouterr().err


GSM8K = [  # as it is published
    {"question": "Weng earns $12 an hour. She worked 50 minutes. How much did she earn?",
     "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nShe earned 0.2 x 50 = 10.\n#### 10"},
    {"question": "What is 2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
]  # fmt: skip


def test_another_column_may_be_the_prompt_as_in_gsm8k(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    rows = cli.read_jsonl(path, "question")
    assert rows[1] == {"prompt": "What is 2+2?", "answer": GSM8K[1]["answer"]}
    score = lambda text: rewards.accuracy_reward([""], [text], [rows[0]["answer"]])
    assert score("#### 10") == [1.0] and score(r"\boxed{\$10}") == [1.0] and score("10") == [0.0]
    for row in rows:
        rewards.check_row(rewards.accuracy_reward, row)


def test_every_setting_of_trl_and_peft_is_ours_or_answered():
    trl, peft, transformers = map(pytest.importorskip, ("trl", "peft", "transformers"))
    theirs = [trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments, peft.LoraConfig]
    names = {
        f.name
        for kind in [*theirs, transformers.TrainingArguments]
        for f in dataclasses.fields(kind)
    }
    ours = {action.dest for action in cli.make_parser()._actions}
    answered = cli.LEFT_OUT.keys() | cli.ALIASES.keys()
    assert not (unknown := names - ours - answered), unknown
    assert not ours & answered and ours >= {*cli.ALIASES.values()}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora_r 8", "--lora_r: it is called --r here"),
        ("--bf16", "--bf16: use --dtype bfloat16"),
        ("--model_name_or_path x", "--model_name_or_path: it is called --model here"),
        ("--report_to wandb", "--report_to: every run writes metrics.jsonl"),
        ("--use_bnb_nested_quant", "--use_bnb_nested_quant: 4 bits are NF4, plain"),
        ("--max_prompt_length 5", "--max_prompt_length: prompts are never cut"),
        ("--learning_rat 1", "'learning_rat' is unknown, did you mean 'learning_rate'?"),
        ("--zzzz 1", "'zzzz' is unknown (all: "),
    ],
)
def test_a_setting_of_another_trainer_is_answered_with_what_to_do_here(flags, words, capsys):
    assert main(flags.split()) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and ("did you mean" in said) == ("rat " in flags)


def test_trls_names_of_the_sampler_correction_are_taken():
    flags = "--vllm_importance_sampling_mode token_mask --vllm_importance_sampling_clip_min=0.5"
    flags += " --vllm_importance_sampling_cap 2"
    _, _, args = cli.parse(["--model", "m", "--data", "d", *flags.split()])
    bounds = args.sampler_correction_clip_min, args.sampler_correction_clip_max
    assert (args.sampler_correction, *bounds) == ("token_mask", 0.5, 2.0)


def test_keeping_all_checkpoints_comes_back_from_the_file(tmp_path):
    run, lora, args = cli.parse(["--model", "m", "--data", "d", "--save_total_limit", "None"])
    path = cli.write_settings(tmp_path / "settings.args", run, lora, args)
    assert run.save_total_limit is None and cli.parse([f"@{path}"]) == (run, lora, args)


def test_a_checkpoint_that_was_moved_away_and_linked_to_is_unlinked_when_it_is_old(tmp_path):
    run(tmp_path / "run", stop_at=2, save_total_limit=1)
    (tmp_path / "run/checkpoint-2").rename(tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert run(tmp_path / "run", resume=True, save_total_limit=1).step == 6
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert (tmp_path / "elsewhere/state.json").exists()


def test_template_arguments_are_read_as_json_and_come_back_from_the_file(tmp_path):
    model = ["--model", "m", "--data", "d"]
    run, lora, args = cli.parse([*model, "--chat_template_kwargs", '{"enable_thinking": false}'])
    assert args.chat_template_kwargs == {"enable_thinking": False}
    path = cli.write_settings(tmp_path / "settings.args", run, lora, args)
    assert cli.parse([f"@{path}"]) == (run, lora, args)


def test_a_checkpoint_needs_no_folder_that_can_be_opened(tmp_path, monkeypatch):
    """Windows opens no folders, and cannot flush a file that is open for reading alone."""
    openers = os.open

    def windows(path, flags, *args, **kwargs):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        assert (
            flags & os.O_RDWR
            or flags & os.O_WRONLY
            or flags & os.O_CREAT
            or "fsync" not in (sys._getframe(1).f_code.co_name)
        )
        return openers(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", windows)
    run_trainer(output_dir=str(tmp_path), save_steps=1).train()
    assert len(checkpoints.checkpoints(tmp_path)) == 2
    monkeypatch.setattr(Path, "is_dir", lambda path: False)  # what can be opened must be
    monkeypatch.setattr(os, "open", mock.Mock(side_effect=PermissionError("no")))
    with pytest.raises(PermissionError):
        checkpoints.fsync(tmp_path)


def test_a_terminal_without_a_letter_does_not_end_the_run(model_dir, data, tmp_path):
    """The table shows completions; an ASCII terminal lacks most letters."""
    command = [
        sys.executable,
        "grpo_lora.py",
        "--model",
        str(model_dir),
        "--data",
        str(data),
        *SMALL,
    ]
    odd = tmp_path / "é∑"
    env = os.environ | PLAIN | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [*command, "--output_dir", str(odd)], env=env, capture_output=True, cwd=HERE, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (odd / "summary.json").exists() and b"\\" in done.stdout


def test_math_verify_where_it_is_not_installed_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    assert main(["--rewards", "math_verify"]) == 2
    assert "pip install math-verify" in capsys.readouterr().err


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for kind in (cli.RunConfig, LoRAConfig, GRPOConfig):
        for f in dataclasses.fields(kind):
            assert f"--{f.name}" in text and " ".join(f.metadata["help"].split())[:30] in text


def test_a_failing_reward_ends_the_run_with_one_line_and_exit_code_1(
    model_dir, data, tmp_path, capsys
):
    (tmp_path / "bad.py").write_text(
        "def bad(completions, **columns):\n    raise RuntimeError('boom')\n"
    )
    command = [
        "--model",
        str(model_dir),
        "--data",
        str(data),
        "--rewards",
        f"{tmp_path}/bad.py:bad",
        *SMALL,
    ]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 1
    assert (
        capsys.readouterr().err.strip().splitlines()[-1]
        == "error: reward bad raised RuntimeError: boom"
    )


def test_settings_may_stand_in_a_file_which_each_run_leaves_behind(
    model_dir, data, tmp_path, capsys
):
    common = tmp_path / "common.args"
    words = f"--model '{model_dir}'\n--data '{data}' --seed 3 " + " ".join(SMALL)
    common.write_text(words, encoding="utf-8-sig")  # as Windows writes it
    assert (
        main(
            [
                f"@{common}",
                "--seed",
                "4",
                "--system_prompt",
                "be 'brief'",
                "--output_dir",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    script, _, args = cli.parse([f"@{tmp_path}/a/settings.args"])
    assert (script.model, args.seed, args.system_prompt) == (
        str(model_dir),
        4,
        "be 'brief'",
    )  # the later flag beats the file
    assert main([f"@{tmp_path}/a/settings.args", "--output_dir", str(tmp_path / "b")]) == 0
    same_files(tmp_path / "a", tmp_path / "b")
    for bad in ("nowhere.args", "bad.args"):
        (tmp_path / "bad.args").write_text("--model 'unclosed")
        assert (
            main([f"@{tmp_path}/{bad}"]) == 2
            and f"{bad}: not a file of settings" in capsys.readouterr().err
        )


def test_no_file_beside_the_script_is_read_unasked(tmp_path):
    (tmp_path / "grpo_lora.args").write_text("--seed 77")
    with mock.patch.object(sys, "argv", [str(tmp_path / "grpo_lora.py")]):
        assert cli.parse([])[2].seed == 0


TUNING = ["--prompts_per_step", "4", "--num_generations", "4", "--max_completion_length", "6"]
TUNING += ["--max_steps", "30", "--r", "2"]


def tuning(model_dir, data, folder) -> list[str]:
    (folder / "r.py").write_text("from test_training import digits")
    return [
        "--model",
        str(model_dir),
        "--data",
        str(data),
        "--rewards",
        f"{folder}/r.py:digits",
        *TUNING,
    ]


def test_tuning_halves_runs_that_are_beginnings_of_whole_ones_and_can_be_resumed(
    model_dir, data, tmp_path, capsys
):
    out = tmp_path / "tuning"
    command = [*tuning(model_dir, data, tmp_path), "--seed", "5", "--learning_rate", "0.008"]
    assert main([*command, "--tune", "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    folders = {p.name.removeprefix("learning_rate"): p for p in out.iterdir() if p.is_dir()}
    assert sorted(map(float, folders)) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
    rewards = {
        x: [row["reward"] for row in lines(folder / "metrics.jsonl")]
        for x, folder in folders.items()
    }
    assert sorted(map(len, rewards.values())) == [3, 3, 3, 3, 6, 6, 12, 12]
    assert "48 updates, where 8 whole runs take 240" in said
    better = lambda among, a, b: sorted(
        among, key=lambda x: (-sum(rewards[x][a:b]), abs(math.log2(float(x) / 0.008)))
    )
    four = better(rewards, 0, 3)[:4]
    two = better(four, 3, 6)[:2]
    gaps = [a - b for a, b in zip(*(rewards[x][6:12] for x in better(two, 6, 12)), strict=True)]
    tied = sum(gaps) / 6 <= statistics.stdev(gaps) / 6**0.5  # then the lower rate
    best = min(two, key=float) if tied else better(two, 6, 12)[0]
    assert {x for x in rewards if len(rewards[x]) > 3} == set(four) and {
        x for x in rewards if len(rewards[x]) > 6
    } == set(two)
    script, lora, args = cli.parse([f"@{out}/best.args"])
    assert (
        args.learning_rate == float(best)
        and script.tune is None
        and args.output_dir is None
        and lora.r == 2
    )
    assert main([f"@{out}/best.args", "--output_dir", str(tmp_path / "whole")]) == 0
    drop = lambda rows: [{k: v for k, v in row.items() if k != "step_time"} for row in rows]
    assert drop(lines(tmp_path / "whole/metrics.jsonl"))[:12] == drop(
        lines(folders[best] / "metrics.jsonl")
    )
    # interrupted and resumed, it comes to the same
    before = (out / "best.args").read_text()
    shutil.rmtree(folders[best])
    assert main([*command, "--tune", "--output_dir", str(out), "--resume"]) == 0
    assert (out / "best.args").read_text() == before


def test_tuning_a_rank_too(model_dir, data, tmp_path, capsys, monkeypatch):
    def update(self, rows):
        """Learns nothing, and is the better the nearer rate and rank are to 4e-3 and 8."""
        self.step += 1
        rate, r = self.args.learning_rate, self.model.lora_config.r
        worse = abs(math.log2(rate / 4e-3)) + abs(math.log2(r / 8))
        return {"reward": -worse, "grad_norm": 1.0, "skipped_updates": 0.0}

    models = []

    def prepare(*settings):
        assert not any(model() for model in models)  # memory is for one at a time
        t = cli.prepare(*settings)
        models.append(weakref.ref(t.model))
        return t

    monkeypatch.setattr(GRPOTrainer, "update", update)
    monkeypatch.setattr("runner.tune.prepare", prepare)
    command = [*tuning(model_dir, data, tmp_path), "--learning_rate", "0.016"]
    assert main([*command, "--tune", "learning_rate,r", "--output_dir", str(tmp_path / "out")]) == 0
    _, lora, args = cli.parse([f"@{tmp_path}/out/best.args"])
    assert (args.learning_rate, lora.r) == (0.004, 8)
    folders = [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert len(folders) == 24 and "24 whole runs" in capsys.readouterr().out
    assert (tmp_path / "out/learning_rate0.004--r8").is_dir()


def test_tuning_drops_what_diverges_on_resuming_too(model_dir, data, tmp_path, capsys):
    command = [
        *tuning(model_dir, data, tmp_path),
        "--beta",
        "0.01",
        "--learning_rate",
        "1e20",
        "--tune",
        "--max_steps",
        "60",
    ]
    for more in ([], ["--resume"]):
        assert main([*command, "--output_dir", str(tmp_path / "out"), *more]) == 1
        assert "every candidate has a mean reward of -inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--max_steps", "29"], "at least 30"), (["--warmup_steps", "1"], "at least 40"),
        (["--learning_rate", "0"], "above 0"), (["--resume"], "needs output_dir"),
        (["--tune", "learning_rate,r", "--adapter", "x"], "tune learning_rate alone"),
        (["--output_dir", "."], "not empty"), (["--tune", "epsilon"], "invalid choice"),
    ],
)  # fmt: skip
def test_a_tuning_that_cannot_work_is_refused(
    change, words, model_dir, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*tuning(model_dir, data, tmp_path)[:-2], "--tune", *change]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_the_report_shows_hostile_text_as_text_and_runs_without_tokens(
    tmp_path, capsys, monkeypatch
):
    shout = lambda completions, **columns: [float("1" in text) for text in completions]
    rows = [{"prompt": "1</td><script>alert(1)</script>\u202e", "answer": "1"}] * 4
    options = {"max_steps": 3, "num_iterations": 3, "learning_rate": 0.1, "log_tokens_steps": 1}
    run_trainer(reward=shout, rows=rows, output_dir=str(tmp_path), **options).train()
    page = report.report(tmp_path)
    assert (
        "<script" not in page
        and "\u202e" not in page
        and "&lt;script&gt;" in page
        and "http" not in page
    )
    assert (
        page.count("<svg") >= 8 and page.count("<tr>") == 2 * (1 + 4) and 'class="clipped"' in page
    )
    with pytest.raises(ValueError, match="update 2: its tokens were not recorded; there are 3"):
        report.report(tmp_path, chosen=[2])
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "nowhere")])
    assert report.main() == 2 and "is its folder one of a run?" in capsys.readouterr().err
    bare = tmp_path / "bare"
    run_trainer(output_dir=str(bare)).train()
    assert "did not record its tokens" in report.report(bare)


def test_a_run_that_is_killed_resumes_and_one_that_gets_a_signal_ends_well(
    model_dir, data, tmp_path
):
    command = ["--model", str(model_dir), "--data", str(data), *CLI_RUN, "--max_steps", "30"]
    process = [sys.executable, "-c", INTERRUPTING, "20", str(tmp_path), *command]
    subprocess.run(process, cwd=HERE, env=os.environ | PLAIN, check=True, timeout=300)
    killed = [path for path in tmp_path.glob("killed-*") if path.is_dir()]  # at twenty moments
    assert killed
    for folder in killed:
        same_files(tmp_path / "straight", folder)
    for number in (signal.SIGINT, signal.SIGTERM):  # the update in hand was finished, and saved
        folder = tmp_path / f"signal-{number}"
        last = lines(folder / "metrics.jsonl")[-1]["step"]
        assert (folder / f"checkpoint-{last}/state.json").exists() and last < 4000
        assert "--resume" in Path(f"{folder}.out").read_text()


@pytest.mark.parametrize("path", sorted((HERE / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(HERE / "benchmarks"), str(HERE), *sys.path])
    assert runpy.run_path(str(path), run_name="imported")["__doc__"]


def test_the_report_marks_tokens_at_a_bound_where_the_loss_bounds_the_ratio():
    moved = {"advantage": 1.0, "logps_sampled": [-2.0], "logps_after": [-1.0]}
    marked = {
        kind
        for kind in grpo_lora.AGGREGATION
        if report.clipped(moved, GRPOConfig(loss_type=kind, epsilon_high=0.2)) == [True]
    }
    assert marked == {"grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo"}


def test_model_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\rc\u202ed\ne") == "a\\x1b[2Jb\\rc\\u202ed\ne"


def test_rewards_are_found_by_name_by_file_and_by_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Half:\n    value: float = 0.5\n"
        "def my_reward(completions, **columns):\n    return [Half().value for _ in completions]\n"
    )
    assert cli.load_reward(f"{tmp_path}/mine.py:my_reward")(completions=["a"]) == [0.5]
    assert sys.modules["mine"].Half().value == 0.5  # pickles and dataclasses look there
    del sys.modules["mine"]
    assert (
        cli.load_reward("accuracy")
        is cli.load_reward("accuracy_reward")
        is cli.load_reward("rewards:accuracy_reward")
    )
    assert cli.load_reward("format") is rewards.REWARDS["format"]
    (tmp_path / "ends.py").write_text("import sys\nsys.exit()\n")
    for spec, words in [
        (f"{tmp_path}/ends.py:f", "cannot be imported: SystemExit"),
        ("acuracy", "accuracy"), (f"{tmp_path}/mine.py:other", "my_reward"),
        (f"{tmp_path}/none.py:f", "none.py"), ("no.such.module:f", "no.such.module"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            cli.load_reward(spec)


def test_demo_task_thinks_right_and_every_problem_is_distinct():
    problems = demo.sum_problems()
    assert len({p["prompt"][0]["content"] for p in problems}) == len(problems) == 1000
    assert problems == demo.sum_problems() != demo.sum_problems(seed=1)
    replies = [demo.sum_completion(p, think=True) for p in problems]
    assert set(rewards.accuracy_reward(None, replies, [p["answer"] for p in problems])) == {1.0}
    assert set(rewards.REWARDS["format"](None, replies)) == {1.0}
    for a, b, total in re.findall(r"(\d+)\+(\d+)=(\d+)", " ".join(replies)):
        assert int(a) + int(b) == int(total)


# ---------------------------------------------------------------------------- the three files alone

THREE = ("grpo_lora.py", "lora.py", "rewards.py")
ALONE = """
import json
import runpy
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from grpo_lora import GRPOConfig, GRPOTrainer
from lora import LoRAConfig, apply_lora, load_lora

words = ["<pad>", "<end>", "<unk>", *"0123456789+=?"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
names = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
sizes = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "eos_token_id": 1}
sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": None}
make = lambda: torch.manual_seed(0) and AutoModelForCausalLM.from_config(LlamaConfig(**sizes))

def digits(completions, **columns):
    return [float(sum(c.isdigit() for c in text)) for text in completions]

rows = [{"prompt": f"{a}+{b}=?", "answer": str(a + b)} for a in range(4) for b in range(4)]
args = GRPOConfig(output_dir="run", max_steps=2, prompts_per_step=2, max_completion_length=4)
model = apply_lora(make(), LoRAConfig())
trainer = GRPOTrainer(model, [digits, "accuracy"], args, rows[:12], rows[12:], tokenizer)
trainer.train()
assert trainer.step == 2 and trainer.evaluate()["eval_reward"] >= 0
read = lambda name: [json.loads(line) for line in Path("run", name).read_text().splitlines()]
assert [row["step"] for row in read("metrics.jsonl")] == [0, 1, 2]
assert {row["step"] for row in read("completions.jsonl")} == {0, 1, 2}
assert any(row["grad_norm"] > 0 for row in read("metrics.jsonl")[1:])
again = load_lora(make(), "run/adapter")
ids = torch.tensor([[3, 13, 4]])
assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
assert not torch.equal(again(ids).logits, make().eval()(ids).logits)

runpy.run_path("grpo_lora.py", run_name="__main__")  # ends with a line to read
"""


def test_the_three_files_alone_train_evaluate_and_write_a_run_and_refuse_to_be_a_command(tmp_path):
    for name in THREE:
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    env = os.environ | PLAIN | {"HF_HUB_OFFLINE": "1"}
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run([sys.executable, "alone.py"], **options)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"metrics.jsonl", "completions.jsonl", "adapter"}
    assert done.returncode == 1 and not done.stdout  # how the script at its end was left
    *_, said = done.stderr.splitlines()  # other libraries may say things before it
    assert said.startswith("error: the command line lives in runner/")
    there = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert there == {*THREE, "alone.py", "run"}  # and leaves nothing behind


def imported(source: str) -> set[str]:
    """What a file imports, wherever it does: the first part of each module's name."""
    nodes = list(ast.walk(ast.parse(source)))
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in names}


def test_the_three_files_import_nothing_of_the_runner_and_the_runner_nothing_of_the_proof():
    ours = {path.stem for path in HERE.glob("*.py")} | {"runner", "checks", "benchmarks"}
    sources = {name: (HERE / name).read_text(encoding="utf-8") for name in THREE}
    story, main, command = sources["grpo_lora.py"].partition('\nif __name__ == "__main__":\n')
    assert imported(sources["lora.py"]) & ours == imported(sources["rewards.py"]) & ours == set()
    assert imported(story) & ours == {"lora", "rewards"}
    for text in (sources["lora.py"], sources["rewards.py"], story):
        assert "import_module" not in text and "__import__" not in text
        assert not re.search(r"\brunner\b", text)
    assert main and imported(textwrap.dedent(command)) & ours == {"runner"}
    assert len(command.splitlines()) <= 5
    for path in (HERE / "runner").glob("*.py"):
        found = imported(path.read_text(encoding="utf-8")) & ours
        assert found <= {"grpo_lora", "lora", "rewards", "runner"}, path.name


def test_settings_that_begin_with_a_sign_come_back_from_their_file(tmp_path):
    given = ["--model", "m", "--data=@data", "--system_prompt=-brief 'and' @true\nlines\r\n"]
    given += ["--reward_weights", "1", "-1e-05", "--rewards", "format,accuracy"]
    settings = cli.parse([*given, "--target_modules", "q_proj,v_proj"])
    path = cli.write_settings(tmp_path / "settings.args", *settings)
    assert cli.parse([f"@{path}"]) == settings


def test_resuming_writes_over_no_record_of_a_run_that_saved_nothing(tmp_path):
    old = trainer(output_dir=str(tmp_path), max_steps=2)
    old.train()
    shutil.rmtree(tmp_path / "adapter")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    new = trainer(output_dir=str(tmp_path), max_steps=2, callbacks=[Checkpoints(resume=True)])
    for _ in range(2):  # it stays refused
        with pytest.raises(ResumeError, match=r"holds .*\.jsonl of a run that saved nothing"):
            new.train()
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert not (tmp_path / "run.json").exists()


def test_one_callback_saves_the_runs_of_a_sweep_each_as_its_own(tmp_path):
    callbacks = [Checkpoints(save_steps=2)]
    for rate in (1e-3, 1e-2):
        folder = tmp_path / str(rate)
        settings = {"max_steps": 2, "learning_rate": rate, "output_dir": str(folder)}
        trainer(callbacks=callbacks, **settings).train()
        state = json.loads((folder / "checkpoint-2/state.json").read_text())
        assert state["run"]["learning_rate"] == rate
        assert json.loads((folder / "run.json").read_text()) == state["run"]


@pytest.mark.parametrize(("steps", "limit"), [(-1, 2), (1, -1), (1, 0)])
def test_checkpoints_keep_at_least_one(steps, limit):
    with pytest.raises(ValueError, match=r"save_total_limit = .*at least 1; None keeps all"):
        Checkpoints(steps, limit)


@pytest.mark.parametrize("name", ["completions.jsonl", "settings.args", "run.json"])
def test_no_file_of_a_users_folder_is_written_over(name, model_dir, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    command = ["--model", str(model_dir), "--data", str(data), "--output_dir", f"{tmp_path}/out"]
    assert main(command) == 2
    assert f"holds another run ({name})" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_run_is_not_resumed_under_another_chat_template(tmp_path, monkeypatch):
    run(tmp_path, stop_at=2)
    monkeypatch.setattr(TOKENIZER, "chat_template", f"{TOKENIZER.chat_template} ")
    with pytest.raises(ResumeError, match=r"chat template was .*now"):
        run(tmp_path, resume=True)


def test_a_disk_without_locks_is_trained_on(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert run(tmp_path).step == 6


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    pytest.importorskip("fcntl")  # which Windows lacks
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ResumeError, match="another process is training in"):
            run(tmp_path)
        other.stdin.close()
    assert run(tmp_path).step == 6
    assert run(tmp_path, resume=True).step == 6  # a process does not lock itself out


def test_an_adapter_that_cannot_be_written_is_one_line(
    model_dir, data, tmp_path, capsys, monkeypatch
):
    def full(*args):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(grpo_lora, "save_lora", full)
    command = ["--model", str(model_dir), "--data", str(data), *CLI_RUN, "--max_steps", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 1
    assert "out/adapter could not be written: No space left" in capsys.readouterr().err


def test_a_reward_may_log_under_any_name(tmp_path):
    def logs(completions, log_metric, log_extra, **columns):
        log_metric("warnings", 1.0)
        log_extra("rewards/why", ["<b>"] * len(completions))
        return [float(i % 2) for i, _ in enumerate(completions)]

    run_trainer(reward=logs, output_dir=str(tmp_path), log_tokens_steps=1).train()
    assert all(row["warnings"] == 1.0 for row in lines(tmp_path / "metrics.jsonl"))
    assert '<td class="n">&lt;b&gt;</td>' in report.report(tmp_path)


def test_a_variant_that_flags_undo_gives_way_and_that_is_said():
    command = ["--model", "m", "--data", "d", "--variant", "dr_grpo", "--loss_type", "dapo"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.parse(command)[2].scale_rewards == "none"
    with pytest.warns(match="--variant dr_grpo has no effect beside --loss_type dapo, --scale_rew"):
        assert cli.parse([*command, "--scale_rewards", "group"])[2].scale_rewards == "group"


def test_none_can_be_said_and_what_is_no_object_is_refused(capsys):
    command = ["--model", "m", "--data", "d"]
    assert cli.parse([*command, "--save_total_limit", "None"])[0].save_total_limit is None
    assert cli.parse([*command, "--save_total_limit", "3"])[0].save_total_limit == 3
    with pytest.raises(ValueError, match=r"kwargs: invalid json_object value: '\[1\]'"):
        cli.parse([*command, "--chat_template_kwargs", "[1]"])
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    assert "Turns --use_bias_correction_kl off" in " ".join(capsys.readouterr().out.split())


def test_a_record_needs_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for record in (grpo_lora.Record(), checkpoints.Checkpoints()):
        with pytest.raises(ValueError, match=r"output_dir: .* folder"):
            trainer(callbacks=[record]).train()
    assert not list(tmp_path.iterdir())


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-2", "checkpoint-x", "other-11"):
        (tmp_path / name).mkdir()
    names = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
