"""Our decode loops against the ways that transformers has: dynamic and static caches, a compiled
step, continuous batching.

    python benchmarks/decode.py SMOLLM2    # half an hour on two cores; writes decode.json
    python benchmarks/decode.py --gpu      # a random model of 0.5B in bf16, two minutes on a GPU;
                                           # writes decode_gpu.json

Ours are `engine` (runner/fast.py) and `plain` (grpo_lora.py). All sides have the same model
(merged: plain dense weights), prompts and number of tokens, no EOS, and sample at temperature 1
without top-k or top-p. All run in one process, with what fast.prepare sets. They alternate; figures
are medians of three. Compiling and the first call are left out, and given apart.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
import transformers  # noqa: E402
from step_vs_trl import now, random_model  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

import grpo_lora  # noqa: E402
from runner import fast  # noqa: E402

WORK = ((2, 8, 64, 80), (1, 8, 64, 520))  # prompts, completions, their tokens, prompt tokens
GPU_WORK = ((1, 16, 64, 512),)


def sides(folder: str, P: int, G: int, T: int, L: int) -> dict[str, Callable[[], object]]:
    """Name -> one rollout."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    read = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    models = [read() for _ in range(4)]
    for m in models:
        m.generation_config.eos_token_id = None  # generate would fall back to it
    model, static, compiled, paged = models
    if not gpu:  # where generate does not compile by itself
        compiled.forward = torch.compile(compiled.forward)
    ids = torch.randint(100, 40_000, (P, L), generator=torch.Generator().manual_seed(0))
    ids = (ids % model.config.vocab_size).to(device)
    mask, rows = torch.ones_like(ids, dtype=torch.bool), ids.repeat_interleave(G, dim=0)
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    sampled |= {"max_new_tokens": T, "pad_token_id": 0}

    def theirs(m, **more) -> None:
        settings = GenerationConfig(**sampled, **more)
        out = m.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
        assert out.shape[1] == L + T, out.shape

    def ours(engine, graphs: tuple = ("cuda",)) -> None:
        fast.GRAPHS = set(graphs)
        engine.generate(
            model, ids, mask, num_generations=G, max_completion_length=T, temperature=1.0,
            eos_token_ids=[], pad_token_id=0,
        )  # fmt: skip

    def continuous() -> None:
        settings = GenerationConfig(**sampled, eos_token_id=-1)
        paged.generate_batch(rows.tolist(), settings, progress_bar=False)

    found = {"engine": lambda: ours(fast), "plain": lambda: ours(grpo_lora)}
    if gpu:
        found["engine, kernel by kernel"] = lambda: ours(fast, graphs=())
    still = {"cache_implementation": "static"}
    return found | {
        "dynamic cache": lambda: theirs(model),
        "static cache": lambda: theirs(static, **still, disable_compile=True),
        "static cache, compiled": lambda: theirs(compiled, **still, disable_compile=not gpu),
        "continuous batching": continuous,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="its folder; with --gpu a random one is made")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fast.prepare()
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            random_model(folder)
        compare(options.model or folder, options.gpu)


def compare(model: str, gpu: bool) -> None:
    about = {"command": f"python benchmarks/decode.py {'--gpu' if gpu else 'SMOLLM2'}"}
    about |= {"date": time.strftime("%Y-%m-%d")}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"machine": torch.cuda.get_device_name()} if gpu else {}
    about |= {} if gpu else {"threads": torch.get_num_threads()}
    results = []
    for work in GPU_WORK if gpu else WORK:
        results.append(measure(model, work))
        print(json.dumps(results[-1], indent=1), flush=True)
        path = HERE / f"decode{'_gpu' * gpu}.json"
        path.write_text(json.dumps(about | {"rollouts": results}, indent=1) + "\n")


@torch.no_grad()
def measure(model: str, work: tuple) -> dict:
    """Seconds of one rollout on each side, and what a side that fails says."""
    row: dict = dict(zip(("prompts", "completions", "tokens", "prompt_tokens"), work, strict=True))
    found, seconds = sides(model, *work), {}
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
    return row | {name: round(statistics.median(times), 2) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
