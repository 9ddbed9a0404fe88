"""What the run survives: kills, flipped bits, hostile text and files, other numbers of processes; and when it warns.

python benchmarks/dependable.py        # some 4 minutes on two cores; writes dependable.json
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
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import test_training as tests  # noqa: E402
from grpo_lora import _damage, printable, read_jsonl  # noqa: E402
from rewards import REWARDS, answers_match, extract_answer  # noqa: E402

PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\frac{", "{", "}", "####", "1", "97**98**99", "1e999", "-",
    ",", "/", "%", "\u0663", "\u202e", "\x1b[2J", "\x00", "\ud7ff", "e", ".", " ", "\n", "\\", "^", "$", "Step 1:",
    "9" * 400, "a" * 5000,
)  # fmt: skip


def kills(count: int, folder: Path) -> dict:
    """kill -9 at random moments, in several runs one after the other, until so many; then each against the unbroken run."""
    tests.tiny_model().save_pretrained(folder / "model")
    tests.TOKENIZER.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests.ROWS))
    command = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "data.jsonl"),
        *tests.CLI_RUN,
        "--max_steps",
        "30",
    ]
    kill = [sys.executable, "-c", tests.KILLING, str(count), str(folder), *command]
    runs = int(subprocess.run(kill, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for i in range(runs):
        tests.same_files(folder / "straight", folder / f"killed-{i}")
    return {"kills": count, "runs_finished": runs, "adapters_and_metrics_equal": runs}


def flipped_bits(count: int, checkpoint: Path) -> dict:
    """One bit of one file of a checkpoint, again and again."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    noticed, rng = 0, random.Random(0)
    for _ in range(count):
        path = rng.choice(files)
        data = path.read_bytes()
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        noticed += _damage(checkpoint) != ""
        path.write_bytes(data)
    assert _damage(checkpoint) == ""
    return {"flipped": count, "noticed": noticed}


def hostile_text(count: int) -> dict:
    """Completions made of the pieces above, and of any characters, through every reward. The slowest time is reported."""
    rng, slowest = random.Random(0), 0.0
    for number in range(count):
        any_character = "".join(chr(rng.randrange(0x20, 0xD7FF)) for _ in range(rng.randrange(30)))
        texts = ["".join(rng.choices(PIECES, k=rng.randrange(1, 40))) + any_character for _ in range(2)]
        start = time.perf_counter()
        columns = {
            "prompts": ["p", "p"],
            "completions": texts,
            "answer": [texts[1], "7"],
            "completion_ids": [[0] * 5, [0]],
        }
        for function in REWARDS.values():
            scores = function(**columns)
            assert len(scores) == 2 and all(s is None or -2 <= s <= 2 for s in scores), (number, scores)
        assert answers_match(texts[0], texts[0]) and isinstance(extract_answer(texts[0]), str | None)
        assert "\x1b" not in printable(texts[0]) and "\u202e" not in printable(texts[0])
        slowest = max(slowest, time.perf_counter() - start)
    return {"completions": 2 * count, "reward_functions": len(REWARDS), "slowest_seconds": round(slowest, 3)}


def hostile_files(count: int, folder: Path) -> dict:
    """A good JSONL file with random bytes changed, cut or doubled: it is read, or refused with its line."""
    good = "".join(json.dumps(row) + "\n" for row in tests.ROWS[:5]).encode()
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


def ranks(folder: Path) -> dict:
    """One update with each setting, on one process and on several: the largest relative difference of a gradient."""
    alone, found = tests.parallel_updates(Path()), {}
    for name, world, job in (
        ("2 processes", 2, tests.parallel_updates),
        ("3 processes", 3, tests.parallel_updates),
        ("2 processes, FSDP2", 2, tests.parallel_sharded),
    ):
        (folder / name).mkdir()
        results = tests.on_ranks(world, job, folder / name)
        worst = 0.0
        for setting, (gradients, *_) in results[0].items():
            for key, gradient in gradients.items():
                ours = torch.tensor(alone[setting][0][key], dtype=torch.float64)
                difference = (torch.tensor(gradient, dtype=torch.float64) - ours).abs().max() / ours.abs().max().clamp(
                    min=1e-12
                )
                worst = max(worst, difference.item())
        found[name] = {"settings": len(results[0]), "equal_across_ranks": all(r == results[0] for r in results)}
        found[name]["largest_relative_difference_to_one_process"] = worst
    return found


def demo_warnings(seeds: int, folder: Path) -> dict:
    """The demo is healthy: what it is warned of, and how well it did."""
    found = {}
    for seed in range(seeds):
        command = [
            sys.executable,
            str(HERE.parent / "grpo_lora.py"),
            "--seed",
            str(seed),
            "--output_dir",
            f"demo-{seed}",
        ]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        summary = json.loads((folder / f"demo-{seed}/summary.json").read_text())
        rows = tests.lines(folder / f"demo-{seed}/metrics.jsonl")
        warnings = [text for row in rows for text in row.get("warnings", ())]
        found[f"seed {seed}"] = {"accuracy_after": summary["accuracy_after"], "warnings": warnings}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "command": "python benchmarks/dependable.py",
            "machine": f"{platform.machine()}, two cores",
            "killed": kills(100, folder),
            "flipped_bits": flipped_bits(500, next((folder / "straight").glob("checkpoint-*"))),
            "hostile_text": hostile_text(5000),
            "hostile_files": hostile_files(5000, folder),
            "processes": ranks(folder),
            "warnings_on_the_demo": demo_warnings(5, folder),
        }
    (HERE / "dependable.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
