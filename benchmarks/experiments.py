"""What to set, and why: short runs of the demo that differ in one thing, each on three seeds.

    python benchmarks/experiments.py                    # all: an hour on two cores
    python benchmarks/experiments.py rate layers        # of: rate layers methods ranks variants
                                                        #     kl group iterations width bugs
    python benchmarks/experiments.py --draw             # figures and tables of what was measured

Two runs at a time (or --processes), each on one core. Writes experiments/NAME.jsonl and
experiments/NAME.png. Each line of the first is a run: its settings, its reward at each update, its
accuracy on the 200 held-out problems before and after. "Reward" is the mean training reward over
all updates of a run: how high, and how soon.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import grpo_lora  # noqa: E402
from lora import merge_and_unload  # noqa: E402

OUT = HERE / "experiments"
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COMMON = {"max_steps": 40, "eval_steps": 1000, "log_tokens_steps": 1000, "save_steps": 0}
COMMON |= {"r": 8, "lora_alpha": 32}
# 20 batches of 4 updates each, so that ratios leave 1 and clipping matters
SEVERAL = {"max_steps": 80, "num_iterations": 4}
LAYERS = {"all": "all-linear", "attention": "q_proj,k_proj,v_proj,o_proj"}
LAYERS |= {"MLP": "gate_proj,up_proj,down_proj"}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"}, "gaussian": {"init_lora_weights": "gaussian"},
}  # fmt: skip
PEFT = {"VeRA": ("VeraConfig", {"r": 256}), "TinyLoRA": ("TinyLoraConfig", {"r": 2, "u": 64})}
KL = [(0.0, "k3", True)]  # beta, estimator, use_bias_correction_kl
KL += [(1.0, k, corrected) for k in ("k1", "k2", "k3") for corrected in (False, True)]
BUGGY = {  # of the gallery in checks/gallery.py; they run under settings where each can matter
    "the stop token is masked out, so stopping is never reinforced",
    "log-probs off by one against the tokens",
    "clip written as max where the advantage is negative", "KL subtracted, and so maximised",
    "temperature at sampling, not at scoring",
    "completions tiled where prompts were repeated: the wrong answer is graded",
}  # fmt: skip


def sweep(series: str, rates: Sequence[float], **settings: Any) -> list[dict]:
    """A run for each learning rate."""
    return [{"series": series, "x": x, "learning_rate": x, **settings} for x in rates]


def experiments() -> dict[str, list[dict]]:
    """Name -> its runs: the series that a run belongs to, its place on the axis if it has one, and
    its settings."""
    one = lambda series, **settings: {"series": series, "learning_rate": 1e-3, **settings}
    rate = [run for r in (1, 4, 16, 64) for run in sweep(f"r = {r}", RATES, r=r)]
    rate += sweep("all weights", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], full=True)
    names = [name for name in grpo_lora.VARIANTS if name != "gdpo"]  # which is for several rewards
    kl = []
    for beta, estimator, corrected in KL:
        series = f"{estimator}{', corrected' * corrected}" if beta else "no KL"
        settings = {"kl_estimator": estimator, "use_bias_correction_kl": corrected}
        kl.append({"series": series, "beta": beta, "learning_rate": 3e-3, **settings})
    iterations = []
    for n in (1, 2, 4, 8):
        series = f"{n} update{'s' * (n > 1)} a batch"
        iterations.append(one(series, num_iterations=n, max_steps=20 * n))
    methods = [run for n, m in METHODS.items() for run in sweep(n, RATES[1:5], **m)]
    methods += sweep("VeRA", [*RATES[3:], 1e-1, 3e-1], peft="VeRA")
    methods += sweep("TinyLoRA", RATES[1:5], peft="TinyLoRA")
    ranks = [run for k in (1, 16, 128, 256) for run in sweep(f"r = {k}", RATES[2:5], r=k)]
    ranks += sweep("r = 256, rsLoRA", RATES[1:4], r=256, use_rslora=True)
    buggy = {"beta": 0.05, "temperature": 1.3, **SEVERAL}
    sizes = (2, 4, 8, 16, 32, 64)
    return {
        "rate": rate,
        "layers": [r for n, t in LAYERS.items() for r in sweep(n, RATES[2:], target_modules=t)],
        "methods": methods,
        "ranks": ranks,
        "variants": [one(name, variant=name, **SEVERAL) for name in names],
        "kl": kl,
        "group": [one(f"G = {g}", num_generations=g, prompts_per_step=256 // g) for g in sizes],
        "iterations": iterations,
        "width": [r for w in (64, 128, 256) for r in sweep(f"width {w}", RATES[1:], width=w)],
        "bugs": [one(bug or "none", bug=bug, **buggy) for bug in ("", *sorted(BUGGY))],
    }


def base_model(width: int) -> None:
    """The demo's base model, of this width, in the current folder; its own is 128 wide."""
    from runner import demo

    torch.set_num_threads(1)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        demo.make_demo_model(Path(str(width)) / "runs" / "demo-base-model", width=width)


def put_in(what: str) -> None:
    """Make a bug of the gallery again. Each run has a process of its own, which has not imported
    the runner yet."""
    from checks.gallery import GALLERY

    bug = next(bug for bug in GALLERY if bug.what == what)
    source = Path(str(grpo_lora.__file__)).read_text(encoding="utf-8")
    assert bug.file == "grpo_lora.py" and source.count(bug.right) == 1, bug
    exec(compile(source.replace(bug.right, bug.wrong), grpo_lora.__file__, "exec"), vars(grpo_lora))


def train(job: dict) -> dict:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    started, settings = time.perf_counter(), COMMON | job
    names = ("experiment", "series", "x", "width", "full", "peft", "bug")
    about = {name: settings.pop(name, None) for name in names}
    os.chdir(str(about["width"] or 128))
    if about["bug"]:
        put_in(about["bug"])
    from runner import cli

    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),
    ):
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        trainer = cli.prepare(*cli.parse([*words, "--output_dir", folder]))
        if about["full"] or about["peft"]:  # B is 0, so what is left is the base model
            model = merge_and_unload(trainer.model)
            if about["peft"]:
                import peft

                kind, options = PEFT[about["peft"]]
                transformers.set_seed(job["seed"])
                config = getattr(peft, kind)(target_modules="all-linear", **options)
                model = peft.get_peft_model(model, config)
            data = trainer.train_dataset, trainer.eval_dataset, trainer.tokenizer
            options = {"callbacks": trainer.callbacks, "engine": trainer.engine}
            args = model, trainer.reward_funcs, trainer.args
            trainer = grpo_lora.GRPOTrainer(*args, *data, **options)
        if about["experiment"] == "bugs":  # which are in the plain code
            trainer.engine = grpo_lora
        with contextlib.suppress(FloatingPointError):
            trainer.train()
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    updates, evaluated = rows[1:], {"eval_accuracy": 0.0}
    if all(p.isfinite().all() for p in trainer.params.values()):
        evaluated = trainer.evaluate()
        cli.grade_evaluation(trainer, evaluated)
    batches = settings["max_steps"] // settings.get("num_iterations", 1)
    missing = [0.0] * (batches - len(updates))  # of a run that ended in NaN

    def short(name: str) -> list[float | None]:
        values = [row.get(name) for row in updates]
        return [None if value is None else round(value, 3) for value in values] + missing

    result = {"accuracy_before": rows[0]["eval_accuracy"]}
    result |= {"accuracy_after": evaluated["eval_accuracy"], "reward": short("reward")}
    result |= {"length": short("completions/mean_length"), "kl": short("kl")}
    if about["experiment"] == "kl":
        result["divergence"] = round(divergence(trainer), 4)
    seconds = {"seconds": round(time.perf_counter() - started, 1)}
    return about | {"seed": job["seed"], "settings": settings} | result | seconds


@torch.no_grad()
def divergence(trainer: grpo_lora.GRPOTrainer) -> float:
    """KL(policy ‖ base model) in nats a token, by k3, on the policy's own completions of held-out
    problems."""
    trainer.seed("divergence")
    rollout = trainer.sample([trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))], 2)
    policy, _ = trainer.logps(rollout)
    with trainer.reference():
        base, _ = trainer.logps(rollout)
    return grpo_lora.kl_penalty(policy, base)[rollout.completion_mask].mean().item()


def mean(values: list) -> float:
    return sum(values) / len(values)


def table(name: str, rows: list[dict]) -> None:
    """Of each setting, over its seeds: mean reward and accuracy, and their lowest and highest."""
    print(f"\n{name:<44}{'x':>9}   reward              accuracy after      KL, nats a token")
    for series, x in dict.fromkeys((row["series"], row["x"]) for row in rows):
        mine = [row for row in rows if (row["series"], row["x"]) == (series, x)]
        both = [[mean(row["reward"]) for row in mine], [row["accuracy_after"] for row in mine]]
        both += [[row["divergence"] for row in mine]] if "divergence" in mine[0] else []
        cells = "   ".join(f"{mean(v):.3f} ({min(v):.3f}-{max(v):.3f})" for v in both)
        print(f"{series[:43]:<44}{'' if x is None else format(x, 'g'):>9}   {cells}")


def draw(name: str, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for series in dict.fromkeys(row["series"] for row in rows):
        mine = [row for row in rows if row["series"] == series]
        if mine[0]["x"] is not None:
            places = sorted({row["x"] for row in mine})
            runs = [[mean(row["reward"]) for row in mine if row["x"] == x] for x in places]
        else:  # smoothed over five batches
            places = range(1, len(mine[0]["reward"]) + 1)
            runs = [[mean(row["reward"][max(0, i - 5) : i]) for row in mine] for i in places]
        marker = "o" if mine[0]["x"] else ""
        (line,) = axis.plot(places, list(map(mean, runs)), marker=marker, label=series[:40])
        style = {"color": line.get_color(), "alpha": 0.12, "lw": 0}
        axis.fill_between(places, list(map(min, runs)), list(map(max, runs)), **style)
    sweep = rows[0]["x"] is not None
    axis.set_xlabel("learning rate" if sweep else "batch of completions")
    axis.set_ylabel("mean training reward" if sweep else "training reward")
    axis.set_xscale("log" if sweep else "linear")
    axis.legend(fontsize=7)
    figure.savefig(OUT / f"{name}.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(experiments()))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    measured = [name for name in options.names if (OUT / f"{name}.jsonl").exists()]
    plan = {name: experiments()[name] for name in (measured if options.draw else options.names)}
    widths = {run.get("width", 128) for runs in plan.values() for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the workers start here
        with multiprocessing.get_context("fork").Pool(
            options.processes, maxtasksperchild=1
        ) as pool:
            if not options.draw:
                pool.map(base_model, widths, chunksize=1)
            for name, runs in plan.items():
                path = OUT / f"{name}.jsonl"
                if not options.draw:
                    jobs = [{"experiment": name, "seed": s, **run} for run in runs for s in SEEDS]
                    with path.open("w") as file:
                        for row in pool.imap(train, jobs, chunksize=1):
                            print(json.dumps(row), file=file, flush=True)
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                table(name, rows)
                draw(name, rows)


if __name__ == "__main__":
    main()
