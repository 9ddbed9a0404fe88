"""Does --tune find the rate that a whole sweep finds, and at what cost? On the demo (three seeds),
and on a real model.

    python benchmarks/tuner.py [--model SMOLLM2]    # writes tuner.json; a minute a seed, and half
                                                    # an hour for the model

Each candidate of the tuner is the beginning of a whole run. So the sweep is made by resuming all of
them to the end, two at a time, each on one core. The best rate is the one with the highest mean
reward over a whole run.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ON_MODEL = "--eval_size 200 --prompts_per_step 4 --max_completion_length 32 --max_steps 40".split()
ON_MODEL += "--learning_rate 0.0013 --warmup_steps 1".split()


def python(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, env=os.environ | environment, text=True
    )
    if done.returncode not in (0, 1):  # 1: a rate that diverged
        sys.exit(f"{words} ended with status {done.returncode}")
    return done.stdout


def compare(name: str, settings: list[str], steps: int) -> dict:
    """Tune, then bring every candidate to the end."""
    script, root = str(HERE.parent / "grpo_lora.py"), Path(name)
    table = python(script, *settings, "--tune", "--output_dir", str(root))
    print(table, flush=True)
    chosen = float(re.search(r"--learning_rate (\S+)", (root / "best.args").read_text()).group(1))
    folders = {float(p.name.removeprefix("learning_rate")): p for p in root.iterdir() if p.is_dir()}
    lines = lambda folder: (folder / "metrics.jsonl").read_text().splitlines()
    read = lambda folder: [json.loads(line) for line in lines(folder)]
    tuned = {rate: read(folder) for rate, folder in folders.items()}

    def finish(rate: float) -> None:
        own = ["--learning_rate", str(rate), "--output_dir", str(folders[rate]), "--resume"]
        python(script, *settings, *own, OMP_NUM_THREADS="1")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(finish, sorted(folders, reverse=True)))
    rows = []
    for rate, folder in sorted(folders.items()):
        whole = [row["reward"] or 0.0 for row in read(folder) if row["step"]]
        whole += [0.0] * (steps - len(whole))  # it diverged
        accuracy = [row["eval_accuracy"] for row in read(folder) if "eval_accuracy" in row][-1:]
        row = {"learning_rate": rate, "updates_of_the_tuner": len(tuned[rate])}
        row |= {"reward": sum(whole) / steps, "accuracy_after": accuracy}
        rows.append(row | {"reward_last_fifth": sum(whole[-steps // 5 :]) / (steps // 5)})
        print(json.dumps(rows[-1]), flush=True)
    best = max(rows, key=lambda row: row["reward"])["learning_rate"]
    cost = sum(row["updates_of_the_tuner"] for row in rows) / (len(rows) * steps)
    result = {"name": name, "tuner": chosen, "sweep": best}
    result |= {"factor": max(chosen / best, best / chosen), "share_of_cost": cost}
    print(result, flush=True)
    return result | {"settings": settings[4:] if "--model" in settings else settings, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    out = HERE / "tuner.json"
    results = json.loads(out.read_text()) if out.exists() else []
    model = options.model and str(Path(options.model).resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        work = [(f"demo, seed {seed}", ["--seed", str(seed)], 50) for seed in options.seeds]
        if model:
            Path("word_problems.jsonl").write_text(python(str(HERE / "word_problems.py"), "1200"))
            settings = ["--model", model, "--data", "word_problems.jsonl", *ON_MODEL]
            work.append(("SmolLM2-135M-Instruct", settings, 40))
        for name, settings, steps in work:
            results = [r for r in results if r["name"] != name] + [compare(name, settings, steps)]
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
