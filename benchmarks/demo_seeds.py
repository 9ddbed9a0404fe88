"""The demo on five seeds; and its control, the same runs with the rewards shuffled among the completions.

    python benchmarks/demo_seeds.py        # some 3 minutes on two cores; writes benchmarks/demo_seeds.json

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
    return json.loads((Path(folder) / name / "summary.json").read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # an empty one: the first run pre-trains the base model too
        runs = [demo(folder, seed) for seed in SEEDS]
        control = [demo(folder, seed, "--rewards", f"{HERE / 'demo_seeds.py'}:shuffled_accuracy") for seed in SEEDS]
    machine = f"{platform.machine()}, two cores, Python {platform.python_version()}"
    result = {"command": "python benchmarks/demo_seeds.py", "machine": machine, "demo": runs, "shuffled": control}
    (HERE / "demo_seeds.json").write_text(json.dumps(result, indent=1) + "\n")
    for kind, rows in (("demo", runs), ("rewards shuffled", control)):
        print(f"\n{kind:<18} accuracy        thinking        length         seconds")
        for row in rows:
            pairs = [f"{row[f'{k}_before']:6.1%} {row[f'{k}_after']:6.1%}" for k in ("accuracy", "think_rate")]
            lengths = f"{row['mean_length_before']:6.1f} {row['mean_length_after']:6.1f}"
            print(f"  seed {row['seed']:<11} {pairs[0]}   {pairs[1]}   {lengths}   {row['seconds']:7.0f}")


if __name__ == "__main__":
    main()
