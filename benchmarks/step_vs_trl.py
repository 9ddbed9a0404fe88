"""One update of on-policy GRPO with LoRA, here and in TRL + PEFT, on the same work and machine.

    python benchmarks/step_vs_trl.py MODEL_FOLDER     # SmolLM2-135M: 45 minutes on two cores
    python benchmarks/step_vs_trl.py --gpu            # a random model of 0.5B in bf16: 5 minutes

Three sides: `engine` is GRPOTrainer with engine=runner.fast, as the command line uses it; `plain`
is GRPOTrainer as it stands in grpo_lora.py; `theirs` is TRL's GRPOTrainer on a peft model. --sides
chooses some of them.

All have the same prompts, rows per forward, rank, targets, loss, sampling (temperature 1,
untruncated) and number of tokens: EOS is suppressed, so that every completion has its full length.
In each round every side runs once, in a process of its own, whose first update is not timed. The
order rotates from round to round. Figures are medians. Peak memory is the process's largest
resident set, or on a GPU the most that its tensors took.

Writes step_vs_trl.json, or with --gpu step_vs_trl_gpu.json, after each row of the table.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

SIDES = ("engine", "plain", "theirs")
WORK = {  # prompts, completions of each, completion tokens, prompt tokens (about), rows per forward
    "2 x 8 x 64, prompts of 80": (2, 8, 64, 80, 16),
    "1 x 8 x 64, prompts of 520": (1, 8, 64, 520, 8),
}
GPU_WORK = {"1 x 16 x 512, prompts of 512": (1, 16, 512, 512, 16)}


def random_model(folder: str, config: Any = None) -> None:
    """A Llama of Qwen2.5-0.5B's sizes, or another, in bf16, with a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = config or LlamaConfig(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def texts(tokenizer, count: int, tokens: int) -> list[str]:
    """Prompts of so many tokens, made of word problems."""
    from word_problems import problems

    words = " ".join(row["prompt"][-1]["content"] for row in problems(400))
    if "w2" in tokenizer.get_vocab():  # the random model's
        words = " ".join(f"w{i}" for i in range(2, 20_000))
    ids = tokenizer(words).input_ids
    return [tokenizer.decode(ids[i * 7 : i * 7 + tokens]) for i in range(count)]


def reward(completions, **columns):
    """Any number that differs within a group, so that no group is without advantage."""
    return [float(len(set(text))) + 0.01 * (len(text) % 100) for text in completions]


def load(folder: str) -> tuple[Any, Any]:
    """The model, in bf16 where there is a GPU, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def ours(side: str, folder: str, work: tuple, updates: int, rows_per_forward: int) -> dict:
    import torch

    import grpo_lora
    from lora import LoRAConfig, apply_lora
    from runner import fast

    P, G, T, L, _ = work
    model, tokenizer = load(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    apply_lora(model, LoRAConfig(r=16, lora_alpha=32))
    rows = [{"prompt": text} for text in texts(tokenizer, P * (updates + 1), L)]
    args = grpo_lora.GRPOConfig(
        prompts_per_step=P, num_generations=G, per_device_train_batch_size=rows_per_forward,
        max_completion_length=T, max_steps=updates + 1, learning_rate=1e-5,
    )  # fmt: skip
    engine = fast if side == "engine" else None
    trainer = grpo_lora.GRPOTrainer(model, reward, args, rows, None, tokenizer, engine=engine)
    trainer.eos_token_ids = []  # never the end
    seconds, sampling = [], []
    sample = trainer.sample

    def timed_sample(*args):
        start = now()
        rollout = sample(*args)
        sampling.append(now() - start)
        assert rollout.completion_mask.all() and rollout.completion_ids.shape == (P * G, T)
        return rollout

    trainer.sample = timed_sample
    for index in range(updates + 1):
        trainer.seed("update", index)
        start = now()
        metrics = trainer.update(trainer.batch(index))
        seconds.append(now() - start)
    gflop = needed_gflop(model, P, G, T, len(tokenizer(rows[0]["prompt"]).input_ids))
    timings = {"seconds": seconds[1:], "sampling": sampling[1:], "peak_gib": peak_gib()}
    return timings | {"gflop": gflop, "gap": metrics[grpo_lora.SAMPLER_GAP]}


def needed_gflop(model, P: int, G: int, T: int, L: int) -> float:
    """The matrix products that an update cannot do without, but for attention's, a few percent.

    Each prompt and each completion token passes once in the rollout and once in the loss forward.
    The backward pass takes d/dx of everything, and d/dW of A and B alone.
    """
    head = model.get_output_embeddings().weight.numel()
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dense = sum(m.base_layer.weight.numel() for m in model.modules() if hasattr(m, "lora_A"))
    read, written = P * L + P * G * T, P * G * T
    rollout = dense * read + head * written
    training = 2 * (dense * read + head * written) + 3 * adapters * read
    return 2e-9 * (rollout + training)


def theirs(folder: str, work: tuple, updates: int) -> dict:
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    P, G, T, L, rows_per_forward = work
    gpu = torch.cuda.is_available()
    model, tokenizer = load(folder)
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    args = trl.GRPOConfig(
        output_dir="unused", use_cpu=not gpu, bf16=gpu, gradient_checkpointing=False,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000,
        per_device_train_batch_size=rows_per_forward, dataloader_pin_memory=False,
        gradient_accumulation_steps=P * G // rows_per_forward, num_generations=G,
        max_completion_length=T, max_steps=updates + 1, learning_rate=1e-5, temperature=1.0,
        beta=0.0, loss_type="dapo", generation_kwargs={"suppress_tokens": sorted(ends)},
    )  # fmt: skip
    seconds, sampling, starts = [], [], []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            starts.append(now())

        def on_step_end(self, *args, **kwargs):
            seconds.append(now() - starts[-1])

    def timed(generate):
        def call(*args, **kwargs):
            start = now()
            out = generate(*args, **kwargs)
            sampling.append(now() - start)
            ids = out.sequences if hasattr(out, "sequences") else out
            assert ids.shape[0] == P * G, ids.shape
            assert not (ids[:, -T:] == tokenizer.eos_token_id).any(), "rows of full length"
            return out

        return call

    transformers.GenerationMixin.generate = timed(transformers.GenerationMixin.generate)
    data = Dataset.from_dict({"prompt": texts(tokenizer, P * (updates + 1), L)})
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.GRPOTrainer(
        model, reward, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config
    )
    trainer.add_callback(Timer())
    trainer.train()
    return {"seconds": seconds[1:], "sampling": sampling[1:], "peak_gib": peak_gib()}


def gemm_rate() -> float:
    """GFLOP/s of matrix products, the best of many: in float32, of shapes that a small model has,
    or on a GPU of large ones in bf16."""
    import torch

    best, gpu = 0.0, torch.cuda.is_available()
    like = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    small = ((1024, 576, 1536), (1024, 2048, 2048), (2048, 2048, 2048))
    for m, k, n in ((8192, 8192, 8192),) if gpu else small:
        a, b = torch.randn(m, k, **like), torch.randn(k, n, **like)
        for _ in range(10):
            start = now()
            a @ b
            best = max(best, 2e-9 * m * k * n / (now() - start))
    return best


def in_process(side: str, model: str, work: tuple, updates: int, rows: int) -> dict:
    """What a process says that runs one side."""
    command = [sys.executable, __file__, model, "--side", side, "--work", json.dumps(work)]
    command += ["--updates", str(updates), "--rows", str(rows)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def run_side(options: argparse.Namespace) -> dict:
    """What this process is asked for: one side, or the rate of matrix products."""
    work = tuple(json.loads(options.work))
    if options.side == "gemm":
        return {"gflops": gemm_rate()}
    if options.side == "theirs":
        return theirs(options.model, work, options.updates)
    return ours(options.side, options.model, work, options.updates, options.rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="its folder; with --gpu a random one is made")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="timed ones, in each process")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # these three: in_process
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            random_model(folder)
        compare(options.model or folder, options)


def compare(model: str, options: argparse.Namespace) -> None:
    import peft
    import torch
    import transformers
    import trl

    flags = [] if set(options.sides) == set(SIDES) else ["--sides", *options.sides]
    if options.gpu:
        about = {"command": " ".join(["python benchmarks/step_vs_trl.py --gpu", *flags])}
        about |= {"model": "random Llama of Qwen2.5-0.5B's sizes"}
        about |= {"machine": torch.cuda.get_device_name(), "dtype": "bfloat16, adapters float32"}
    else:
        about = {"command": " ".join(["python benchmarks/step_vs_trl.py MODEL_FOLDER", *flags])}
        about |= {"model": "SmolLM2-135M-Instruct", "machine": platform.machine()}
        about |= {"threads": torch.get_num_threads(), "dtype": "float32"}
    about |= {"date": time.strftime("%Y-%m-%d"), "rounds": options.rounds}
    about |= {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)}
    results = []
    for name, work in (GPU_WORK if options.gpu else WORK).items():
        results.append(measure(name, model, work, options))
        print(json.dumps(results[-1], indent=1), flush=True)
        path = HERE / f"step_vs_trl{'_gpu' * options.gpu}.json"
        path.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


def measure(name: str, model: str, work: tuple, options: argparse.Namespace) -> dict:
    """All sides on one size of work: a row of the table."""
    P, G, T, _, rows = work
    runs: dict[str, list[dict]] = {side: [] for side in options.sides}
    rates = []
    for number in range(options.rounds):
        turn = number % len(options.sides)
        for side in [*options.sides[turn:], *options.sides[:turn]]:
            runs[side].append(in_process(side, model, work, options.updates, rows))
            print(f"{name}: {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
        rates.append(in_process("gemm", model, work, 1, rows)["gflops"])
    if rows > G and "engine" in options.sides:  # for its memory
        runs["engine, a group at a time"] = [in_process("engine", model, work, options.updates, G)]
    row: dict[str, Any] = {"work": name, "tokens_sampled": P * G * T}
    for side, some in runs.items():
        seconds = [s for run in some for s in run["seconds"]]
        row[side] = {"seconds": statistics.median(seconds)}
        sampling = statistics.median(s for run in some for s in run["sampling"])
        row[side] |= {"sampling_seconds": sampling}
        row[side] |= {"peak_gib": statistics.median(run["peak_gib"] for run in some)}
        row[side] |= {"all_seconds": [round(s, 2) for s in seconds]}
        row[side] |= {"tokens_per_second": P * G * T / row[side]["seconds"]}
    row["gemm_gflops"] = statistics.median(rates)
    own = [side for side in options.sides if side != "theirs"]
    if "theirs" in options.sides:
        for ratio, what in (("time_ratio", "seconds"), ("memory_ratio", "peak_gib")):
            row[ratio] = {side: row["theirs"][what] / row[side][what] for side in own}
    for side in own:
        row["gflop_per_update"] = gflop = runs[side][0]["gflop"]
        row[side]["share_of_gemm_rate"] = gflop / row["gemm_gflops"] / row[side]["seconds"]
        row[side]["sampler_scorer_gap"] = statistics.median(run["gap"] for run in runs[side])
    return row


if __name__ == "__main__":
    main()
