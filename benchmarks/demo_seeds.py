"""The demo on five seeds; and its control, the same runs with the rewards shuffled among the completions.

    python benchmarks/demo_seeds.py        # some 3 minutes on two cores; writes demo_seeds.json and demo_seeds.png

Thinking pays only through its own rewards: with the same rewards handed to random completions nothing should improve.
"""

import json
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS = range(5)


def shuffled_accuracy(prompts, completions, answer, **columns):
    """The accuracy reward, given to the wrong completions. (The trainer seeds `random` for each update.)"""
    from rewards import accuracy_reward

    scores = accuracy_reward(prompts, completions, answer)
    random.shuffle(scores)
    return scores


def demo(folder: str, seed: int, *extra: str) -> dict:
    name = f"{'shuffled' if extra else 'demo'}-{seed}"
    command = [sys.executable, str(HERE.parent / "grpo_lora.py"), "--seed", str(seed), "--output_dir", name, *extra]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval_accuracy" in row]
    names = ("step", "eval_accuracy", "eval_think_rate", "eval_completions/mean_length")
    curves = {key.rpartition("/")[2]: [round(row[key], 4) for row in evaluated] for key in names}
    return json.loads((Path(folder) / name / "summary.json").read_text()) | {"curves": curves}


def draw(result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        "eval_accuracy": "accuracy",
        "eval_think_rate": "share that thinks",
        "mean_length": "tokens per completion",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axis, (key, label) in zip(axes, shown.items(), strict=True):
        for kind, colour in (("demo", "C0"), ("shuffled", "C7")):
            for i, run in enumerate(result[kind]):
                name = {"demo": "rewards as they are", "shuffled": "rewards shuffled"}[kind] if i == 0 else None
                axis.plot(run["curves"]["step"], run["curves"][key], color=colour, alpha=0.7, marker=".", label=name)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("update")
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "demo_seeds.png", dpi=110)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # an empty one: the first run pre-trains the base model too
        runs = [demo(folder, seed) for seed in SEEDS]
        control = [demo(folder, seed, "--rewards", f"{HERE / 'demo_seeds.py'}:shuffled_accuracy") for seed in SEEDS]
    machine = f"{platform.machine()}, two cores, Python {platform.python_version()}"
    result = {"command": "python benchmarks/demo_seeds.py", "machine": machine, "demo": runs, "shuffled": control}
    (HERE / "demo_seeds.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result)
    for kind, rows in (("demo", runs), ("rewards shuffled", control)):
        print(f"\n{kind:<18} accuracy        thinking        length         seconds")
        for row in rows:
            pairs = [f"{row[f'{k}_before']:6.1%} {row[f'{k}_after']:6.1%}" for k in ("accuracy", "think_rate")]
            lengths = f"{row['mean_length_before']:6.1f} {row['mean_length_after']:6.1f}"
            print(f"  seed {row['seed']:<11} {pairs[0]}   {pairs[1]}   {lengths}   {row['seconds']:7.0f}")


if __name__ == "__main__":
    main()
