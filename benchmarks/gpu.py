"""Where the time of an update goes on a GPU, as the group grows.

    python benchmarks/gpu.py            # a random Llama of 0.5B in bf16: some 10 minutes on a GPU
    python benchmarks/gpu.py --tiny     # tiny sizes, on a CPU too: does the script work?

For groups of 16, 64, 128 and 256 rows, prompts of 512 and completions of 512 tokens: sampled tokens
per second; the time of a decode step over the time that reading all weights and caches once would
take at the bandwidth measured here (the floor); the share of the update that is not sampling; peak
memory. Each with rollouts on the adapter as it is, and on merged weights, which round in bf16
(merge_half_precision, with sampler_correction): there the gap of sampler and scorer matters. Groups
of 128 and more are trained with gradient checkpointing, as a group is one forward.

Writes gpu.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402

ON_GPU = torch.cuda.is_available()


def seconds(function: Any) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of a copy, read and written."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * size / min(seconds(lambda: y.copy_(x)) for _ in range(5))


def measure(
    folder: str, group: int, length: int, merged: bool, device: torch.device
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_lora import SAMPLER_GAP, GRPOConfig, GRPOTrainer
    from lora import LoRAConfig, apply_lora
    from runner import fast

    tokenizer = AutoTokenizer.from_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = apply_lora(base.to(device), LoRAConfig(r=16, lora_alpha=32))
    words = " ".join(f"w{2 + i % 90}" for i in range(length))
    rows = [{"prompt": words}] * 4
    reward = lambda completions, **_: [len(text) for text in completions]
    args = GRPOConfig(
        prompts_per_step=1, num_generations=group, max_completion_length=length,
        per_device_train_batch_size=group, gradient_checkpointing=group >= 128,
        merge_half_precision=merged,
        sampler_correction="token_truncate" if merged else "none",
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward, args, rows, None, tokenizer, engine=fast)
    trainer.eos_token_ids = []  # full length
    found: dict[str, Any] = {}
    sample = trainer.sample

    def timed(*given: Any) -> Any:
        kept: list[Any] = []
        found["sampling"] = seconds(lambda: kept.append(sample(*given)))
        return kept[0]

    trainer.sample = timed  # type: ignore[method-assign]
    metrics: dict[str, Any] = {}
    for index in range(2):  # the first warms up
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer.seed("update", index)
        found["seconds"] = seconds(lambda: metrics.update(trainer.update(trainer.batch(0))))
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    config = base.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * 2 * group * (1.5 * length)  # half-way, in bf16
    found |= {
        "group": group,
        "merged": merged,
        "gap": metrics[SAMPLER_GAP],
        "bytes": weights + cache,
    }
    found["tokens_per_second"] = group * length / found["sampling"]
    found["share_not_sampling"] = 1 - found["sampling"] / found["seconds"]
    if ON_GPU:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if ON_GPU else "cpu")
    groups, length = ([4, 8], 16) if options.tiny else ([16, 64, 128, 256], 512)
    rate = bandwidth(device, 2**24 if options.tiny else 2**31)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            import step_vs_trl
            from transformers import LlamaConfig

            sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96}
            sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            step_vs_trl.random_model(folder, LlamaConfig(eos_token_id=1, pad_token_id=0, **sizes))
        else:
            from step_vs_trl import random_model

            random_model(folder)
        for group in groups:
            for merged in (False, True):
                row = measure(folder, group, length, merged, device)
                floor = row.pop("bytes") / rate
                row["step_over_floor"] = row["sampling"] / length / floor
                rows.append(row)
                print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    result = {"command": "python benchmarks/gpu.py", "device": name, "bytes_per_second": rate}
    if not options.tiny:
        (HERE / "gpu.json").write_text(json.dumps(result | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
