"""What watches over a run: early warnings, updates without a finite gradient, rewards that hang,
and advice when memory runs out.

    GRPOTrainer(model, ..., callbacks=[EarlyWarnings(), SkippedUpdates()])
    GRPOTrainer(model, [with_time_limit(my_reward, seconds=60)], ...)
"""

import faulthandler
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from grpo_lora import SAMPLER_GAP, CausalLM, GRPOTrainer, to_json
from rewards import finish, reward_name


def read_history(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    """The metrics of the updates before this one, from the record of a run that was resumed."""
    path = Path(str(trainer.args.output_dir)) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if 0 < row["step"] < trainer.step]


# ---------------------------------------------------------------------------------- early warnings


class History:
    """The metrics of a run so far, as the tests of warnings ask for them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def now(self, name: str) -> float:
        value = self.rows[-1].get(name)
        return math.nan if value is None else value

    def mean(self, name: str, start: int = -5) -> float:
        """Over five of the updates that have the metric. (One without a gradient has no entropy.)
        NaN, which is neither above nor below anything, if there are too few."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        enough = len(values) >= (-start if start < 0 else start + 5)
        return sum(values[start : start + 5 or None]) / 5 if enough else math.nan

    def learnt(self) -> bool:
        """Whether the reward is above that of the first updates, or of the first few, which may
        have learnt all there is, by more than two standard errors."""
        rewards = torch.tensor([row["reward"] for row in self.rows if row["reward"] is not None])
        size = min(20, len(rewards) // 2)
        last = rewards[-size:]
        for first in (rewards[:size], rewards[:3]) if size > 1 else ():
            error = (first.var() / len(first) + last.var() / size).sqrt()
            if last.mean() - first.mean() > 2 * error + 1e-6:  # and not by rounding
                return True
        return False

    def jump(self) -> float:
        """The gradient's norm now, over the median of the last ten."""
        norms = sorted(row["grad_norm"] or 0.0 for row in self.rows[-10:])
        return (self.rows[-1]["grad_norm"] or 0.0) / (norms[len(norms) // 2] or math.nan)

    def idle(self) -> list[str]:
        """Adapters that are still zero after three updates that had a gradient."""
        moved = sum(bool(row["grad_norm"]) for row in self.rows) >= 3
        names = self.rows[-1].get("idle", [])  # of a resumed run: what a reward may have logged
        return names if moved and isinstance(names, list) else []


class Sign(NamedTuple):
    """When a metric looks wrong, and what to do about it. The thresholds are rules of thumb."""

    metric: str
    value: Callable[[History], Any]
    looks_wrong: Callable[[Any, History], bool]
    advice: str


SIGNS = [
    Sign(
        "frac_reward_zero_std",
        lambda run: run.mean("frac_reward_zero_std"),
        lambda value, run: value > 0.7 and not run.learnt(),
        "in most groups all completions get one reward, and teach nothing; choose problems that "
        "are neither too easy nor too hard, or grade finer",
    ),
    Sign(
        "reward",
        lambda run: run.now("reward"),
        lambda value, run: len(run.rows) >= 40 and not math.isnan(value) and not run.learnt(),
        "no higher than at first; is learning_rate high enough (an adapter needs about ten times "
        "the rate of full training), and does the reward tell completions apart?",
    ),
    Sign(
        "kl",
        lambda run: run.mean("kl"),
        lambda value, run: value > 0.2 and value > 2 * run.mean("kl", -10),
        "doubled within five updates: the policy runs away from its reference; lower "
        "learning_rate or raise beta",
    ),
    Sign(
        "entropy/first",
        lambda run: run.mean("entropy") / (run.mean("entropy", 0) or math.nan),
        lambda value, run: len(run.rows) >= 10 and value < 0.05,
        "the policy hardly explores any more; lower learning_rate or raise epsilon_high, if the "
        "task is unsolved",
    ),
    Sign(
        "completions/clipped_ratio",
        lambda run: run.mean("completions/clipped_ratio"),
        lambda value, run: value > 0.5,
        "most completions are cut off; raise max_completion_length or ask for shorter answers",
    ),
    Sign(
        "clip_ratio/region_mean",
        lambda run: run.mean("clip_ratio/region_mean"),
        lambda value, run: value > 0.2,
        "so many tokens have no gradient left; lower learning_rate or num_iterations",
    ),
    Sign(
        "grad_norm",
        lambda run: run.mean("grad_norm"),
        lambda value, run: value == 0 and not run.learnt(),
        "nothing is learnt; do rewards differ within a group, and does anything require gradients?",
    ),
    Sign(
        "grad_norm/usual",
        lambda run: run.jump(),
        lambda value, run: len(run.rows) >= 10 and value > 30 and run.now("grad_norm") > 1,
        "the gradient has jumped; lower learning_rate",
    ),
    Sign(
        "skipped_updates",
        lambda run: run.now("skipped_updates"),
        lambda value, run: value > 0,
        "the loss or gradient was not finite, and no step was taken; lower learning_rate",
    ),
    Sign(
        "adapters at zero",
        lambda run: f"{', '.join(run.idle()[:3])} ({len(run.idle())} in all)",
        lambda value, run: bool(run.idle()),
        "B does not move, so nothing is learnt there; leave these layers out of target_modules "
        "(some families read a layer's weight past its adapter), or raise learning_rate",
    ),
    Sign(
        SAMPLER_GAP,
        lambda run: run.mean(SAMPLER_GAP),
        lambda value, run: value > 0.1,
        "completions are not sampled from the policy that is scored; use float32, and look for "
        "what differs between the two",
    ),
]


class EarlyWarnings:
    """A callback: plain words when the metrics say that a run goes wrong, each once.

    They go to the terminal and into metrics["warnings"]. A resumed run says what the unbroken one
    would.
    """

    def __init__(self) -> None:
        self.run = History()
        self.said: set[str] = set()
        self.started = False

    def __call__(self, trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
        if not trainer.step:  # the evaluation before the first update
            return
        if not self.started:
            self.started = True
            for row in read_history(trainer):
                self.check(row)
            lm = CausalLM(trainer.model)
            if not lm.takes_cache and trainer.rank == 0:
                kind = type(lm.core).__name__
                lacks = "has no cache of keys and values alone"
                tqdm.write(f"{kind} {lacks}: each token recomputes its past, slowly", sys.stderr)
        texts = self.check(metrics | {"idle": idle_adapters(trainer)})
        if texts:
            metrics["warnings"] = texts
        for text in texts if trainer.rank == 0 else ():
            tqdm.write(f"warning: update {trainer.step}: {text}", file=sys.stderr)

    def check(self, row: dict[str, Any]) -> list[str]:
        """Take in an update's metrics. Returns what there is to say now."""
        self.run.rows.append(row := json.loads(to_json(row)))  # as it will be read back
        said = row.get("warnings")
        said = said if isinstance(said, list) else []  # a reward function may log such a number
        self.said |= {text.partition(" is ")[0] for text in said}
        texts = []
        for sign in SIGNS:
            value = sign.value(self.run)
            if sign.metric not in self.said and sign.looks_wrong(value, self.run):
                self.said.add(sign.metric)
                shown = value if isinstance(value, str) else f"{value:.3g}"
                texts.append(f"{sign.metric} is {shown}: {sign.advice}")
        return texts


def idle_adapters(trainer: GRPOTrainer) -> list[str]:
    """Adapters that do nothing so far: B is 0. Some families read a layer's weight past its adapter
    (Mamba's dt_proj)."""
    return [name for name, p in trainer.params.items() if "lora_B" in name and not p.any()]


# ----------------------------------------------------------------------- updates that were skipped

MAX_SKIPPED = 3  # updates in a row


class SkippedUpdates:
    """A callback: ends a run when MAX_SKIPPED updates in a row had no finite loss and gradient.

    save: called with the trainer before that, to keep its state (Checkpoints.save, say). Stand it
    last. Raises FloatingPointError.
    """

    def __init__(self, save: Callable[[GRPOTrainer], None] = lambda trainer: None) -> None:
        self.save = save
        self.in_a_row: int | None = None

    def __call__(self, trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
        if not trainer.step:
            return
        if self.in_a_row is None:
            self.in_a_row = 0
            for row in read_history(trainer):
                self.in_a_row = self.in_a_row + 1 if row["skipped_updates"] == 1 else 0
        self.in_a_row = self.in_a_row + 1 if metrics["skipped_updates"] == 1 else 0
        if self.in_a_row >= MAX_SKIPPED:
            self.save(trainer)
            raise FloatingPointError(
                f"update {trainer.step}: {self.in_a_row} updates in a row had a loss or gradient "
                f"that is not finite, and were skipped; lower learning_rate (now "
                f"{trainer.args.learning_rate}), or go on from an earlier checkpoint"
            )


# ----------------------------------------------------------------------------- rewards that hang


def with_time_limit(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """A reward function that ends the process if it takes longer, with one line that names it.

    The run goes on from its newest checkpoint. The function stays in the main thread and no alarm
    is set, as libraries that rewards call set alarms of their own. Code that lets no other thread
    run (a regular expression that backtracks for ever) is ended a second later, with a traceback.
    """
    name = reward_name(function)

    def give_up() -> None:
        text = f"error: reward {name} took longer than reward_timeout = {seconds:g} s"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> list[Any]:
        watchdog = threading.Timer(seconds, give_up)
        watchdog.daemon = True
        watchdog.start()
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=2)
        try:
            return finish(function(*args, **kwargs))
        finally:
            faulthandler.cancel_dump_traceback_later()
            watchdog.cancel()

    limited.__name__ = name
    return limited


# -------------------------------------------------------------------------------- memory advice


@contextmanager
def memory_advice() -> Iterator[None]:
    """MemoryError, naming the settings that need less, for what torch raises when memory is out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if known or "allocate memory" in str(error):
            raise MemoryError(
                "out of memory: lower per_device_train_batch_size (it changes no gradient), then "
                "max_completion_length or num_generations; gradient_checkpointing and --dtype "
                "bfloat16 need less too"
            ) from error
        raise
