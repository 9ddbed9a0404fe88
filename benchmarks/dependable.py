"""What a run survives: kills, flipped bits, hostile text and files, other numbers of processes; and
when it warns.

    python benchmarks/dependable.py        # some 10 minutes on two cores; writes dependable.json
    python benchmarks/dependable.py flipped_bits hostile_text        # only these
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from checks.helpers import CLI_RUN, INTERRUPTING, PLAIN, lines, run, same_files  # noqa: E402
from checks.test_processes import on_ranks, parallel_sharded, parallel_updates  # noqa: E402
from rewards import REWARDS, answers_match, extract_answer  # noqa: E402
from runner.checkpoints import read_state  # noqa: E402
from runner.cli import read_jsonl  # noqa: E402
from runner.report import printable  # noqa: E402
from test_training import ROWS, TOKENIZER, tiny_model  # noqa: E402

PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\frac{", "{", "}", "####", "1",
    "97**98**99", "1e999", "-", ",", "/", "%", "\u0663", "\u202e", "\x1b[2J", "\x00", "\ud7ff", "e",
    ".", " ", "\n", "\\", "^", "$", "Step 1:", "9" * 400, "a" * 5000,
)  # fmt: skip


def killed(folder: Path, count: int = 100) -> dict:
    """kill -9 at random moments, in several runs one after the other, until so many; then each
    against the unbroken run."""
    tiny_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), *CLI_RUN]
    script = [sys.executable, "-c", INTERRUPTING, str(count), str(folder)]
    environment = os.environ | PLAIN
    subprocess.run(
        [*script, *command, "--max_steps", "30"], cwd=HERE.parent, env=environment, check=True
    )
    finished = [path for path in folder.glob("killed-*") if path.is_dir()]
    for one in finished:
        same_files(folder / "straight", one)
    runs = len(finished)
    return {"kills": count, "runs_finished": runs, "adapters_and_metrics_equal": runs}


def flipped_bits(folder: Path, count: int = 500) -> dict:
    """One bit of one file of a checkpoint, again and again. A bit may change how a number is
    written and not the number (1e-05, 1E-05): then state.json says the same."""
    run(folder / "run", max_steps=2)
    checkpoint = folder / "run" / "checkpoint-2"
    files, rng = [p for p in sorted(checkpoint.rglob("*")) if p.is_file()], random.Random(0)
    whole, noticed, same = read_state(checkpoint), 0, 0
    assert whole[1] == ""
    for _ in range(count):
        path = rng.choice(files)
        data = path.read_bytes()
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        state, damage = read_state(checkpoint)
        noticed += damage != ""
        same += (state, damage) == whole
        path.write_bytes(data)
    assert read_state(checkpoint) == whole
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    return {"files": names, "flipped": count, "noticed": noticed, "changed_nothing": same}


def hostile_text(folder: Path, count: int = 5000) -> dict:
    """Completions made of the pieces above, and of any characters, through every reward. The
    slowest time is reported."""
    rng, slowest = random.Random(0), 0.0
    ours = {name: f for name, f in REWARDS.items() if name != "math_verify"}  # that takes its time
    for number in range(count):
        any_text = "".join(chr(rng.randrange(0x20, 0xD7FF)) for _ in range(rng.randrange(30)))
        pieces = lambda: "".join(rng.choices(PIECES, k=rng.randrange(1, 40)))
        texts = [pieces() + any_text, pieces() + any_text]
        start = time.perf_counter()
        columns = {"prompts": ["p", "p"], "completions": texts, "answer": [texts[1], "7"]}
        for function in ours.values():
            scores = function(**columns, completion_ids=[[0] * 5, [0]])
            good = [score is None or -2 <= score <= 2 for score in scores]
            assert len(scores) == 2 and all(good), (number, scores)
        assert answers_match(texts[0], texts[0])
        assert isinstance(extract_answer(texts[0]), str | None)
        assert "\x1b" not in printable(texts[0]) and "\u202e" not in printable(texts[0])
        slowest = max(slowest, time.perf_counter() - start)
    found = {"completions": 2 * count, "reward_functions": len(ours)}
    return found | {"slowest_seconds": round(slowest, 3)}


def hostile_files(folder: Path, count: int = 5000) -> dict:
    """A good JSONL file with random bytes changed, cut or doubled: it is read, or refused with its
    line."""
    good = "".join(json.dumps(row) + "\n" for row in ROWS[:5]).encode()
    rng, path, refused = random.Random(0), folder / "hostile.jsonl", 0
    for _ in range(count):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            action = rng.randrange(3)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                del data[at : at + rng.randrange(1, 30)]
            else:
                data[at:at] = data[at : at + 20]
        path.write_bytes(data)
        try:
            read_jsonl(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    return {"files": count, "read": count - refused, "refused_with_their_line": refused}


def processes(folder: Path) -> dict:
    """One update with each setting, on one process and on several: the largest relative difference
    of a gradient."""
    alone, found = parallel_updates(Path()), {}
    jobs = {"2 processes": (2, parallel_updates), "3 processes": (3, parallel_updates)}
    for name, (world, job) in (jobs | {"2 processes, FSDP2": (2, parallel_sharded)}).items():
        (folder / name).mkdir()
        results = on_ranks(world, job, folder / name)
        worst = 0.0
        for setting, (gradients, *_) in results[0].items():
            for key, gradient in gradients.items():
                ours = torch.tensor(alone[setting][0][key], dtype=torch.float64)
                gap = (torch.tensor(gradient, dtype=torch.float64) - ours).abs().max()
                worst = max(worst, (gap / ours.abs().max().clamp(min=1e-12)).item())
        equal = all(r == results[0] for r in results)
        found[name] = {"settings": len(results[0]), "equal_across_ranks": equal}
        found[name]["largest_relative_difference_to_one_process"] = worst
    return found


def warnings_on_the_demo(folder: Path, seeds: int = 5) -> dict:
    """The demo is healthy: what it is warned of, and how well it did."""
    found, quiet = {}, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for seed in range(seeds):
        command = [sys.executable, str(HERE.parent / "grpo_lora.py"), "--seed", str(seed)]
        command += ["--output_dir", f"demo-{seed}"]
        subprocess.run(command, cwd=folder, check=True, **quiet)
        summary = json.loads((folder / f"demo-{seed}/summary.json").read_text())
        rows = lines(folder / f"demo-{seed}/metrics.jsonl")
        warnings = [text for row in rows for text in row.get("warnings", ())]
        found[f"seed {seed}"] = {"accuracy_after": summary["accuracy_after"], "warnings": warnings}
    return found


PARTS = (killed, flipped_bits, hostile_text, hostile_files, processes, warnings_on_the_demo)


def main() -> None:
    names = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=f"of: {', '.join(names)}; without any: all")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"unknown: {', '.join(unknown)}")
    path = HERE / "dependable.json"
    result = json.loads(path.read_text()) if path.exists() and options.parts else {}
    result |= {"command": "python benchmarks/dependable.py", "date": time.strftime("%Y-%m-%d")}
    result |= {"machine": f"{platform.machine()}, two cores"}
    for part in PARTS:
        if not options.parts or part.__name__ in options.parts:
            with tempfile.TemporaryDirectory() as folder:
                result[part.__name__] = part(Path(folder))
            print(part.__name__, json.dumps(result[part.__name__], indent=1), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
