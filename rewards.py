"""Rewards for GRPO: read the answer out of a completion, compare it exactly, score it.

A reward function is called by keyword with `prompts`, `completions` and every column of the data as
a list. It returns one float per completion, or None for "not applicable". That is TRL's and
open-r1's signature: theirs run here unchanged, and these run there. Completions are strings, or
lists of chat messages. The trainer also passes completion_ids, trainer_state, log_extra and
log_metric. `async def` is fine.

The functions here return for any text, in time linear in its length. They evaluate nothing that a
model wrote. They follow open-r1 (github.com/huggingface/open-r1, src/open_r1/rewards.py), but for:

    accuracy_reward         exact fractions; no LaTeX parser reads model text
    format_reward           any white space may separate the tags; nothing may follow the answer
    tag_count_reward        a tag counts with or without the line breaks around it
    reasoning_steps_reward  numbered lines count anywhere in the text
    length_reward           compares within the group of one prompt, in tokens
    cosine_reward           is flat beyond max_len, and counts tokens
    soft_overlong_penalty   takes its length from the run, unless told
"""

import asyncio
import inspect
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

Rewards = list[float | None]

# ---------------------------------------------------------------------------------- reading answers


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, dict):
        return completion_text(completion.get("content", completion.get("text", "")))
    return "".join(map(completion_text, completion)) if isinstance(completion, list | tuple) else ""


def extract_answer(text: str) -> str | None:
    r"""The answer that a text marks as its own, or None. Looked for after the last </think>:

    1. the last complete \boxed{...} (the innermost, braces balanced)
    2. the last complete <answer>...</answer>
    3. the rest of the line after the last ####, as in GSM8K

    An empty marking is passed over. There is no guessing at unmarked numbers: with "the last
    number" as a rule, "I count 12345 ways to fail" is an answer.

    >>> extract_answer(r"<think>\boxed{7}</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = text.rpartition("</think>")[2]
    before, closing, _ = text.rpartition("</answer>")
    _, opening, tagged = before.rpartition("<answer>")
    hashed = text.rpartition("####")[2] if "####" in text else ""
    for found in (
        _last_boxed(text),
        tagged if opening and closing else "",
        hashed.lstrip(" \t").partition("\n")[0],
    ):
        if found.strip():
            return found.strip()
    return None


def _last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{...} whose braces close; of nested ones the inner; or ''."""
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


# -------------------------------------------------------------------------------- comparing answers

_DECIMAL = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"  # 1,234.5 12.5 .5
    r"(?:[eE][+-]?[0-9]{1,3})?"
)
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]+)(?:\s+|\s*(?=\\)))?"  # the 1 of 1 1/2, 1\frac{1}{2}
    rf"(?:(?P<n>{_DECIMAL})\s*/\s*(?P<d>{_DECIMAL})"
    rf"|\\frac\s*(?:\{{\s*(?P<fs>[+-]?)\s*(?P<fn>{_DECIMAL})\s*\}}\s*"
    rf"\{{\s*(?P<fd>{_DECIMAL})\s*\}}|(?P<sn>[0-9])\s*(?P<sd>[0-9])))\s*(?P<fpercent>%?)"
    rf"|(?P<dsign>[+-]?)\s*(?P<decimal>{_DECIMAL})\s*(?P<percent>%?)"
)
_REWRITES = (
    (
        re.compile(
            r"\\(?:left|right)(?![A-Za-z])|\\[,;:! $]|\^\s*(?:\\circ|\{\s*\\circ\s*\})|[$€£°]"
        ),
        "",
    ),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"[\u2212\u2012\u2013\u2014]"), "-"),
)
_LONGEST_NUMBER = 1000  # characters; anything longer is compared as text, so that time stays linear


def canonical_answer(answer: Any) -> Fraction | str:
    r"""What answers are compared by: an exact Fraction if the text is a number, else tidied text.

    Numbers: 42, -3, +7, 1,234, 0.50, .5, 3/4, 1 1/2, 50% (= 1/2), 1e3, \frac{1}{2}, \frac12,
    1\frac{1}{2}, each with an optional currency or degree sign, $...$, a final full stop or a
    leading "x =". ASCII digits only. Text is compared without white space, capitals, invisible
    characters, \left, \right, \text{} and thin spaces.

    >>> canonical_answer(r"$\frac{1}{2}$") == canonical_answer("50%") == Fraction(1, 2)
    True
    """
    visible = lambda c: unicodedata.category(c) != "Cf"  # no direction marks, no joiners
    text = "".join(filter(visible, str(answer)))
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
        fraction = Fraction(part["n"] or part["fn"] or part["sn"]) / denominator
        value = Fraction(part["whole"] or 0) + fraction
    # a minus stands before the fraction or in its numerator; two of them cancel
    if [part["sign"] + part["dsign"], part["fs"]].count("-") == 1:
        value = -value
    return value / 100 if part["percent"] or part["fpercent"] else value


def answers_match(answer: Any, gold: Any) -> bool:
    """Whether two answers are equal as canonical_answer reads them. None equals nothing.

    >>> answers_match("1,234.0", "1234"), answers_match("1", "12345"), answers_match(None, None)
    (True, False, False)
    """
    return (
        answer is not None
        and gold is not None
        and canonical_answer(answer) == canonical_answer(gold)
    )


# ------------------------------------------------------------------------------------------ rewards


def accuracy_reward(
    prompts: Any, completions: Any, answer: Sequence[Any], **columns: Any
) -> Rewards:
    """1 if the marked answer equals the gold one, else 0; None where there is no gold answer.

    A gold text that marks an answer (a solution with \\boxed{} or ####) is read like a completion.
    """
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
    """1 for <think>...</think> <answer>...</answer>, each tag once, nothing around them; else 0."""
    layout = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
    texts = map(completion_text, completions)
    return [
        float(all(text.count(tag) == 1 for tag in TAGS) and bool(layout.fullmatch(text)))
        for text in texts
    ]


def tag_count_reward(prompts: Any, completions: Any, **columns: Any) -> Rewards:
    """1/4 for each of the four tags that occurs exactly once: a slope up to format_reward."""
    return [sum(0.25 for tag in TAGS if completion_text(c).count(tag) == 1) for c in completions]


_STEP = re.compile(
    r"^[ \t]{0,8}(?:Step [0-9]{1,9}:|[0-9]{1,9}[.)]|[-*])|\b(?:First|Second|Third|Next|Finally),",
    re.MULTILINE,
)


def reasoning_steps_reward(prompts: Any, completions: Any, **columns: Any) -> Rewards:
    """min(1, steps / 3). Steps: numbered or bulleted lines, "Step 1:", "First,", "Next," ..."""
    return [min(1.0, sum(1 for _ in _STEP.finditer(completion_text(c))) / 3) for c in completions]


def _lengths(completions: Any, completion_ids: Any) -> list[int]:
    """In tokens where these are known (as in any trainer), else in characters."""
    return list(map(len, completion_ids or map(completion_text, completions)))


def length_reward(
    prompts: Any, completions: Any, answer: Sequence[Any], completion_ids: Any = None,
    **columns: Any,
) -> Rewards:  # fmt: skip
    """Shorter is better within a group: λ = 1/2 - (len - min)/(max - min); min(0, λ) if wrong.

    0 where all are equally long; None where there is no gold answer. (Kimi k1.5, section 2.3.3)
    """
    correct = accuracy_reward(prompts, completions, answer)
    lengths = _lengths(completions, completion_ids)
    scores: Rewards = []
    for _, group in itertools.groupby(range(len(lengths)), key=lambda row: prompts[row]):
        rows = list(group)
        low, high = min(lengths[row] for row in rows), max(lengths[row] for row in rows)
        for row in rows:
            score = 0.5 - (lengths[row] - low) / (high - low) if high > low else 0.0
            scores.append(
                None if correct[row] is None else score if correct[row] else min(0.0, score)
            )
    return scores


def cosine_reward(
    prompts: Any, completions: Any, answer: Sequence[Any], completion_ids: Any = None,
    trainer_state: Any = None, min_value_wrong: float = -1.0, max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5, max_value_correct: float = 1.0, max_len: int | None = None,
    **columns: Any,
) -> Rewards:  # fmt: skip
    """Half a cosine over the length, up to max_len: right answers score from max_value_correct down
    to min_value_correct, wrong ones from min_value_wrong up to max_value_wrong (Yeo et al. 2025).

    None without a gold answer. max_len None: the run's max_completion_length, or 1000.
    """
    longest: Any = max_len or getattr(trainer_state, "max_completion_length", 1000)
    scores: Rewards = []
    lengths = _lengths(completions, completion_ids)
    for correct, length in zip(accuracy_reward(prompts, completions, answer), lengths, strict=True):
        right, wrong = (max_value_correct, min_value_correct), (min_value_wrong, max_value_wrong)
        short, long = right if correct else wrong
        progress = min(1.0, length / longest)
        score = long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress))
        scores.append(None if correct is None else score)
    return scores


def repetition_penalty_reward(
    prompts: Any, completions: Any, ngram_size: int = 3, max_penalty: float = -1.0, **columns: Any
) -> Rewards:
    """max_penalty · (1 - distinct n-grams / n-grams), over lower-case words; 0 if none."""
    scores: Rewards = []
    for completion in completions:
        words = completion_text(completion).lower().split()
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        scores.append(max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
    return scores


def soft_overlong_penalty(
    prompts: Any, completions: Any, completion_ids: Any = None, trainer_state: Any = None,
    max_completion_len: int | None = None, soft_punish_cache: int | None = None, **columns: Any,
) -> Rewards:  # fmt: skip
    """0 up to L - C tokens, then linearly down to -1 at L and beyond (DAPO eq. 13).

    L is max_completion_len (None: the run's max_completion_length, or 16384), C is
    soft_punish_cache (None: a quarter of L).
    """
    limit: Any = max_completion_len or getattr(trainer_state, "max_completion_length", 16384)
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


# ------------------------------------------------------------------------- calling reward functions


class RewardError(RuntimeError):
    """A reward function failed, or returned what cannot be used. The message names it."""


def reward_function(reward: Any) -> Callable[..., Any]:
    """A reward function, by its name in REWARDS or itself."""
    if isinstance(reward, str) and reward.removesuffix("_reward") not in REWARDS:
        raise ValueError(f"rewards: {reward!r} is unknown (all: {', '.join(REWARDS)})")
    return REWARDS[reward.removesuffix("_reward")] if isinstance(reward, str) else reward


def reward_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def call_rewards(
    functions: Sequence[Callable[..., Any]], rows: Any, texts: list[str], ids: Any, **given: Any
) -> tuple[list[Rewards], dict[str, list[Any]]]:
    """Every function's scores of the completions, and what they logged of each with log_extra.

    rows: the data's row of each completion. `solution` serves as `answer` where that is missing.
    """
    names, extra = dict.fromkeys(name for row in rows for name in row), dict[str, list[Any]]()
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    if "solution" in columns:
        columns["answer"] = [row.get("answer", row.get("solution")) for row in rows]
    prompts = columns["prompts"] = columns.pop("prompt")
    chat = lambda text: [{"role": "assistant", "content": text}]
    pairs = zip(prompts, texts, strict=True)
    columns["completions"] = [t if isinstance(prompt, str) else chat(t) for prompt, t in pairs]
    columns |= {"completion_ids": ids, "log_extra": extra.__setitem__, **given}
    scores = [call_reward(function, len(rows), columns) for function in functions]
    for name, values in extra.items():
        if len(values) != len(rows):
            counts = f"{len(values)} values for {len(rows)} completions"
            raise RewardError(f"log_extra({name!r}): {counts}")
    return scores, extra


def call_reward(function: Callable[..., Any], count: int, columns: dict[str, Any]) -> Rewards:
    """The scores of `count` completions. Raises RewardError, naming the function."""
    name = reward_name(function)
    try:
        scores = [None if s is None else float(s) for s in finish(function(**columns))]
    except Exception as error:
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
    if len(scores) != count:
        counts = f"{len(scores)} values for {count} completions; one each is needed"
        raise RewardError(f"reward {name} returned {counts}")
    if any(score is not None and math.isinf(score) for score in scores):
        raise RewardError(f"reward {name} returned an infinite value; use None if not applicable")
    return [None if score is None or math.isnan(score) else score for score in scores]


def finish(scores: Any) -> list[Any]:
    """Scores as a list: awaited if they are a coroutine, worked out if they are lazy."""
    if inspect.iscoroutine(scores):  # in a thread of its own: a notebook's has a running loop
        with ThreadPoolExecutor(1) as thread:
            scores = thread.submit(asyncio.run, scores).result()
    return list(scores)
