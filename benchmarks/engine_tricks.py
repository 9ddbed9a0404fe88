"""What each of the engine's tricks brings: an update without one of them, beside the whole engine.

    python benchmarks/engine_tricks.py MODEL_FOLDER     # SmolLM2-135M: 12 minutes on two cores

Each run is a process of its own, whose first update is not timed. The order rotates from round to
round. Writes engine_tricks.json: for each size of work, median seconds of an update and of its
sampling, and what taking the trick away adds. The sizes are the two rows of step_vs_trl.py. With
the second, whose prompts are long, the cache alone is taken away.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
G, T = 8, 64


def take_away(trick: str) -> None:
    """Put the plain code in the place of one trick."""
    import grpo_lora
    from runner import fast

    if trick == "products by oneDNN":
        fast.MANY = sys.maxsize
    elif trick == "roomy cache":
        fast.FastLM.new_cache = lambda self, room=0: grpo_lora.CausalLM.new_cache(self)
    elif trick == "slopes in the forward pass":
        fast.FastLM.token_logps = grpo_lora.CausalLM.token_logps
    elif trick == "malloc and shared keys":
        fast.prepare = lambda: None


TRICKS = [
    "products by oneDNN",
    "roomy cache",
    "slopes in the forward pass",
    "malloc and shared keys",
]
WORK = {(2, 80): TRICKS, (1, 520): ["roomy cache"]}  # prompts and their tokens: what is taken away


def run(model_folder: str, prompts: int, L: int, without: str) -> dict[str, float]:
    """Seconds of the second update, and of its sampling."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from word_problems import problems

    from grpo_lora import GRPOConfig, GRPOTrainer
    from lora import LoRAConfig, apply_lora
    from runner import fast

    take_away(without)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = apply_lora(AutoModelForCausalLM.from_pretrained(model_folder), LoRAConfig(r=16))
    ids = tokenizer(" ".join(row["prompt"][-1]["content"] for row in problems(400))).input_ids
    rows = [{"prompt": tokenizer.decode(ids[i * L : (i + 1) * L])} for i in range(2 * prompts)]
    reward = lambda completions, **_: [len(set(text)) / 10 for text in completions]
    sizes: dict[str, Any] = {"prompts_per_step": prompts, "num_generations": G}
    args = GRPOConfig(max_completion_length=T, per_device_train_batch_size=16, **sizes)
    trainer = GRPOTrainer(model, reward, args, rows, None, tokenizer, engine=fast)
    trainer.eos_token_ids = []  # full length
    sample, found = trainer.sample, {}

    def timed_sample(*given: Any) -> Any:
        begun = time.perf_counter()
        rollout = sample(*given)
        found["sampling"] = time.perf_counter() - begun
        return rollout

    trainer.sample = timed_sample  # type: ignore[method-assign]
    for index in range(2):
        begun = time.perf_counter()
        trainer.seed("update", index)
        trainer.update(trainer.batch(index))
        found["seconds"] = time.perf_counter() - begun
    return found


def measure(model_folder: str, work: tuple[int, int], tricks: list[str], rounds: int) -> dict:
    """Medians of all sides on one size of work."""
    sides = ["nothing", *tricks]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            command = [sys.executable, __file__, model_folder, "--without", side]
            command += ["--work", json.dumps(work)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(work, number, side, found[side][-1], flush=True)
    median = lambda side, key: statistics.median(row[key] for row in found[side])
    rows = []
    for side in sides:
        seconds = median(side, "seconds")
        added = seconds / median("nothing", "seconds") - 1
        row = {"without": side, "seconds": round(seconds, 2), "added": round(added, 3)}
        rows.append(row | {"sampling": round(median(side, "sampling"), 2), "all": found[side]})
    name = f"{work[0]} x {G} x {T}, prompts of {work[1]}"
    return {"work": name, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without", help=argparse.SUPPRESS)  # these two: measure
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.without is not None:
        print(json.dumps(run(options.model, *json.loads(options.work), options.without)))
        return
    works = [measure(options.model, work, some, options.rounds) for work, some in WORK.items()]
    result = {"command": "python benchmarks/engine_tricks.py MODEL_FOLDER", "work": works}
    (HERE / "engine_tricks.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
