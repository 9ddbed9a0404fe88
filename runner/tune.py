"""Find a learning rate, and if asked a rank, by successive halving (Jamieson & Talwalkar 2016).

    python grpo_lora.py --model MODEL --data train.jsonl --max_steps 100 --tune
    python grpo_lora.py --model MODEL --data train.jsonl --max_steps 100 --tune learning_rate,r

Eight rates a factor of two apart, around --learning_rate or the default; with "learning_rate,r" for
each of three ranks. All run a tenth of max_steps. The better half goes on to a fifth, and so on,
until two or three are left. That is a fifth of the updates that eight whole runs take, or a quarter
of what 24 do.
"""

import contextlib
import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

import torch

from grpo_lora import GRPOConfig, GRPOTrainer, gather, rank_and_world
from lora import LoRAConfig
from runner.cli import RunConfig, new_run_folder, prepare, write_settings
from runner.processes import join_processes, say
from runner.report import read_lines
from runner.watch import MAX_SKIPPED


@dataclasses.dataclass
class Candidate:
    """A rate and a rank, how many steps from the middle it is, and what it has earned so far."""

    learning_rate: float
    r: int
    from_middle: int
    flags: list[str]
    score: dict[int, float] = dataclasses.field(default_factory=dict)  # update -> mean reward
    rewards: list[float] = dataclasses.field(default_factory=list)  # since the last halving


def tune(run: RunConfig, lora: LoRAConfig, args: GRPOConfig) -> Path:
    """Run the candidates, and write best.args with the settings of the best. Returns its path.

    Compared is the mean training reward since the last halving. Of equals the one nearer the middle
    stays. In the end the lowest rate within one standard error of the best is taken, as rates above
    the best fail worse than those below. What diverges is out.

    Each candidate is the beginning of the very run that it stands for: start, prompts, draws,
    schedule. It goes on from its own checkpoint. So a tuning that was interrupted is resumed like a
    run.
    """
    join_processes(run.ddp_timeout)
    tuned, n, rank = str(run.tune).split(","), args.num_iterations, rank_and_world()[0]
    check_tuning(run, args, tuned)
    new = new_run_folder("tune") if rank == 0 and not args.output_dir else None
    root = Path(args.output_dir or gather(new)[0])
    say(f"writing to {root}/")

    def begin(candidate: Candidate) -> GRPOTrainer:
        folder = root / "".join(candidate.flags).strip("-")
        own: dict[str, Any] = {"learning_rate": candidate.learning_rate, "output_dir": str(folder)}
        settings = dataclasses.replace(args, **own)
        options: dict[str, Any] = {
            "save_steps": args.max_steps,
            "save_total_limit": 1,
            "resume": folder.exists(),
        }
        adapter = dataclasses.replace(lora, r=candidate.r)
        return prepare(dataclasses.replace(run, **options), adapter, settings)

    def rewards(candidate: Candidate, before: int, until: int) -> list[float]:
        trainer = begin(candidate)
        trainer.eval_dataset = None  # it costs time, and is not to be tuned for
        with contextlib.suppress(FloatingPointError):  # which the record shows
            trainer.train(until)
        path = Path(str(trainer.args.output_dir)) / "metrics.jsonl"
        rows = [row for row in (read_lines(path) if rank == 0 else []) if row["step"] <= until]
        skipped = "".join(str(int(row["skipped_updates"])) for row in rows)
        found = [r["reward"] for r in rows if r["step"] > before and r["reward"] is not None]
        diverged = "1" * MAX_SKIPPED in skipped or not found
        return gather([-math.inf] if diverged else found)[0]

    candidates = make_candidates(run, lora, args, tuned)
    stops = [max(1, args.max_steps * tenths // (10 * n)) * n for tenths in (1, 2, 4, 8)]
    alive, spent = candidates, 0
    for before, until in zip([0, *stops], stops, strict=False):
        for c in alive:
            c.rewards = rewards(c, before, until)
            c.score[until] = sum(c.rewards) / len(c.rewards)
            said = f"mean reward {c.score[until]:.3f} in updates {before + 1} to {until}"
            say(f"{' '.join(c.flags)}: {said}")
        spent += len(alive) * (until - before)
        scores = [c.score[until] for c in alive]
        if len(alive) > 1 and max(scores) == min(scores):
            raise FloatingPointError(
                f"tune: every candidate has a mean reward of {scores[0]:g} in updates to {until}; "
                "there is nothing to choose by: look at the reward, and at learning_rate"
            )
        alive = sorted(alive, key=lambda c: (-c.score[until], c.from_middle))
        if len(alive) <= 3:
            break
        alive = [c for c in alive[: len(alive) // 2] if c.score[until] > -math.inf]

    as_good = [c for c in alive if c is alive[0] or within_one_error(alive[0], c)]
    best = min(as_good, key=lambda c: c.learning_rate)
    if rank == 0:
        changed = {"learning_rate": best.learning_rate, "r": best.r}
        write_settings(root / "best.args", run, lora, args, **changed)
        print_tuning(candidates, best, spent, args.max_steps, root / "best.args")
    return root / "best.args"


def check_tuning(run: RunConfig, args: GRPOConfig, tuned: list[str]) -> None:
    """Raises ValueError for a tuning that cannot work."""
    least = 10 * (args.warmup_steps + 3 * args.num_iterations)
    if args.max_steps < least:
        goes = f"a tenth of it must go beyond warmup_steps, so at least {least}"
        raise ValueError(f"max_steps = {args.max_steps}: {goes}")
    if args.learning_rate == 0:
        raise ValueError("learning_rate = 0: the middle of the rates to try, must be above 0")
    if "r" in tuned and run.adapter:
        raise ValueError(
            "tune: the rank of --adapter is what its file says; tune learning_rate alone"
        )
    if run.resume and not args.output_dir:
        raise ValueError("resume: needs output_dir, the folder of the tuning to go on with")
    held = (
        args.output_dir and Path(args.output_dir).exists() and any(Path(args.output_dir).iterdir())
    )
    if any(gather(held)) and not run.resume:
        what = f"{args.output_dir} is not empty"
        raise ValueError(f"output_dir: {what}; resume the tuning in it or name a new one")


def make_candidates(
    run: RunConfig, lora: LoRAConfig, args: GRPOConfig, tuned: list[str]
) -> list[Candidate]:
    candidates = []
    for r in sorted({max(1, lora.r // 4), lora.r, 4 * lora.r}) if "r" in tuned else [lora.r]:
        centre = args.learning_rate
        if centre is None:  # the default follows from the model and the adapter
            trainer = prepare(
                dataclasses.replace(run, resume=False),
                dataclasses.replace(lora, r=r),
                dataclasses.replace(args, output_dir="never-run"),
            )
            centre = trainer.args.learning_rate
        for k in range(-4, 4):
            rate = float(f"{(centre or 0.0) * 2.0**k:.2g}")
            values = {"learning_rate": f"{rate:g}", "r": f"{r:g}"}
            flags = [word for name in tuned for word in (f"--{name}", values[name])]
            candidates.append(Candidate(rate, r, abs(k), flags))
    return candidates


def within_one_error(best: Candidate, other: Candidate) -> bool:
    """Whether the mean rewards of two candidates are within one standard error of each other."""
    gaps = torch.tensor([a - b for a, b in zip(best.rewards, other.rewards, strict=False)])
    return bool(gaps.mean() <= gaps.std() / math.sqrt(len(gaps)))


def print_tuning(
    candidates: list[Candidate], best: Candidate, spent: int, max_steps: int, path: Path
) -> None:
    stops = list(best.score)
    print(f"\n{'learning_rate':>13} {'r':>4}" + "".join(f"{f'to {stop}':>9}" for stop in stops))
    for c in candidates:
        cells = "".join(f"{c.score[s]:>9.3f}" if s in c.score else f"{'':>9}" for s in stops)
        print(f"{c.learning_rate:>13g} {c.r:>4}{cells}{'   best' if c is best else ''}")
    whole = f"{len(candidates)} whole runs take {len(candidates) * max_steps}"
    print(f"\nmean training rewards; {spent} updates, where {whole}")
    rates = [c.learning_rate for c in candidates if c.r == best.r]
    if best.learning_rate in (rates[0], rates[-1]):
        print(f"the best rate is at the edge: tune again with {' '.join(best.flags)}")
    print(f"go on with: python grpo_lora.py {shlex.quote(f'@{path}')}")
