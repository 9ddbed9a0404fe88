"""Rewards for GRPO: read the answer out of a completion, compare it exactly, score it; and the demo's built-in task.

A reward function is called by keyword with `prompts`, `completions` and every column of the data as a list, and returns
one float, or None for "not applicable", per completion. That is TRL's and open-r1's signature: theirs run here unchanged
and these run there. Completions are strings, or lists of chat messages. (The trainer also passes completion_ids,
trainer_state, log_extra and log_metric; `async def` is fine.) The functions here are total: for any text they return in
time linear in its length, evaluate nothing that a model wrote, and give the same value for the same text.

After open-r1 (github.com/huggingface/open-r1, src/open_r1/rewards.py), with these differences:

    accuracy_reward         exact rational arithmetic on the marked answer; no LaTeX parser reads model text
    format_reward           tags may be separated by any white space; nothing may follow the answer (there, MULTILINE lets it)
    tag_count_reward        a tag counts with or without the line breaks around it
    reasoning_steps_reward  numbered lines count anywhere (there, only at the very start of the text)
    length_reward           compares within the group of one prompt, in tokens (there, within the batch, in characters)
    cosine_reward           is flat beyond max_len, in tokens (there, the cosine rises again)
    soft_overlong_penalty   takes its length from the run, unless told
"""

import difflib
import importlib
import importlib.util
import inspect
import itertools
import math
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

Rewards = list[float | None]

# --------------------------------------------------------------------------------------------------- reading answers


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, dict):
        return completion_text(completion.get("content", completion.get("text", "")))
    return "".join(map(completion_text, completion)) if isinstance(completion, list | tuple) else ""


def extract_answer(text: str) -> str | None:
    r"""The answer that a text marks as its own, or None. Looked for after the last </think>, where there is one:

    1. the last complete \boxed{...} (the innermost, braces balanced)
    2. the last complete <answer>...</answer>
    3. the rest of the line after the last ####, as in GSM8K

    An empty marking is passed over. There is no guessing at unmarked numbers: with "the last number" as a rule,
    "I count 12345 ways to fail" is an answer.

    >>> extract_answer(r"<think>\boxed{7}</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = text.rpartition("</think>")[2]
    before, closing, _ = text.rpartition("</answer>")
    _, opening, tagged = before.rpartition("<answer>")
    hashed = text.rpartition("####")[2] if "####" in text else ""
    for found in (_last_boxed(text), tagged if opening and closing else "", hashed.lstrip(" \t").partition("\n")[0]):
        if found.strip():
            return found.strip()
    return None


def _last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{...} whose braces close; of nested ones the inner. '' if there is none."""
    open_braces: list[tuple[bool, int]] = []  # (is it a \boxed?, where its content starts)
    start, last = -1, ""
    for match in re.finditer(r"(\\boxed\s*\{)|\\.|[{}]", text, re.DOTALL):
        if match[1] or match[0] == "{":
            open_braces.append((bool(match[1]), match.end()))
        elif match[0] == "}" and open_braces:
            boxed, begin = open_braces.pop()
            if boxed and begin > start:
                start, last = begin, text[begin : match.start()]
    return last


# -------------------------------------------------------------------------------------------------- comparing answers

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]+)(?:\s+|\s*(?=\\)))?"  # -, and the 1 of 1 1/2 and of 1\frac{1}{2}
    rf"(?:(?P<n>{_DECIMAL})\s*/\s*(?P<d>{_DECIMAL})|\\frac\s*(?:\{{\s*(?P<fs>[+-]?)\s*(?P<fn>{_DECIMAL})\s*\}}\s*"
    rf"\{{\s*(?P<fd>{_DECIMAL})\s*\}}|(?P<sn>[0-9])\s*(?P<sd>[0-9])))\s*(?P<fpercent>%?)"
    rf"|(?P<dsign>[+-]?)\s*(?P<decimal>{_DECIMAL})\s*(?P<percent>%?)"
)
_REWRITES = (
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! $]|\^\s*(?:\\circ|\{\s*\\circ\s*\})|[$€£°]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"[\u2212\u2012\u2013\u2014]"), "-"),
)
_LONGEST_NUMBER = 1000  # characters; anything longer is compared as text, so that time stays linear


def canonical_answer(answer: Any) -> Fraction | str:
    r"""What answers are compared by: an exact Fraction where the text is one number, else the text, tidied.

    Numbers: 42, -3, +7, 1,234, 0.50, .5, 3/4, 1 1/2, 50% (= 1/2), 1e3, \frac{1}{2}, \frac12, 1\frac{1}{2}, each with an
    optional currency or degree sign, $...$, a final full stop or a leading "x =". ASCII digits only. Text is compared
    without white space, capitals, invisible characters, \left, \right, \text{} and thin spaces.

    >>> canonical_answer(r"$\frac{1}{2}$") == canonical_answer("50%") == Fraction(1, 2)
    True
    """
    text = "".join(c for c in str(answer) if unicodedata.category(c) != "Cf")  # direction marks, zero-width joiners
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:! \t\n")
    if re.match(r"[A-Za-z]\s*=[^=]", text):
        text = text.partition("=")[2].strip()
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    value = _value(match) if match else None
    return "".join(text.split()).casefold() if value is None else value


def _value(match: re.Match[str]) -> Fraction | None:
    part = {name: (text or "").replace(",", "") for name, text in match.groupdict().items()}
    if part["decimal"]:
        value = Fraction(part["decimal"])
    else:
        denominator = Fraction(part["d"] or part["fd"] or part["sd"])
        if denominator == 0 or (part["whole"] and part["fs"]):
            return None
        value = Fraction(part["whole"] or 0) + Fraction(part["n"] or part["fn"] or part["sn"]) / denominator
    if [part["sign"] + part["dsign"], part["fs"]].count("-") == 1:  # outside the fraction, or inside its numerator
        value = -value
    return value / 100 if part["percent"] or part["fpercent"] else value


def answers_match(answer: Any, gold: Any) -> bool:
    """Whether two answers are equal as canonical_answer reads them. A missing answer (None) equals nothing.

    >>> answers_match("1,234.0", "1234"), answers_match("1", "12345"), answers_match(None, None)
    (True, False, False)
    """
    return answer is not None and gold is not None and canonical_answer(answer) == canonical_answer(gold)


# ------------------------------------------------------------------------------------------------------------ rewards


def accuracy_reward(prompts: Any, completions: Any, answer: Sequence[Any], **columns: Any) -> Rewards:
    """1 if the marked answer equals the gold one, else 0; None where there is no gold answer. A gold text that marks an
    answer itself (a worked solution with \\boxed{} or ####) is read like a completion."""
    scores: Rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        if gold is None or not str(gold).strip():
            scores.append(None)
        else:
            gold = extract_answer(str(gold)) or gold
            scores.append(float(answers_match(extract_answer(completion_text(completion)), gold)))
    return scores


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(prompts: Any, completions: Any, **columns: Any) -> Rewards:
    """1 if the completion is <think>...</think> <answer>...</answer>, each tag once and nothing around them, else 0."""
    layout = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
    texts = map(completion_text, completions)
    return [float(all(text.count(tag) == 1 for tag in TAGS) and bool(layout.fullmatch(text))) for text in texts]


def tag_count_reward(prompts: Any, completions: Any, **columns: Any) -> Rewards:
    """A quarter for each of the four tags that occurs exactly once: a slope that leads up to format_reward."""
    return [sum(0.25 for tag in TAGS if completion_text(c).count(tag) == 1) for c in completions]


_STEP = re.compile(
    r"^[ \t]{0,8}(?:Step [0-9]{1,9}:|[0-9]{1,9}[.)]|[-*])|\b(?:First|Second|Third|Next|Finally),", re.MULTILINE
)


def reasoning_steps_reward(prompts: Any, completions: Any, **columns: Any) -> Rewards:
    """min(1, steps / 3): numbered or bulleted lines, "Step 1:", "First,", "Next,", "Finally," and the like."""
    return [min(1.0, sum(1 for _ in _STEP.finditer(completion_text(c))) / 3) for c in completions]


def _lengths(completions: Any, completion_ids: Any) -> list[int]:
    """In tokens where these are known (as in any trainer), else in characters."""
    return (
        [len(c) for c in completion_ids]
        if completion_ids is not None
        else [len(completion_text(c)) for c in completions]
    )


def length_reward(
    prompts: Any, completions: Any, answer: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> Rewards:
    """Shorter is better within a group: λ = 1/2 - (len - min)/(max - min), but min(0, λ) for a wrong answer; 0 where all
    are equally long (Kimi k1.5, section 2.3.3). None where there is no gold answer."""
    correct = accuracy_reward(prompts, completions, answer)
    lengths = _lengths(completions, completion_ids)
    scores: Rewards = []
    for _, group in itertools.groupby(range(len(lengths)), key=lambda row: prompts[row]):
        rows = list(group)
        low, high = min(lengths[row] for row in rows), max(lengths[row] for row in rows)
        for row in rows:
            score = 0.5 - (lengths[row] - low) / (high - low) if high > low else 0.0
            scores.append(None if correct[row] is None else score if correct[row] else min(0.0, score))
    return scores


def _run_length(trainer_state: Any, default: int) -> int:
    return getattr(trainer_state, "max_completion_length", default)


def cosine_reward(
    prompts: Any,
    completions: Any,
    answer: Sequence[Any],
    completion_ids: Any = None,
    trainer_state: Any = None,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int | None = None,
    **columns: Any,
) -> Rewards:
    """Correct answers score from max_value_correct (short) down to min_value_correct (at max_len) along half a cosine,
    wrong ones from min_value_wrong (short) up to max_value_wrong (Yeo et al. 2025). None without a gold answer.
    max_len None: the run's max_completion_length, or 1000."""
    max_len = max_len or _run_length(trainer_state, 1000)
    scores: Rewards = []
    lengths = _lengths(completions, completion_ids)
    for correct, length in zip(accuracy_reward(prompts, completions, answer), lengths, strict=True):
        short, long = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
        progress = min(1.0, length / max_len)
        scores.append(None if correct is None else long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress)))
    return scores


def repetition_penalty_reward(
    prompts: Any, completions: Any, ngram_size: int = 3, max_penalty: float = -1.0, **columns: Any
) -> Rewards:
    """max_penalty · (1 - distinct n-grams / n-grams), over lower-case words; 0 for a text too short to hold one."""
    scores: Rewards = []
    for completion in completions:
        words = completion_text(completion).lower().split()
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        scores.append(max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
    return scores


def soft_overlong_penalty(
    prompts: Any,
    completions: Any,
    completion_ids: Any = None,
    trainer_state: Any = None,
    max_completion_len: int | None = None,
    soft_punish_cache: int | None = None,
    **columns: Any,
) -> Rewards:
    """0 up to L - C tokens, then linearly down to -1 at L and beyond (DAPO eq. 13), L = max_completion_len, C =
    soft_punish_cache. None: L is the run's max_completion_length, or 16384, and C a quarter of L."""
    limit = max_completion_len or _run_length(trainer_state, 16384)
    cache = max(1, limit // 4) if soft_punish_cache is None else soft_punish_cache
    scores: Rewards = []
    for length in _lengths(completions, completion_ids):
        over = length - (limit - cache)
        scores.append(0.0 if over <= 0 else -1.0 if over >= cache else -over / cache)
    return scores


REWARDS: dict[str, Callable[..., Any]] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "tag_count": tag_count_reward,
    "reasoning_steps": reasoning_steps_reward,
    "length": length_reward,
    "cosine": cosine_reward,
    "repetition_penalty": repetition_penalty_reward,
    "soft_overlong_penalty": soft_overlong_penalty,
}


def load_reward(spec: str) -> Callable[..., Any]:
    """A reward by name (see REWARDS), or one's own as `path/to/file.py:function` or `package.module:function`.

    ValueError, with the nearest name there is, if it cannot be found. This imports, and so runs, the file named.
    """
    source, colon, function = spec.strip().rpartition(":")
    if not colon:
        name = function if function in REWARDS else function.removesuffix("_reward")
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"rewards: {spec!r} is not known, did you mean {near!r}? (all: {', '.join(REWARDS)})")
        return REWARDS[name]
    try:
        if source.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(found.name, module)  # so that dataclasses and pickles in it find their module
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:
        raise ValueError(f"rewards: {source} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"rewards: {source} has no function {function!r}; it has {', '.join(own) or 'none'}")
    return getattr(module, function)


# ------------------------------------------------------------------------------------------------------ built-in task


def sum_problems(seed: int = 0) -> list[dict[str, Any]]:
    """The demo's data: every sum of three digits, shuffled, as chat prompts with an `answer` column."""
    problems = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}+{c}=?"}], "answer": str(a + b + c)}
        for a, b, c in itertools.product(range(10), repeat=3)
    ]
    random.Random(seed).shuffle(problems)
    return problems


def sum_completion(problem: dict[str, Any], think: bool, answer: int | None = None) -> str:
    """How the demo's model may reply: at once (with any `answer`), or by thinking step by step, which comes out right.

    >>> sum_completion({"prompt": [{"role": "user", "content": "4+7+9=?"}], "answer": "20"}, think=True)
    '<think>4+7=11, 11+9=20</think><answer>20</answer>'
    """
    a, b, c = (int(digit) for digit in problem["prompt"][-1]["content"].removesuffix("=?").split("+"))
    thought = f"<think>{a}+{b}={a + b}, {a + b}+{c}={a + b + c}</think>" if think else ""
    return f"{thought}<answer>{a + b + c if answer is None else answer}</answer>"
