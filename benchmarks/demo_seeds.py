"""The demo on five seeds; and its control, the same runs with the rewards shuffled among the
completions.

    python benchmarks/demo_seeds.py     # 3 minutes on two cores; writes demo_seeds.json and .png

Thinking pays only through its own rewards. With the same rewards handed to random completions
nothing should improve.
"""

import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS = range(5)


def shuffled_accuracy(prompts, completions, answer, **columns):
    """The accuracy reward, given to the wrong completions. (The trainer seeds `random` for each
    update.)"""
    from rewards import accuracy_reward

    scores = accuracy_reward(prompts, completions, answer)
    random.shuffle(scores)
    return scores


def demo(folder: str, seed: int, *extra: str) -> dict:
    name = f"{'shuffled' if extra else 'demo'}-{seed}"
    command = [sys.executable, str(HERE.parent / "grpo_lora.py"), "--seed", str(seed)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--output_dir", name, *extra], cwd=folder, check=True, **quiet)
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    evaluated = [row for row in rows if "eval_accuracy" in row]
    names = ("step", "eval_accuracy", "eval_think_rate", "eval_completions/mean_length")
    curves = {key.rpartition("/")[2]: [round(row[key], 4) for row in evaluated] for key in names}
    return json.loads((Path(folder) / name / "summary.json").read_text()) | {"curves": curves}


def draw(result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"eval_accuracy": "accuracy", "eval_think_rate": "share that thinks"}
    shown |= {"mean_length": "tokens per completion"}
    kinds = {"demo": ("C0", "rewards as they are"), "shuffled": ("C7", "rewards shuffled")}
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axis, (key, label) in zip(axes, shown.items(), strict=True):
        for kind, (colour, name) in kinds.items():
            for i, run in enumerate(result[kind]):
                style = {"color": colour, "alpha": 0.7, "marker": "."}
                style |= {"label": name if i == 0 else None}
                axis.plot(run["curves"]["step"], run["curves"][key], **style)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("update")
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "demo_seeds.png", dpi=110)


def main() -> None:
    shuffled = ["--rewards", f"{HERE / 'demo_seeds.py'}:shuffled_accuracy"]
    # an empty folder: the first run pre-trains the base model too
    with tempfile.TemporaryDirectory() as folder:
        runs = [demo(folder, seed) for seed in SEEDS]
        control = [demo(folder, seed, *shuffled) for seed in SEEDS]
    machine = f"{platform.machine()}, two cores, Python {platform.python_version()}"
    result = {"command": "python benchmarks/demo_seeds.py", "date": time.strftime("%Y-%m-%d")}
    result |= {"machine": machine, "demo": runs, "shuffled": control}
    (HERE / "demo_seeds.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result)
    for kind, rows in (("demo", runs), ("rewards shuffled", control)):
        print(f"\n{kind:<18} accuracy        thinking        length         seconds")
        for row in rows:
            names = {"accuracy": "6.1%", "think_rate": "6.1%", "mean_length": "6.1f"}
            shown = ""
            for key, form in names.items():
                shown += f"{row[f'{key}_before']:{form}} {row[f'{key}_after']:{form}}   "
            print(f"  seed {row['seed']:<11} {shown}{row['seconds']:7.0f}")


if __name__ == "__main__":
    main()
