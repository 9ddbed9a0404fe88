"""How time and memory of one update grow, one size at a time; and what the options cost.

    python benchmarks/scaling.py     # 15 minutes on two cores; writes scaling.json and scaling.png

A random Llama (4 layers, width 256, 8,192 tokens) and 2 prompts x 8 completions, 128 + 64 tokens of
full length, unless varied, with the engine of runner/fast.py. Each point is a process of its own,
so that peak memory is its own too (above what the process held before the first update). Time is
the median of three updates after one that is not timed. Exponents are slopes of a line through the
logarithms.
"""

import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

BASE = {"width": 256, "vocabulary": 8192, "G": 8, "prompt": 128, "completion": 64, "P": 2}
AXES = {
    "G": [4, 8, 16, 32],
    "prompt": [64, 256, 1024, 2048],
    "completion": [32, 64, 128, 256],
    "vocabulary": [8192, 32768, 131072, 262144],
    "width": [128, 256, 512, 1024],
}
OPTIONS = {
    "as it is": {},
    "the plain code": {"plain": True},
    "a group at a time": {"rows": 8},
    "activation checkpointing": {"checkpointing": True},
    "bf16 base": {"dtype": "bfloat16"},
    "completions that end by themselves": {"ending": 0.03},
}


def measure(point: dict) -> dict:
    """Seconds, peak memory and tokens of an update at one point."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import grpo_lora
    from lora import LoRAConfig, apply_lora
    from runner import fast

    torch.manual_seed(0)
    V, H = point["vocabulary"], point["width"]
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=3 * H, num_hidden_layers=4,
        num_attention_heads=H // 64 or 1, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=0, initializer_range=0.01,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, point.get("dtype", "float32")))
    apply_lora(model, LoRAConfig(r=16, lora_alpha=32))
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, V)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    words = torch.randint(2, V, (8, point["prompt"])).tolist()
    rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in words]
    reward = lambda completion_ids, **columns: [sum(ids) % 7 for ids in completion_ids]
    args = grpo_lora.GRPOConfig(
        prompts_per_step=point["P"], num_generations=point["G"], max_steps=4,
        max_completion_length=point["completion"],
        per_device_train_batch_size=point.get("rows", point["P"] * point["G"]),
        gradient_checkpointing=point.get("checkpointing", False),
    )  # fmt: skip
    engine = None if point.get("plain") else fast
    trainer = grpo_lora.GRPOTrainer(model, reward, args, rows, None, tokenizer, engine=engine)
    trainer.eos_token_ids = list(range(2, 2 + int(point.get("ending", 0) * V)))
    before, seconds, tokens = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], []
    for index in range(4):
        trainer.seed("update", index)
        start = time.perf_counter()
        metrics = trainer.update(trainer.batch(index))
        seconds.append(time.perf_counter() - start)
        tokens.append(metrics["completions/mean_length"] * point["P"] * point["G"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"seconds": statistics.median(seconds[1:]), "mib": (peak - before) / 2**10}
    return found | {"tokens": tokens[-1], "gap": metrics[grpo_lora.SAMPLER_GAP]}


def in_process(point: dict) -> dict:
    command = [sys.executable, __file__, json.dumps(BASE | point)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return point | json.loads(out.strip().splitlines()[-1])


def exponent(x: list, y: list) -> float:
    """Slope of log y over log x, between the two largest."""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def draw(axes: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {"figsize": (13, 2.8), "layout": "constrained", "sharey": True}
    figure, plots = pyplot.subplots(1, len(axes), **size)
    for plot, (name, points) in zip(plots, axes.items(), strict=True):
        x = [p[name] for p in points]
        plot.loglog(x, [p["seconds"] for p in points], "o-", label="seconds")
        plot.loglog(x, [p["mib"] / 1024 for p in points], "s--", label="GiB")
        plot.set_xticks(x, [f"{v // 1024}k" if v > 9999 else str(v) for v in x])
        plot.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
        plot.minorticks_off()
        plot.set_xlabel(name)
    plots[0].legend()
    figure.savefig(HERE / "scaling.png", dpi=90)


def main() -> None:
    axes = {name: [in_process({name: value}) for value in values] for name, values in AXES.items()}
    exponents = {}
    for name, points in axes.items():
        x = [p[name] for p in points]
        slope = lambda key, x=x, points=points: round(exponent(x, [p[key] for p in points]), 2)
        exponents[name] = {key: slope(key) for key in ("seconds", "mib")}
        found = [(p[name], round(p["seconds"], 2), round(p["mib"])) for p in points]
        print(name, exponents[name], found, flush=True)
    longer = {"completion": 256, "prompt": 256}
    options = {name: in_process(longer | option) for name, option in OPTIONS.items()}
    for name, r in options.items():
        size = f"{r['mib']:.0f} MiB, {r['tokens']:.0f} tokens"
        print(f"{name:<36} {r['seconds']:.2f} s, {size}, gap {r['gap']:.1e}")
    summary = {"command": "python benchmarks/scaling.py", "date": time.strftime("%Y-%m-%d")}
    summary |= {"machine": f"{platform.machine()}, two cores", "base": BASE, "axes": axes}
    summary |= {"exponents_of_the_last_step": exponents, "options_at_256_plus_256": options}
    (HERE / "scaling.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(axes)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        main()
