"""The demo: sums of three digits, and a tiny chat model with two habits, one of which pays.

Pre-training teaches the model to answer at once, mostly wrong, and to think first, which comes out
right. It prefers the first. GRPO finds out that the second pays.
"""

import itertools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler

from grpo_lora import encode_prompt

HELD_OUT = 200  # of the 1000 problems; neither pre-training nor GRPO sees them
SETTINGS = {  # what `python grpo_lora.py` does, unless told otherwise
    "max_steps": 50,
    "prompts_per_step": 16,
    "num_generations": 16,
    "per_device_train_batch_size": 128,
    "max_completion_length": 24,
    "learning_rate": 1e-3,
    "r": 8,
    "lora_alpha": 8.0,
    "eval_steps": 10,
    "save_steps": 25,
    "log_tokens_steps": 10,
}


def sum_problems(seed: int = 0) -> list[dict[str, Any]]:
    """Every sum of three digits, shuffled, as chat prompts with an `answer` column."""
    problems = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}+{c}=?"}], "answer": str(a + b + c)}
        for a, b, c in itertools.product(range(10), repeat=3)
    ]
    random.Random(seed).shuffle(problems)
    return problems


def sum_completion(problem: dict[str, Any], think: bool, answer: int | None = None) -> str:
    """How the model may reply: at once (with any `answer`), or by thinking, which comes out right.

    >>> problem = {"prompt": [{"role": "user", "content": "4+7+9=?"}], "answer": "20"}
    >>> sum_completion(problem, think=True)
    '<think>4+7=11, 11+9=20</think><answer>20</answer>'
    """
    digits = problem["prompt"][-1]["content"].removesuffix("=?").split("+")
    a, b, c = map(int, digits)
    thought = f"<think>{a}+{b}={a + b}, {a + b}+{c}={a + b + c}</think>" if think else ""
    return f"{thought}<answer>{a + b + c if answer is None else answer}</answer>"


def demo_tokenizer() -> Any:
    """A tokenizer whose tokens are whole numbers, signs and tags, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
    words += ["<think>", "</think>", "<answer>", "</answer>", *map(str, range(28)), *"+=?, "]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[a-z]+>|[0-9]+|."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if not loop.last or m.role != 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_demo_model(directory: Path, steps: int = 600, width: int = 128) -> None:
    """Pre-train the model. An ordinary transformers directory, whole or not there."""
    tokenizer = demo_tokenizer()
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    problems = sum_problems()[:-HELD_OUT]
    prompts = [encode_prompt(p["prompt"], tokenizer) for p in problems]
    betas = (0.9, 0.98)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=betas, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(n, (128,), generator=generator).tolist()
    title = "pre-training the demo's base model"
    for _ in tqdm(range(steps), desc=title, unit="batch", disable=None):
        chosen, habits = draw(len(problems)), zip(draw(100), draw(100), draw(28), strict=True)
        # 30%: think, and be right. 70%: answer at once, one in five right, others a guess (0-27)
        replies = [
            sum_completion(problems[i], think < 30, None if think < 30 or right < 20 else guess)
            for i, (think, right, guess) in zip(chosen, habits, strict=True)
        ]
        ends = [
            torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(replies).input_ids
        ]
        starts = [torch.tensor(prompts[i]) for i in chosen]
        pairs = list(zip(starts, ends, strict=True))
        ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True)
        labels = [torch.cat([torch.full_like(start, -100), end]) for start, end in pairs]
        targets = pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        os.replace(scratch, directory)
    except OSError:  # another process was faster
        shutil.rmtree(scratch)
