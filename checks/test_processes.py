"""Several processes make the update of one, stop together, and notice when one is gone."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import grpo_lora
import rewards
from checks.helpers import CLI_RUN, HERE, PLAIN, lines, run, run_trainer, same_run
from grpo_lora import SAMPLER_GAP
from runner import fast, processes
from runner.cli import main
from test_training import EOS, ROWS, adapters_of, prompts, sample, tiny_model, update, with_adapters

# -------------------------------------------------------------------------------- several processes


@functools.cache
def nursery() -> subprocess.Popen:
    """A process that has imported all and computed nothing. What forks from it may train: where a
    backward pass has run, it may not."""
    code = "from checks import test_processes as t; t.fork_on_request()"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": HERE}
    environment = os.environ | PLAIN | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **options)


def fork_on_request() -> None:
    for line in sys.stdin:
        world, job, folder = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what a job prints is no answer
            fork_ranks(world, globals()[job], folder)
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)


def on_ranks(world: int, job, folder: Path) -> list:
    """Run a function of this file in `world` processes joined by gloo; what each returned, or its exit status."""
    parent = nursery()
    parent.stdin.write(json.dumps([world, job.__name__, str(folder)]) + "\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "0\n"
    results = [folder / f"rank-{rank}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in results]


def fork_ranks(world: int, job, folder: str) -> None:
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(
                torch.get_num_threads()
            )  # a new pool, before two threads at once find the old one broken
            limit = timedelta(seconds=3 if job is parallel_silence else 60)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meet",
                rank=rank,
                world_size=world,
                timeout=limit,
            )
            status = 1
            try:
                torch.save(job(Path(folder)), f"{folder}/rank-{rank}.pt")
                status = 0
            finally:
                traceback.print_exc() if status else None
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


PARALLEL = {
    "dapo": {},
    "grpo, KL": {"loss_type": "grpo", "beta": 0.1},
    "batch std, entropy, twice": {
        "scale_rewards": "batch",
        "top_entropy_quantile": 0.4,
        "num_iterations": 2,
    },
    "truncated out": {"mask_truncated_completions": True, "max_completion_length": 12},
    "rows of one token": {"eos": range(5, 38), "per_device_train_batch_size": 2},
    "DoRA, checkpointed": {"gradient_checkpointing": True, "use_dora": True},
}


def uneven(completions, **columns):
    """Groups differ, and some have no reward that differs."""
    return [
        len(rewards.completion_text(c)) % 5 if len(rewards.completion_text(c)) > 4 else 0.0
        for c in completions
    ]


def parallel_updates(folder: Path, **more) -> dict:
    """An update, and an evaluation, with each setting: gradients, weights, metrics, completions."""
    results = {}
    for name, args in PARALLEL.items():
        args = dict(args)
        model = with_adapters(tiny_model(dtype=torch.float64), use_dora=args.pop("use_dora", False))
        model.generation_config.eos_token_id = [
            EOS,
            *args.pop("eos", range(9, 20)),
        ]  # rows of many lengths
        t = run_trainer(model, uneven, eval_rows=ROWS[:7], prompts_per_step=6, **args | more)
        sharded = [key for key, p in model.named_parameters() if hasattr(p, "full_tensor")]
        assert len(sharded) == (18 if more else 0)  # nine tensors in each of two layers
        metrics = update(t)
        gradients = {key: p.grad.clone() for key, p in t.params.items()}
        samples = [[s["completion"], s["advantage"]] for s in t.samples]
        results[name] = [
            gradients,
            adapters_of(model),
            metrics,
            samples,
            t.evaluate(),
            [s["completion"] for s in t.eval_samples],
        ]
    return json.loads(json.dumps(results, default=lambda x: x.tolist()))


def parallel_sharded(folder: Path) -> dict:
    return parallel_updates(folder, fsdp=True)


@pytest.fixture(scope="module")
def alone() -> dict:
    return parallel_updates(Path())


@pytest.mark.parametrize(
    ("world", "job"), [(2, parallel_updates), (3, parallel_updates), (2, parallel_sharded)]
)
def test_several_processes_make_the_update_of_one(world, job, alone, tmp_path):
    ranks = on_ranks(world, job, tmp_path)
    assert all(rank == ranks[0] for rank in ranks[1:])  # gradients, weights and metrics, to the bit
    for name, (gradients, weights, metrics, samples, evaluated, texts) in ranks[0].items():
        assert samples == alone[name][3] and texts == alone[name][5]
        for theirs, ours in zip((gradients, weights), alone[name], strict=False):
            for key in ours:
                torch.testing.assert_close(
                    torch.tensor(theirs[key]), torch.tensor(ours[key]), atol=1e-10, rtol=1e-7
                )
        for theirs, ours in ((metrics, alone[name][2]), (evaluated, alone[name][4])):
            assert theirs.keys() == ours.keys()
            over_all = (
                {"entropy", SAMPLER_GAP} if job is parallel_sharded else set()
            )  # it skips no group, so that they are means over more
            for key in ours.keys() - over_all:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-6, abs=1e-9, nan_ok=True), key


def parallel_run(folder: Path) -> int:
    """Two processes: straight through; and stopped by a signal to the second alone, then resumed."""
    run(folder / "straight")
    stopped = run(folder / "resumed", stop_at=3 if dist.get_rank() == 1 else None)
    run(folder / "resumed", resume=True)
    return stopped.step


def test_processes_stop_together_and_resume_to_the_bit(tmp_path):
    assert on_ranks(2, parallel_run, tmp_path) == [3, 3]
    same_run(tmp_path / "straight", tmp_path / "resumed")


def parallel_death(folder: Path) -> str:
    t = run_trainer(max_steps=1000, output_dir=str(folder / "run"), save_steps=1)
    if dist.get_rank() == 1:
        original = t.update
        t.update = lambda rows: os._exit(9) if t.step == 3 else original(rows)
    started = time.monotonic()
    with pytest.raises(processes.PeerError) as error, processes.peers_answer():
        t.train()
    assert time.monotonic() - started < 20
    return str(error.value)


def test_a_process_that_dies_ends_the_others_with_one_line_and_a_resumable_run(tmp_path):
    said, dead = on_ranks(2, parallel_death, tmp_path)
    assert said.startswith("process 0 of 2: another process has ended") and dead is None
    assert (
        run_trainer(
            max_steps=4, output_dir=str(tmp_path / "run"), save_steps=1, resume=True
        ).train()["step"]
        == 4
    )


def parallel_silence(folder: Path) -> str:
    t = run_trainer(max_steps=1000)
    original = t.update
    t.update = lambda rows: (
        time.sleep(8) if dist.get_rank() == 1 and t.step == 2 else original(rows)
    )
    started = time.monotonic()
    expected = (processes.PeerError, TypeError)  # TypeError: the sleeper itself, which returns None
    with pytest.raises(expected) as error, processes.peers_answer():
        t.train()
    assert dist.get_rank() == 1 or time.monotonic() - started < 7
    return str(error.value)


def test_an_error_that_is_not_about_peers_is_left_as_it_is(tmp_path):
    """Also where the project lies in a folder of such a name."""
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed/mine.py").write_text("def fail():\n    raise RuntimeError('mine')\n")
    found = importlib.util.spec_from_file_location("mine", tmp_path / "distributed/mine.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with pytest.raises(RuntimeError, match=r"^mine$"), processes.peers_answer():
        module.fail()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device cuda: "):
        processes.choose_device("cuda", False)
    assert processes.choose_device("auto", False).type == "cpu"


def test_a_process_that_falls_silent_is_given_up_after_the_time_limit(tmp_path):
    waited, _ = on_ranks(2, parallel_silence, tmp_path)
    assert waited.startswith("process 0 of 2: another process has ended or does not answer")


def test_torchrun_trains_and_a_killed_worker_ends_the_job_which_resumes(model_dir, data, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        grpo_lora.__file__,
    ]
    command = [
        *torchrun,
        "--model",
        str(model_dir),
        "--data",
        str(data),
        *CLI_RUN,
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    job = subprocess.Popen(
        [*command, "--max_steps", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | PLAIN,
    )  # fmt: skip
    checkpoint, deadline = tmp_path / "run/checkpoint-3", time.monotonic() + 120
    while not checkpoint.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - killed < 20
    assert "error: process 0 of 2: another process has ended" in error
    done = len(lines(tmp_path / "run/metrics.jsonl")) + 3
    result = subprocess.run(
        [*command, "--max_steps", str(done), "--resume"], capture_output=True, text=True,
        env=os.environ | PLAIN,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == list(
        range(1, done + 1)
    )


def test_more_processes_than_gpus_are_refused_in_one_line(model_dir, data, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["--model", str(model_dir), "--data", str(data)]) == 2
    assert (
        "error: --device auto: process 2 of this machine, which has 1 GPU"
        in capsys.readouterr().err
    )


def test_every_process_makes_as_many_forwards_as_any_other_may_need():
    model, (ids, mask) = tiny_model(), prompts()
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    settings = {"eos_token_ids": range(5, 36), "max_completion_length": 20}
    rollout = sample(model, ids, mask, **settings)
    assert len(seen) == rollout.completion_ids.shape[1] < 20
    seen.clear()
    for engine in (grpo_lora, fast):
        again = sample(model, ids, mask, engine=processes.InStep(engine), **settings)
        assert torch.equal(again.completion_ids, rollout.completion_ids) and len(seen) == 20
        seen.clear()
    one = rollout.select([0, 1])
    for name in ("completion_ids", "completion_mask", "logps"):
        setattr(one, name, getattr(one, name)[:, :1])
    for engine in (grpo_lora, fast):
        logps, entropies = processes.InStep(engine).completion_logps(model, one, temperature=0.7)
        assert len(seen) == 2 and logps.shape == entropies.shape == (6, 1)
        torch.testing.assert_close(logps, rollout.logps[:, :1], atol=1e-5, rtol=1e-5)
        seen.clear()


def test_sharding_needs_processes_and_frozen_weights():
    with pytest.raises(
        ValueError, match="fsdp: spreads frozen weights over processes; start with torchrun"
    ):
        run_trainer(fsdp=True)


def test_prompts_must_divide_among_processes(monkeypatch):
    monkeypatch.setattr(grpo_lora, "rank_and_world", lambda: (0, 3))
    with pytest.raises(
        ValueError, match="prompts_per_step = 4: must be a multiple of the 3 processes"
    ):
        run_trainer()
