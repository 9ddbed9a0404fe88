"""Our decode loop against the ways that transformers has: dynamic and static caches, a compiled step, continuous batching.

    python benchmarks/decode.py SMOLLM2        # some ten minutes on two quiet cores; writes benchmarks/decode.json

The same model (merged: plain dense weights), prompts and number of tokens, no EOS, sampled at temperature 1 without top-k or
top-p. The sides alternate; medians of three. Compiling and the first call are left out and given apart.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

from grpo_lora import generate, keep_freed_memory  # noqa: E402

WORK = ((2, 8, 64, 80), (1, 8, 64, 520))  # prompts, completions of each, their tokens, prompt tokens


def sides(folder: str, P: int, G: int, T: int, L: int) -> dict[str, Callable[[], object]]:
    """Name -> one rollout."""
    load = lambda **more: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    model, static, compiled = load(), load(), load()
    paged = load()
    for m in (model, static, compiled, paged):
        m.generation_config.eos_token_id = None  # generate would fall back to it
    compiled.forward = torch.compile(compiled.forward)
    ids = torch.randint(100, 40_000, (P, L), generator=torch.Generator().manual_seed(0))
    mask, rows = torch.ones_like(ids, dtype=torch.bool), ids.repeat_interleave(G, dim=0)
    plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": T, "pad_token_id": 0}

    def theirs(m, **more) -> None:
        settings = GenerationConfig(**plain, **more)
        out = m.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
        assert out.shape[1] == L + T, out.shape

    ours = lambda: generate(
        model, ids, mask, num_generations=G, max_completion_length=T, temperature=1.0, eos_token_ids=[], pad_token_id=0
    )  # fmt: skip
    found = {
        "here": ours,
        "dynamic cache": lambda: theirs(model),
        "static cache": lambda: theirs(static, cache_implementation="static", disable_compile=True),
        "static cache, compiled": lambda: theirs(compiled, cache_implementation="static", disable_compile=True),
    }
    found["continuous batching"] = lambda: paged.generate_batch(
        inputs=rows.tolist(), generation_config=GenerationConfig(**plain, eos_token_id=-1), progress_bar=False
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()
    results = []
    for work in WORK:
        row: dict = {"prompts": work[0], "completions": work[1], "tokens": work[2], "prompt_tokens": work[3]}
        found, seconds = sides(options.model, *work), {}
        with torch.no_grad():
            for name, rollout in list(found.items()):
                start = time.perf_counter()
                try:
                    rollout()
                    row[f"{name}: first call"] = round(time.perf_counter() - start, 2)
                    print(name, row[f"{name}: first call"], flush=True)
                except Exception as error:
                    row[name] = f"{type(error).__name__}: {error}"[:200]
                    del found[name]
            for _ in range(3):
                for name, rollout in found.items():
                    start = time.perf_counter()
                    rollout()
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
        row |= {name: round(statistics.median(times), 2) for name, times in seconds.items()}
        results.append(row)
        print(json.dumps(row, indent=1), flush=True)
    about = {
        "command": "python benchmarks/decode.py SMOLLM2",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (HERE / "decode.json").write_text(json.dumps(about | {"rollouts": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
