"""Our decode loop against the ways that transformers has: dynamic and static caches, a compiled step, continuous batching.

    python benchmarks/decode.py SMOLLM2        # half an hour on two cores; writes benchmarks/decode.json
    python benchmarks/decode.py --gpu          # a random model of 0.5B in bf16, two minutes on a GPU; writes decode_gpu.json

The same model (merged: plain dense weights), prompts and number of tokens, no EOS, sampled at temperature 1 without top-k or
top-p. The sides alternate; medians of three. Compiling and the first call are left out and given apart.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
import transformers  # noqa: E402
from step_vs_trl import now, random_model  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

import grpo_lora  # noqa: E402

WORK = ((2, 8, 64, 80), (1, 8, 64, 520))  # prompts, completions of each, their tokens, prompt tokens
GPU_WORK = ((1, 16, 64, 512),)


def sides(folder: str, P: int, G: int, T: int, L: int) -> dict[str, Callable[[], object]]:
    """Name -> one rollout."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    model, static, compiled, paged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval() for _ in range(4)
    )
    for m in (model, static, compiled, paged):
        m.generation_config.eos_token_id = None  # generate would fall back to it
    if not gpu:  # where generate does not compile by itself
        compiled.forward = torch.compile(compiled.forward)
    ids = torch.randint(100, 40_000, (P, L), generator=torch.Generator().manual_seed(0)).to(device)
    mask, rows = torch.ones_like(ids, dtype=torch.bool), ids.repeat_interleave(G, dim=0)
    plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": T, "pad_token_id": 0}

    def theirs(m, **more) -> None:
        settings = GenerationConfig(**plain, **more)
        out = m.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
        assert out.shape[1] == L + T, out.shape

    def ours(graphs: set[str]) -> None:
        grpo_lora.GRAPHS = graphs
        grpo_lora.generate(
            model, ids, mask, num_generations=G, max_completion_length=T, temperature=1.0, eos_token_ids=[], pad_token_id=0
        )  # fmt: skip

    found = {"here": lambda: ours({"cuda"})} | ({"here, kernel by kernel": lambda: ours(set())} if gpu else {})
    found |= {
        "dynamic cache": lambda: theirs(model),
        "static cache": lambda: theirs(static, cache_implementation="static", disable_compile=True),
        "static cache, compiled": lambda: theirs(compiled, cache_implementation="static", disable_compile=not gpu),
    }
    found["continuous batching"] = lambda: paged.generate_batch(
        inputs=rows.tolist(), generation_config=GenerationConfig(**plain, eos_token_id=-1), progress_bar=False
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    grpo_lora.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            random_model(folder)
        compare(options.model or folder, options.gpu)


def compare(model: str, gpu: bool) -> None:
    results = []
    for work in GPU_WORK if gpu else WORK:
        row: dict = {"prompts": work[0], "completions": work[1], "tokens": work[2], "prompt_tokens": work[3]}
        found, seconds = sides(model, *work), {}
        with torch.no_grad():
            for name, rollout in list(found.items()):
                start = now()
                try:
                    rollout()
                    row[f"{name}: first call"] = round(now() - start, 2)
                    print(name, row[f"{name}: first call"], flush=True)
                except Exception as error:
                    row[name] = f"{type(error).__name__}: {error}"[:200]
                    del found[name]
            for _ in range(3):
                for name, rollout in found.items():
                    start = now()
                    rollout()
                    seconds.setdefault(name, []).append(now() - start)
        row |= {name: round(statistics.median(times), 2) for name, times in seconds.items()}
        results.append(row)
        print(json.dumps(row, indent=1), flush=True)
    about = {"command": f"python benchmarks/decode.py {'--gpu' if gpu else 'SMOLLM2'}"}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"machine": torch.cuda.get_device_name()} if gpu else {"threads": torch.get_num_threads()}
    path = HERE / f"decode{'_gpu' * gpu}.json"
    path.write_text(json.dumps(about | {"rollouts": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
