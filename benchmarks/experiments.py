"""What to set, and why: short runs of the demo that differ in one thing, each on three seeds.

    python benchmarks/experiments.py [rate layers variants kl group iterations width bugs]      # all: some 30 minutes
    python benchmarks/experiments.py --draw                    # only the figures and the table, from what was measured

Two runs at a time, each on one core. Writes experiments/NAME.jsonl (a line a run: its settings, its reward at each update,
its accuracy on the 200 held-out problems before and after) and experiments/NAME.png. "Reward" is the mean training reward over
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import grpo_lora  # noqa: E402
from lora import merge_and_unload  # noqa: E402

OUT = HERE / "experiments"
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COMMON = {"max_steps": 40, "eval_steps": 1000, "log_tokens_steps": 1000, "save_steps": 0, "r": 8, "lora_alpha": 32}
SEVERAL = {"max_steps": 80, "num_iterations": 4}  # 20 batches, so that ratios leave 1 and clipping matters
LAYERS = {
    "all": "all-linear", "attention": "q_proj,k_proj,v_proj,o_proj", "MLP": "gate_proj,up_proj,down_proj",
}  # fmt: skip
KL = [(0.0, "k3", True), *((1.0, k, corrected) for k in ("k1", "k2", "k3") for corrected in (False, True))]
BUGGY = {  # wrongs of the gallery in test_training.py, and a setting under which each of them can matter
    "the stop token is masked out, so stopping is never reinforced", "log-probs off by one against the tokens",
    "clip written as max where the advantage is negative", "KL subtracted, and so maximised",
    "temperature at sampling, not at scoring",
    "completions tiled where prompts were repeated: the wrong answer is graded",
}  # fmt: skip


def experiments() -> dict[str, list[dict]]:
    """Name -> its runs: the series a run belongs to, its place on the axis if it has one, and its settings."""
    sweep = lambda series, rates, **settings: [
        {"series": series, "x": rate, "learning_rate": rate, **settings} for rate in rates
    ]
    return {
        "rate": [run for r in (1, 4, 16, 64) for run in sweep(f"r = {r}", RATES, r=r)]
        + sweep("all weights", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], full=True),
        "layers": [run for name, t in LAYERS.items() for run in sweep(name, RATES[2:], target_modules=t)],
        "variants": [
            {"series": name, "variant": name, "learning_rate": 1e-3, **SEVERAL} for name in grpo_lora.VARIANTS if name != "gdpo"
        ],
        "kl": [
            {"series": f"{k}{', corrected' if c else ''}" if beta else "no KL", "beta": beta, "kl_estimator": k,
             "use_bias_correction_kl": c, "learning_rate": 3e-3}
            for beta, k, c in KL
        ],
        "group": [
            {"series": f"G = {g}", "num_generations": g, "prompts_per_step": 256 // g, "learning_rate": 1e-3}
            for g in (2, 4, 8, 16, 32, 64)
        ],
        "iterations": [
            {"series": f"{n} update{'s' * (n > 1)} a batch", "num_iterations": n, "max_steps": 20 * n, "learning_rate": 1e-3}
            for n in (1, 2, 4, 8)
        ],
        "width": [run for w in (64, 128, 256) for run in sweep(f"width {w}", RATES[1:], width=w)],
        "bugs": [
            {"series": bug or "none", "bug": bug, "learning_rate": 1e-3, "beta": 0.05, "temperature": 1.3, **SEVERAL}
            for bug in ("", *sorted(BUGGY))
        ],
    }  # fmt: skip


def base_model(width: int) -> None:
    """The demo's base model, of this width, in the current folder; its own is 128 wide."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        grpo_lora.make_demo_model(Path(str(width)) / "runs" / "demo-base-model", width=width)


def put_in(what: str) -> None:
    """Make a bug of the gallery again. (Each run has a process of its own.)"""
    from test_training import GALLERY

    bug = next(bug for bug in GALLERY if bug.what == what)
    source = Path(str(grpo_lora.__file__)).read_text(encoding="utf-8")
    assert bug.right in source and bug.file == "grpo_lora.py"
    exec(compile(source.replace(bug.right, bug.wrong), grpo_lora.__file__, "exec"), vars(grpo_lora))


def train(job: dict) -> dict:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    started, settings = time.perf_counter(), COMMON | job
    about = {name: settings.pop(name, None) for name in ("experiment", "series", "x", "width", "full", "bug")}
    os.chdir(str(about["width"] or 128))
    if about["bug"]:
        put_in(about["bug"])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        trainer = grpo_lora.prepare([*words, "--output_dir", folder])
        if about["full"]:
            model = merge_and_unload(trainer.model).requires_grad_(True)  # B is 0, so this is the base model
            data = trainer.train_dataset, trainer.eval_dataset, trainer.tokenizer
            trainer = grpo_lora.GRPOTrainer(model, trainer.reward_funcs, trainer.args, *data)
        with contextlib.suppress(FloatingPointError):
            trainer.train()
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    updates, after = rows[1:], trainer.evaluate()["eval_accuracy"] if trainer.finite() else 0.0
    missing = settings["max_steps"] // settings.get("num_iterations", 1) - len(updates)  # of a run that ended in NaN
    short = lambda name: [None if row.get(name) is None else round(row[name], 3) for row in updates] + [0.0] * missing
    curves = {"reward": short("reward"), "length": short("completions/mean_length"), "kl": short("kl")}
    result = {"accuracy_before": rows[0]["eval_accuracy"], "accuracy_after": after, **curves}
    if about["experiment"] == "kl":
        result["divergence"] = round(divergence(trainer), 4)
    return (
        about
        | {"seed": job["seed"], "settings": settings}
        | result
        | {"seconds": round(time.perf_counter() - started, 1)}
    )


@torch.no_grad()
def divergence(trainer: grpo_lora.GRPOTrainer) -> float:
    """KL(policy ‖ base model) in nats a token, on the policy's own completions of held-out problems, by k3."""
    trainer.seed("divergence")
    rollout = trainer.sample([trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))], 2)
    score = lambda: grpo_lora.completion_logps(trainer.model, rollout, temperature=trainer.args.temperature)[0]
    policy = score()
    with trainer.reference():
        base = score()
    return grpo_lora.kl_penalty(policy, base)[rollout.completion_mask].mean().item()


def mean(values: list) -> float:
    return sum(values) / len(values)


def table(name: str, rows: list[dict]) -> None:
    """Of each setting, over its seeds: mean reward and accuracy, and the lowest and highest of them."""
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
        line = axis.plot(places, [mean(run) for run in runs], marker="o" if mine[0]["x"] else "", label=series[:40])[0]
        axis.fill_between(
            places, [min(r) for r in runs], [max(r) for r in runs], color=line.get_color(), alpha=0.12, lw=0
        )
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
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    plan = {name: experiments()[name] for name in options.names}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the workers start here
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            if not options.draw:
                pool.map(base_model, {run.get("width", 128) for runs in plan.values() for run in runs}, chunksize=1)
            for name, runs in plan.items():
                path = OUT / f"{name}.jsonl"
                if not options.draw:
                    jobs = [{"experiment": name, "seed": seed, **run} for run in runs for seed in SEEDS]
                    path.write_text("".join(json.dumps(row) + "\n" for row in pool.imap(train, jobs, chunksize=1)))
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                table(name, rows)
                draw(name, rows)


if __name__ == "__main__":
    main()
