"""Rewards for GRPO: read the answer out of a completion, compare it exactly, score it.

A reward function is called by keyword with `prompts`, `completions` (strings, or lists of chat
messages) and every column of the data as a list, and with completion_ids, trainer_state, log_extra
and log_metric. It returns one float per completion, or None for "not applicable", and may be async.
That is TRL's and open-r1's signature: theirs run here, and ours there if the data has `answer`.

The functions here return for any text, in linear time, and evaluate nothing that a model wrote, but
for math_verify. Most follow open-r1's; but tags need no line breaks, and lengths are in tokens.
"""

import asyncio
import copy
import importlib.util
import inspect
import itertools
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

Rewards = list[float | None]
RUNNER = asyncio.Runner()  # one event loop for all calls: clients and locks are bound to theirs

# ---------------------------------------------------------------------------------- reading answers


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the contents of the assistant's messages."""
    if isinstance(completion, dict) and completion.get("role", "assistant") == "assistant":
        completion = completion.get("content", completion.get("text"))
    if isinstance(completion, str):
        return completion
    return "".join(map(completion_text, completion)) if isinstance(completion, list | tuple) else ""


def extract_answer(text: str) -> str | None:
    r"""The answer that a text marks as its own, or None. Looked for after the last </think>:

    1. the last complete \boxed{...} that is not blank (the innermost, braces balanced)
    2. the last complete <answer>...</answer>
    3. the rest of the line after the last ####, as in GSM8K

    An empty marking is passed over, and so is a thought that never closes. There is no guessing at
    unmarked numbers: with "the last number" as a rule, "I count 12345 ways to fail" is an answer.

    >>> extract_answer(r"<think>\boxed{7}</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    hashed = [after.partition("\n")[0] for after in re.split("(?<!#)####(?!#)", text)[1:]]
    return next(filter(None, map(unwrap, [*_boxed(text), *tagged[::-1], *hashed[::-1]])), None)


def unwrap(text: str) -> str:
    r"""Without the white space, **...**, $...$, \(...\) or \[...\] around it."""
    text = text.strip()
    for left, right in (("**", "**"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right):
            text = text[len(left) : -len(right)].strip()
    return text


def _boxed(text: str) -> Iterator[str]:
    r"""What is in each \boxed{...} that closes, of nested ones the inner; the last one first."""
    boxed = r"(?<!\\)(?:\\\\)*\\boxed"  # but no \\boxed, which is a line break and a word
    alone = r"\s+([+-]?[0-9.,/]*[0-9])(?=[.,;:!?]?(?:\$|[ \t]*$)|[.;:!?]\s)"  # not \boxed 2 \pi
    text = re.sub("(?m)" + boxed + alone, r"\\boxed{\1}", text)
    for content in reversed(re.split(boxed + r"\s*\{", text)[1:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", content):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                yield content[: brace.start()]  # an outer one, cut here, never closes
                break


# ------------------------------------------------ comparing answers (skip the patterns at first)

_REWRITES = [  # notations that do not change the meaning, one after the other
    (r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf))\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)(?:\\[!()[\]]|\$)", ""),
    (r"\\(?:[dtc](frac)|(le|ge|ne)q)(?![A-Za-z])", r"\\\1\2"),  # \dfrac is \frac, \leq is \le
    (r"[\u2212\u2012\u2013\u2014]", "-"),
    (r"\\%|(?<=[0-9])\s*percent\s*$", "%"),
    (r"°|\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
    (r"(?:(?<!\\)\\[ ,;:]|(?<=[\w}])~|\\q?quad(?![A-Za-z])|\s)+", " "),
    (r"(\\[A-Za-z]+) (?![A-Za-z])|(?<![^\W_]|\.) | (?![^\W_]|\.)|(?<=[0-9]) (?=[A-Za-z])", r"\1"),
    (r"(\\frac|\\sqrt(?:\[[^\]]*\])?|[\^_]) ?([0-9A-Za-z])", r"\1{\2}"),  # TeX takes one character
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z])", r"\1{\2}"),
    (r"^([+-]?)10\^", r"\g<1>1\\times10^"),
]
_DECIMAL = r"(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][+-]?[0-9]{1,3})?"  # 12, 12.5, .5, 1e3
_NUMBER = (  # where it stands alone, or alone between brackets and commas
    r"(?:(?<![^(\[{,;&\\])|(?<=n\{.matrix\}))(?<!line\{)(?!(?<=[^\n])0[0-9]|-0,|[+-]?[0-9]+\.000,)"
    r"([+-]?)(?:([0-9]++)(?: |(?=\\)))?"  # the 1 of 1 1/2
    rf"(?:\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}"
    rf"|({_DECIMAL})(?:/({_DECIMAL})|\\(?:times|cdot)10\^\{{(-?[0-9]{{1,3}})\}})?)"
    r"(%?)(?=$|[)\]}](?!_)|[,;&]|\\[\\}]|\\end)"  # 0,05 is none, nor is 1e1 in (1e1)_{16}
)
_UNIT = re.compile(  # up to three words at the end, one of them a plural or known; or a symbol
    r"(?i)(?:\\[ ,;:!]|~|\s)*+(?:\\(?:text|mbox|mathrm(?=\W+[a-z]{2}))\s*\{~?|(?<=\s)|(?=[cm]m\b))"
    r"(?=[a-z/\s]{0,40}(?<![a-z])(?:(?-i:[mghsLJNWV])\s*\}|(?:[ckm]m|kg|ft|lbs?|hrs?|min|sec|mph|"
    r"in|inch|feet|hour|day|year|dollar|people|(?:wo)?men|children|[a-z]{2,}[a-rt-z]s)\b))"
    r"(?![a-z/\s]{0,40}\b(?:(?:in|sec|mm|[a-z])\s+[a-z]|(?-i:MM)|(?:one|two|three|four|five|six|"
    r"ten|seven|eight|nine|eleven|twelve|zero|third|(?!month)[a-z]*th|hal(?:f|ve)|quarter|mil(?!e)|"
    r"pi|[a-z]+(?:teen|tie|ty|illi?one?|illiard)|hundred|thousand|lakh|crore|dozen|score|gross|"
    r"grand|(?:per)?cent(?:age)?|and|or|to|of|out|plus|minus|by|times|over|below|factorial|basis|"
    r"negative|k|root|repeat(?:ing)?|recurring|binary|octal|hex|[bmt]l?n|mio|thou)(?:e?s)?\b))"
    r"\s*[a-z/]+(?:\s+[a-z]{2,}){0,2}\s*\.?\}?(?:\s*\^\s*\{?[23]\}?)?\.?$"
    r"|(?<![^\s+-])(?:\\\$|[€£])|(?:[€£°]|\\\$|\^\s*\{?\s*\\circ\s*\}?)$"
)
_LONGEST = 1000  # characters; anything longer is compared as it stands, so that time stays linear


def canonical_answer(answer: Any) -> Fraction | str:
    r"""The form in which answers are compared: a Fraction if the text is a number, else a text.

    Numbers: 42, -3, 1,234, .5, 3/4, 1 1/2, 50% (= 1/2), 1e3, 2\times10^3, \frac12, 1\frac{1}{2}.
    ASCII digits only. Sets, tuples, intervals and matrices: element by element; sets in any order.
    All else as it stands, but for notations that mean the same. White space counts between letters
    and before a digit. Case counts, but not in yes, no, longer words and choices (B is b).

    >>> canonical_answer(r"$\frac{1}{2}$") == canonical_answer("50%") == Fraction(1, 2)
    True
    """
    text = unwrap(re.sub("[\u200b-\u200f\u202a-\u202e\u2060\ufeff]", "", str(answer)))  # invisible
    if len(text) > _LONGEST:
        return text
    comma = "" if re.search(r"[(\[{]", text) else "|,"  # in brackets it separates elements
    grouped = rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:(?:\{{,\}}|,\\!|\\,{comma})[0-9]{{3}})+(?!,?[0-9])"
    text = re.sub(grouped, lambda match: re.sub("[^0-9]", "", match[0]), text)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    text = re.sub(_NUMBER, _value, re.sub(r"(?<![.\s])\s*\.?[,;:\s]*$", "", text))
    text = re.sub(r"^[({]([^(){}[\],;]+)[)}]$", r"\1", text)  # (B) is B
    word = r"(?<!\\)(?<![^\\]\{)\b(?:(?i:yes|no)|[^\W\d_][^\W\d_A-Z]{3,}|[A-Z]{4,})\b|^[A-DF-HJ]$"
    text = re.sub(word, lambda match: match[0].lower(), text)
    ordered = lambda match: ",".join(sorted(re.split(r",(?![^(]*\))(?![^{]*\})", match[1])))
    flat = r"(?:[^{}[\]();\\]|\\[A-Za-z]++|\{[^{}]*\}|\([^()]*\))*"  # no sets of sets
    text = re.sub(rf"(?<=\\\{{)(?!.*(?:\.\.|…|dots|[:|]|mid))({flat})(?=\\\}})", ordered, text)
    return Fraction(text) if re.fullmatch("-?[0-9]+(?:/[1-9][0-9]*)?", text) else text


def _value(match: re.Match[str]) -> str:
    """The number in a match of _NUMBER as a fraction in lowest terms; the text where it is none."""
    sign, whole, above, below, n, d, power, percent = match.groups()
    top, bottom = above or n, Fraction(below or d or 1)
    value = bottom and Fraction(top) * Fraction(10) ** int(power or 0) / bottom
    mixed = (below or d) and top[0] != "0" and (above or len(top) != 3) and 0 < value < 1
    if not bottom or (whole and not mixed):
        return match[0]  # 1 200/300 may be 1200/300: it stays text, as 1/0 does
    value = (int(whole or 0) + value) / (100 if percent else 1)
    return str(-value if sign == "-" else value)


def answers_match(answer: Any, gold: Any) -> bool:
    """Whether two answers are surely equal, by canonical_answer. None equals nothing. A leading
    "x =", or a unit after a number, counts only if both have one. A $ alone is a unit.

    >>> answers_match("1,234.0", "1234"), answers_match("1", "12345"), answers_match(None, None)
    (True, False, False)
    """
    if answer is None or gold is None:
        return False
    named = r"(?s)^(?:(\\(?!not|[lg]eq?|approx)[A-Za-z]+|[A-Za-z])\s*=(?=[^=]+$))?(.*)"  # x, and 5
    dollar = lambda t: re.sub(r"^((?:.*=\s*)?[+-]?[0-9.,]*)\$(?=[^$]*$)", r"\1\\$", unwrap(str(t)))
    (x, a), (y, b) = (re.findall(named, dollar(text))[0] for text in (answer, gold))
    if x and y and x != y:
        return False
    if max(len(a), len(b)) <= _LONGEST:
        numbers = [canonical_answer(_UNIT.sub("", value)) for value in (a, b)]
        if isinstance(numbers[0], Fraction) and numbers[0] == numbers[1]:
            units = [canonical_answer("".join(_UNIT.findall(value))) for value in (a, b)]
            return units[0] == units[1] or "" in units
    return canonical_answer(a) == canonical_answer(b)


# ------------------------------------------------------------------------------------------ rewards


def accuracy_reward(prompts, completions, answer, **columns) -> Rewards:
    """1 if the marked answer equals the gold one, else 0; None where there is no gold answer."""
    found = [extract_answer(completion_text(completion)) for completion in completions]
    pairs = zip(found, map(gold_answer, answer), strict=True)
    return [None if gold is None else float(answers_match(text, gold)) for text, gold in pairs]


def gold_answer(gold: Any) -> Any:
    r"""The gold answer in a field of the data, None where that is empty or NaN. A list of one is
    that one. A text that marks its answer (as in extract_answer) is read like a completion."""
    gold = gold.tolist() if hasattr(gold, "tolist") else gold  # an array of NumPy, a tensor
    gold = gold[0] if isinstance(gold, list | tuple) and len(gold) == 1 else gold
    missing = gold is None or str(gold).strip("[] \n\t") in ("", "<NA>") or gold != gold
    return None if missing else extract_answer(str(gold)) or gold


def math_verify_reward(prompts, completions, answer, **columns) -> Rewards:
    """accuracy_reward by the library math-verify, as in TRL: it knows symbolic mathematics, and may
    take 10 s to parse, and to compare. None for a gold it cannot parse; bare TeX gets its $."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    limit = 10 if threading.current_thread() is threading.main_thread() else None  # it sets alarms
    latex = LatexExtractionConfig(False, 0, NormalizationConfig(units=True))
    read = lambda text: parse(text, [latex], extraction_mode="first_match", parsing_timeout=limit)
    found = [read(completion_text(completion)) for completion in completions]
    whole = re.compile(r"\$|\\[(\[]|(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")  # marked, or prose
    tex = lambda gold: str(gold) if gold is None or whole.search(str(gold)) else f"${gold}$"
    golds = [parse(tex(gold_answer(gold)), parsing_timeout=limit) for gold in answer]
    pairs = zip(golds, found, strict=True)
    return [float(verify(g, f, timeout_seconds=limit)) if g else None for g, f in pairs]


OPENED = re.compile(r"(?:<think>\s*(?:</think>\s*)?|<answer>\s*)?\Z")  # ends a prompt
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(prompts, completions, **columns) -> Rewards:
    """1 for <think>...</think> <answer>...</answer>, each tag once, nothing around them; else 0."""
    layout = re.compile(r"(?s)\s*<think>.*</think>\s*<answer>.*</answer>\s*")  # slow if tags repeat
    fits = lambda text: all(text.count(tag) == 1 for tag in TAGS) and layout.fullmatch(text)
    return [float(bool(fits(completion_text(c)))) for c in completions]


def tag_count_reward(prompts, completions, **columns) -> Rewards:
    """1/4 for each of the four tags that occurs exactly once: a slope up to format_reward."""
    return [sum(0.25 for tag in TAGS if completion_text(c).count(tag) == 1) for c in completions]


def reasoning_steps_reward(prompts, completions, **columns) -> Rewards:
    """min(1, steps / 3). Steps: numbered or bulleted lines, "Step 1:", "First,", "Next," ..."""
    line = r"^[ \t]{0,8}(?:Step [0-9]{1,9}:|[0-9]{1,9}[.)]|[-*])"
    step = re.compile(line + r"|\b(?:First|Second|Third|Next|Finally),", re.MULTILINE)
    return [min(1.0, len(step.findall(completion_text(c))) / 3) for c in completions]


def _lengths(completions: Any, completion_ids: Any) -> list[int]:
    """In tokens where these are known (as in any trainer), else in characters."""
    return list(map(len, completion_ids or map(completion_text, completions)))


def length_reward(prompts, completions, answer, completion_ids=None, **columns) -> Rewards:
    """Shorter is better in a group (adjacent equal prompts): λ = 1/2 - (len - min)/(max - min),
    min(0, λ) if wrong. 0 if all have one length; None without a gold answer. (Kimi k1.5, 2.3.3)"""
    scores: list[float] = []
    rows = zip(prompts, _lengths(completions, completion_ids), strict=True)
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        _, lengths = zip(*group, strict=True)
        low, high = min(lengths), max(lengths)
        scores += [0.5 - (n - low) / (high - low) if high > low else 0.0 for n in lengths]
    pairs = zip(accuracy_reward(prompts, completions, answer), scores, strict=True)
    return [None if ok is None else score if ok else min(0.0, score) for ok, score in pairs]


def cosine_reward(
    prompts, completions, answer, completion_ids=None, trainer_state=None, min_value_wrong=-1.0,
    max_value_wrong=-0.5, min_value_correct=0.5, max_value_correct=1.0, max_len=None, **columns,
) -> Rewards:  # fmt: skip
    """Half a cosine over the length, up to max_len (None: the run's, or 1000): right answers score
    from max_value_correct down to min_value_correct, wrong ones from min_value_wrong up to
    max_value_wrong (Yeo et al. 2025). None without a gold answer."""
    longest: Any = max_len or getattr(trainer_state, "max_completion_length", 1000)
    lengths = _lengths(completions, completion_ids)
    wave = [(1 + math.cos(math.pi * min(1.0, n / longest))) / 2 for n in lengths]  # from 1 to 0
    right = lambda w: min_value_correct + (max_value_correct - min_value_correct) * w
    wrong = lambda w: max_value_wrong + (min_value_wrong - max_value_wrong) * w
    pairs = zip(accuracy_reward(prompts, completions, answer), wave, strict=True)
    return [None if ok is None else right(w) if ok else wrong(w) for ok, w in pairs]


def repetition_penalty_reward(
    prompts, completions, ngram_size=3, max_penalty=-1.0, **columns
) -> Rewards:
    """max_penalty · (1 - distinct n-grams / n-grams), over lower-case words; 0 if none."""
    words = [completion_text(completion).lower().split() for completion in completions]
    ngrams = [list(zip(*(w[i:] for i in range(ngram_size)), strict=False)) for w in words]
    return [max_penalty * (1 - len(set(n)) / len(n)) if n else 0.0 for n in ngrams]


def soft_overlong_penalty(
    prompts, completions, completion_ids=None, trainer_state=None, max_completion_len=None,
    soft_punish_cache=None, **columns,
) -> Rewards:  # fmt: skip
    """0 up to L - C tokens, then linearly down to -1 at L and beyond (DAPO eq. 13). L is
    max_completion_len (None: the run's, or 16384), C soft_punish_cache (None: a quarter of L)."""
    limit: Any = max_completion_len or getattr(trainer_state, "max_completion_length", 16384)
    cache = max(1, limit // 4) if soft_punish_cache is None else soft_punish_cache
    over = [length - (limit - cache) for length in _lengths(completions, completion_ids)]
    return [0.0 if n <= 0 else -1.0 if n >= cache else -n / cache for n in over]


REWARDS: dict[str, Callable[..., Any]] = {f.__name__.removesuffix("_reward"): f for f in (
    accuracy_reward, math_verify_reward, format_reward, tag_count_reward, reasoning_steps_reward,
    length_reward, cosine_reward, repetition_penalty_reward, soft_overlong_penalty,
)}  # fmt: skip

# ------------------------------------------------------------------------- calling reward functions


class RewardError(RuntimeError):
    """A reward function failed, or returned what cannot be used. The message names it."""


def reward_function(reward: Any) -> Callable[..., Any]:
    """A reward function, by its name in REWARDS or itself."""
    if not isinstance(reward, str):
        return reward
    name = reward.removesuffix("_reward")
    if name not in REWARDS:
        raise ValueError(f"rewards: {reward!r} is unknown (all: {', '.join(REWARDS)})")
    if name == "math_verify" and not importlib.util.find_spec(name):
        raise ValueError("rewards: math_verify needs: pip install math-verify[antlr4_13_2]")
    return REWARDS[name]


def reward_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def check_row(function: Callable[..., Any], row: Any) -> None:
    """Raises ValueError for a row that lacks what `function` asks for, or no answer can match."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    given |= {"answer"} if "solution" in row else set()
    try:
        inspect.signature(function).bind(**dict.fromkeys(sorted(given | row.keys() - {"prompt"})))
    except TypeError as error:
        what = f"reward {reward_name(function)}: {error}"
        raise ValueError(f"{what}; the row has {', '.join(row)}") from None
    if inspect.unwrap(function) in (accuracy_reward, length_reward, cosine_reward):
        raw = row.get("solution") if gold_answer(row.get("answer")) is None else row["answer"]
        gold, marked = gold_answer(raw), extract_answer(str(raw))
        words = 0 if marked else len(re.findall(r"(?<![\\{A-Za-z])[A-Za-z]{2,}", str(gold)))
        prose = words > 7 and re.search(r"[a-z0-9)][.!?]\s+[A-Z]", str(gold))  # not a long title
        if prose or words > 15 or isinstance(gold, list | tuple | dict | set | bytes):
            what = f"no completion can match the gold answer {gold!s:.60}"
            raise ValueError(f"{what}: give the answer alone, or mark it with \\boxed{{}} or ####")


def call_rewards(
    functions: Sequence[Callable[..., Any]], rows: Any, texts: list[str], ids: Any, **given: Any
) -> tuple[list[list[float]], dict[str, list[Any]]]:
    """Every function's scores of the completions, NaN for None, and what they log with log_extra.
    rows: each completion's row of the data. `solution` serves as `answer` where that is missing."""
    extra: dict[str, list[Any]] = {}
    lacks = lambda row: "solution" in row and gold_answer(row.get("answer")) is None
    rows = [{**row, "answer": row["solution"]} if lacks(row) else row for row in rows]
    columns: Any = {n: [row.get(n) for row in rows] for n in dict.fromkeys(itertools.chain(*rows))}
    prompts = columns.pop("prompt")
    chat = lambda text: [{"role": "assistant", "content": text}]
    replies = [t if isinstance(p, str) else chat(t) for p, t in zip(prompts, texts, strict=True)]
    columns |= {"prompts": prompts, "completions": replies, "completion_ids": ids}
    given["log_extra"] = lambda column, values: extra.__setitem__(str(column), list(values))
    scores: list[list[float]] = []
    for function in functions:
        name = reward_name(function)
        try:  # each gets lists of its own, as it may change what it gets
            given_scores = finish(function(**copy.deepcopy(columns), **given))
            scores.append([math.nan if score is None else float(score) for score in given_scores])
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
        if len(scores[-1]) != len(rows):
            raise RewardError(f"reward {name} gave {len(scores[-1])} values for {len(rows)} rows")
        if any(map(math.isinf, scores[-1])):
            raise RewardError(f"reward {name} returned an infinite value; None is 'not applicable'")
    for name, values in extra.items():
        if len(values) != len(rows):
            raise RewardError(f"log_extra({name!r}): {len(values)} values for {len(rows)} rows")
    return scores, extra


def finish(scores: Any) -> list[Any]:
    """Scores as a list: awaited if they are a coroutine, worked out if they are lazy."""
    if inspect.iscoroutine(scores):  # in its own thread: a notebook's runs a loop already
        scores = ThreadPoolExecutor(1).submit(RUNNER.run, scores).result()
    return [scores] if isinstance(scores, dict | str) else list(scores)  # not keys, letters
