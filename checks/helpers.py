"""What the checks share: a trainer with the runner's callbacks and engine."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from grpo_lora import GRPOConfig, GRPOTrainer
from runner import cli, fast
from runner.processes import InStep, shard_base
from runner.watch import EarlyWarnings, SkippedUpdates
from test_training import ROWS, TOKENIZER, digits, tiny_model, with_adapters

HERE = Path(__file__).resolve().parent.parent
PLAIN = {"PYTHONPATH": str(HERE / "checks/plain")}  # for a process that is to start soon


def run_trainer(model=None, reward=digits, rows=ROWS, eval_rows=None, **args: Any) -> GRPOTrainer:
    """test_training.trainer with all that the command line adds; takes the settings of both."""
    defaults = {"max_steps": 2, "prompts_per_step": 4, "num_generations": 4}
    defaults |= {"max_completion_length": 8, "learning_rate": 1e-2, "save_steps": 0}
    values = defaults | {"per_device_train_batch_size": 4} | args
    names = {f.name for f in dataclasses.fields(cli.RunConfig)}
    run = cli.RunConfig(**{name: value for name, value in values.items() if name in names})
    settings = GRPOConfig(**{name: value for name, value in values.items() if name not in names})
    model = with_adapters(tiny_model(), random=False) if model is None else model
    if run.fsdp:
        shard_base(model)
    callbacks: list[Any] = [EarlyWarnings(), SkippedUpdates()]
    if settings.output_dir:
        callbacks = cli.make_callbacks(run)
    return GRPOTrainer(
        model,
        reward,
        settings,
        rows,
        eval_rows,
        TOKENIZER,
        callbacks=callbacks,
        engine=InStep(fast) if run.fsdp else fast,
    )


# -------------------------------------------------------------------------- a run's files, resuming


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, stop_at: int | None = None, **args) -> GRPOTrainer:
    """A small run with files: six updates, a checkpoint every second one. stop_at: the update that
    is asked to be the last."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": None,
        "eval_steps": 3,
    }
    t = run_trainer(
        with_adapters(tiny_model(), lora_dropout=0.1, random=False),
        eval_rows=ROWS[:5],
        **defaults | args,
    )
    original = t.update

    def watched(rows):
        t.stop = t.step + 1 == stop_at
        return original(rows)

    t.update = watched
    t.train()
    return t


def same_run(a: Path, b: Path) -> None:
    """same_files, and the six updates of `run`, without gaps or doubles."""
    same_files(a, b)
    assert [row["step"] for row in lines(b / "metrics.jsonl")] == list(range(7))


SMALL = [
    "--prompts_per_step",
    "2",
    "--num_generations",
    "2",
    "--max_completion_length",
    "6",
    "--max_steps",
    "2",
]


CLI_RUN = ["--rewards", "format,tag_count", "--prompts_per_step", "2", "--num_generations", "4"]
CLI_RUN += ["--max_completion_length", "16", "--save_steps", "3"]


def same_files(a: Path, b: Path) -> None:
    """Adapter files equal to the byte, metrics equal but for times."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (a / "adapter" / name).read_bytes() == (b / "adapter" / name).read_bytes()
    drop = lambda rows: [{k: v for k, v in row.items() if k != "step_time"} for row in rows]
    assert drop(lines(a / "metrics.jsonl")) == drop(lines(b / "metrics.jsonl"))
    assert lines(a / "completions.jsonl") == lines(b / "completions.jsonl")


INTERRUPTING = """
import os, pathlib, random, signal, sys, time, torch
torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
from runner import cli
kills, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]

def start(name, *more):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(f"{folder}/{name}.out", os.O_WRONLY | os.O_CREAT), 1), os.dup2(1, 2)
        status = cli.main([*command, "--output_dir", f"{folder}/{name}", *more])
        sys.stdout.flush()
        os._exit(status)
    return process

begun = time.monotonic()
assert os.waitpid(start("straight"), 0)[1] == 0
whole, finished = time.monotonic() - begun, 0
while kills:
    process = start(f"killed-{finished}", "--resume")
    time.sleep(random.uniform(0, whole / 5))
    if os.waitpid(process, os.WNOHANG)[0]:  # it was done: another run
        finished += 1
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills -= 1
assert os.waitpid(start(f"killed-{finished}", "--resume"), 0)[1] == 0

for number in (signal.SIGINT, signal.SIGTERM):
    process = start(f"signal-{number}", "--max_steps", "4000")
    metrics = pathlib.Path(f"{folder}/signal-{number}/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\\n") > 4):
        assert os.waitpid(process, os.WNOHANG)[0] == 0
        time.sleep(0.02)
    os.kill(process, number)
    assert os.waitpid(process, 0)[1] == 0
"""
