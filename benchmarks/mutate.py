"""Mutation testing: change the code in one small way at a time, and see whether a test notices.

    python benchmarks/mutate.py [--every N] [--only lora.py]     # writes benchmarks/mutations.json
    python benchmarks/mutate.py --resume     # only those that mutations.json does not have yet
    python benchmarks/mutate.py --again      # judge again what survived and has no reason
    python benchmarks/mutate.py --list       # only say how many mutants there are

A mutant differs from the code in one of these: a comparison, an arithmetic or a Boolean operator is
exchanged; `not` or a minus is dropped; the two values of a conditional expression are exchanged; a
number grows by one; True becomes False; a call, an augmented assignment or a raise is deleted; a
keyword argument is dropped; two neighbouring positional arguments, names or attributes, are
swapped.

Left out are annotations, decorators, texts, error messages, the defaults of settings, and what
changes nothing by construction (see SAME).

pytest collects the tests once. One pass over them notes which lines of the code each of them
reaches. Then each mutant gets a forked process: there it is executed in the place of its module,
and all modules that import it are executed again. The process runs the tests that reach the
changed line, quickest first, until one fails. That test killed the mutant. One that takes far
longer than usual kills it too. A line that runs on import is judged by all tests. What survives
either has a reason in EQUIVALENT, or is a gap in the tests.
"""

import argparse
import ast
import collections
import contextlib
import copy
import itertools
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HYPOTHESIS_PROFILE"] = "gallery"  # the same examples each time, and no shrinking
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
import torch  # noqa: E402

TOP = ["test_math.py", "test_training.py", "checks/test_trainer.py"]
JUDGED = {  # file -> the tests that judge it
    "lora.py": [*TOP, "checks/test_quantised.py"],
    "rewards.py": [*TOP, "checks/test_runner.py", "checks/test_parity_trl.py"],
    "grpo_lora.py": [
        *TOP,
        "checks/test_runner.py",
        "checks/test_settings.py",
        "checks/test_families.py",
        "checks/test_parity_peft.py",
        "checks/test_parity_trl.py",
    ],
    "runner/fast.py": [*TOP, "checks/test_engine.py"],
    "runner/checkpoints.py": [*TOP, "checks/test_runner.py"],
}
SLOW = ("killed", "hangs", "tuning", "time_linear")  # words in tests' names

# ---------------------------------------------------------------------------------------- mutants

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SAME = {  # arguments that change nothing on this machine, or only words
    "strict", "encoding", "device", "help", "why", "stacklevel", "file", "flush",
}  # fmt: skip
SYMMETRIC = {"max", "min", "equal", "promote_types", "isinstance", "issubclass"}  # or fail at once


class Mutant(NamedTuple):
    """One change: of `tree`, the file's syntax, set `field` of `parent` to `new`."""

    about: dict[str, Any]  # file, source line, was, is; and nth, if there are several such
    tree: ast.Module
    parent: ast.AST
    field: str
    new: Any
    lines: set[int]  # the statement's; a test that reaches none of them cannot notice
    body: set[int]  # the outermost function's or class's
    on_import: bool

    @property
    def key(self) -> tuple:
        return tuple(self.about.get(name) for name in ("file", "source", "was", "is", "nth"))


def other_nodes(node: ast.AST) -> list[ast.AST]:
    """What a node may turn into."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        return [ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)]
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        other = copy.copy(node)
        other.op = SWAPS[type(node.op)]()
        return [other]
    if isinstance(node, ast.AugAssign):
        other = copy.copy(node)
        other.op = SWAPS.get(type(node.op), ast.Mult)()
        return [other, ast.Pass()]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        return [ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)]
    if isinstance(node, ast.IfExp):
        return [ast.IfExp(node.test, node.orelse, node.body)]
    deleted = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return [ast.Pass()] if deleted or isinstance(node, ast.Raise) else []


def other_arguments(call: ast.Call) -> Iterator[tuple[str, list, ast.AST, str, str]]:
    """(field, its new value, where, was, is) for a dropped keyword, and for swapped arguments."""
    for i, keyword in enumerate(call.keywords):
        if keyword.arg not in SAME:
            rest = call.keywords[:i] + call.keywords[i + 1 :]
            yield "keywords", rest, keyword, ast.unparse(keyword), "dropped"
    named = [isinstance(x, ast.Name | ast.Attribute) for x in call.args]
    for i, (a, b) in enumerate(zip(call.args, call.args[1:], strict=False)):
        words = ast.unparse(a), ast.unparse(b)
        symmetric = ast.unparse(call.func).rpartition(".")[2] in SYMMETRIC
        if named[i] and named[i + 1] and words[0] != words[1] and not symmetric:
            swapped = [*call.args[:i], b, a, *call.args[i + 2 :]]
            yield "args", swapped, a, ", ".join(words), ", ".join(reversed(words))


def left_out(parent: ast.AST, field: str, child: Any) -> bool:
    """Whether nothing in `child` is to be changed."""
    if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom):
        return True
    if isinstance(parent, ast.Call) and ast.unparse(parent.func) == "setting":
        return field == "args"  # a default, and its help
    if isinstance(child, ast.keyword) and child.arg in SAME:
        return True
    if isinstance(parent, ast.keyword) and parent.arg == "dim":  # -1 of two dimensions is 1
        return True
    if isinstance(child, ast.If) and "__main__" in ast.unparse(child.test):
        return True
    words = isinstance(child, ast.JoinedStr) or isinstance(parent, ast.Raise)
    return words or field in ("annotation", "returns", "decorator_list")


def changes(node: ast.AST, around: tuple = ()) -> Iterator[tuple]:
    """(parent, field, new, where, was, is, the statements around it) for each mutant below node."""
    if isinstance(node, ast.stmt):
        around = (*around, node)
    if isinstance(node, ast.Call):
        for change in other_arguments(node):
            yield node, *change, around
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if left_out(node, field, child):
                continue
            inside = (*around, child) if isinstance(child, ast.stmt) else around
            for new in other_nodes(child):
                whole = [*value[:i], new, *value[i + 1 :]] if isinstance(value, list) else new
                yield node, field, whole, child, ast.unparse(child), ast.unparse(new), inside
            yield from changes(child, around)


def mutants(file: str) -> Iterator[Mutant]:
    source = (ROOT / file).read_text(encoding="utf-8")
    tree, seen = ast.parse(source), collections.Counter()
    for parent, field, new, where, was, now, around in changes(tree):
        line = source.splitlines()[where.lineno - 1].partition("  # ")[0].strip()
        about = {"file": file, "source": line, "was": was, "is": now}
        seen[line, was, now] += 1
        if seen[line, was, now] > 1:
            about["nth"] = seen[line, was, now]
        functions = [i for i, s in enumerate(around) if isinstance(s, ast.FunctionDef)]
        on_import = not functions or functions[0] == len(around) - 1
        inner, outer = around[-1], around[0]
        # of a compound statement only its head: the body has statements of its own
        first = inner.body[0].lineno - 1 if getattr(inner, "body", None) else inner.end_lineno
        lines = set(range(inner.lineno, max(first, inner.lineno) + 1))
        body = set(range(outer.lineno, outer.end_lineno + 1))
        yield Mutant(about, tree, parent, field, new, lines, body, on_import)


# ---------------------------------------------------------------------------------- equivalent ones

EDGE = "the two differ only where the numbers are equal, and there both ways give the same"
ZERO = "the two differ only where A = 0, and there everything that it multiplies is 0"
PROCESSES = "checks/test_processes.py notices; its processes load the project anew"
# fmt: off
EQUIVALENT = {  # (source line without its comment, was, is) -> why nothing can notice
    ("nn.init.kaiming_uniform_(A, a=math.sqrt(5))",
     "nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "pass"):
        "nn.Linear has just drawn A from the same distribution; the line is there to be read",
    ("dropout = self.lora_dropout.training and self.lora_dropout.p > 0",
     "self.lora_dropout.p > 0", "self.lora_dropout.p >= 0"): "dropout of nothing changes nothing",
    ("dropout = self.lora_dropout.training and self.lora_dropout.p > 0",
     "self.lora_dropout.training and self.lora_dropout.p > 0",
     "self.lora_dropout.training or self.lora_dropout.p > 0"): "dropout does nothing in eval mode",
    ("U, S, Vh = torch.linalg.svd(W.to(A.dtype), full_matrices=False)",
     "False", "True"): "only the first r vectors are used",
    ("U, S, Vh = torch.linalg.svd(W.to(A.dtype), full_matrices=False)",
     "full_matrices=False", "dropped"): "only the first r vectors are used",
    ("for key, value in module.state_dict(keep_vars=True).items():",
     "True", "False"): "what is written and copied is the same",
    ("for key, value in module.state_dict(keep_vars=True).items():",
     "keep_vars=True", "dropped"): "what is written and copied is the same",
    ('text = json.dumps(config, indent=2, default=lambda x: x.item()) + "\\n"',
     "2", "3"): "how a file is indented",
    ('text = json.dumps(config, indent=2, default=lambda x: x.item()) + "\\n"',
     "indent=2", "dropped"): "how a file is indented",
    ('with naming(f"{file}: cannot be read as JSON", OSError, ValueError):',
     "OSError, ValueError", "ValueError, OSError"): "the order of kinds",
    ('with naming(f"{file}: cannot be read as a safetensors file", OSError, SafetensorError):',
     "OSError, SafetensorError", "SafetensorError, OSError"): "the order of kinds",
    ("near = difflib.get_close_matches(str(value), names, 1)", "1", "2"): "only the first is named",
    ("return [None if gold is None else float(answers_match(text, gold)) for text, gold in pairs]",
     "text, gold", "gold, text"): "the comparison is symmetric, which a test shows",
    ('words = 0 if marked else len(re.findall(r"(?<![\\\\{A-Za-z])[A-Za-z]{2,}", str(gold)))',
     "0", "1"): "any small number will do",
    ("scores = ThreadPoolExecutor(1).submit(RUNNER.run, scores).result()",
     "1", "2"): "one thread is used",
    ("if layers or 2 * trained < sum(p.numel() for p in model.parameters()):",
     "2 * trained < sum((p.numel() for p in model.parameters()))",
     "2 * trained <= sum((p.numel() for p in model.parameters()))"): "exactly half: as you like",
    ("if left < len(rows) * lm.drop_below:", "len(rows) * lm.drop_below",
     "len(rows) / lm.drop_below"): "it changes only the speed",
    ("self, save_steps: int = 50, save_total_limit: int | None = 2, resume: bool = False",
     "50", "51"): "a default",
    ("sample = whole.detach().flatten()[:: p.numel() // 32 + 1].tolist()",
     "32", "33"): "how many numbers of each tensor",
    ("sample = whole.detach().flatten()[:: p.numel() // 32 + 1].tolist()",
     "1", "2"): "how many numbers of each tensor",
    ("scratch.mkdir(parents=True)", "True", "False"): "the record has made the folder",
    ("scratch.mkdir(parents=True)", "parents=True", "dropped"): "the record has made the folder",
    ("fsync(root)", "fsync(root)", "pass"): "only a power cut would tell",
    ("fsync(scratch)", "fsync(scratch)", "pass"): "only a power cut would tell",
    ("self.saved = -1", "1", "2"): "no update has either number",
    ("self.identity, self.saved = identity(trainer), -1",
     "1", "2"): "no update has either number",
    ("with contextlib.suppress(ImportError, OSError):",
     "ImportError, OSError", "OSError, ImportError"): "the order of kinds",
    ("gather(None)", "gather(None)", "pass"): "only a race between processes would tell",
    ("os.fsync(handle)", "os.fsync(handle)", "pass"): "only a power cut would tell",
    ('saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)',
     "map_location='cpu'", "dropped"): "there is a CPU alone",
    ('saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)',
     "weights_only=True", "dropped"): "torch's default is the same",
    ('if (root / "adapter").exists() and max(recorded(root), default=1) > 0:',
     "1", "2"): "any number above 0",
    ("return -1", "1", "2"): "any negative number",
    ("latex = LatexExtractionConfig(False, 0, NormalizationConfig(units=True))",
     "0", "1"): "either is before all others",
    ("return DynamicCache(config=self.core.config)", "config=self.core.config", "dropped"):
        "only the memory: masks keep to a window too",
    ("result = self.core(input_ids=ids, use_cache=False)",
     "input_ids=ids", "dropped"): "tokens nobody looks at, in any family that is tested",
    ('if bert and getattr(config, "is_decoder", True) is False:',
     "True", "False"): "the configs of masked models have it",
    ("scratch.mkdir(parents=True)", "scratch.mkdir(parents=True)", "pass"):
        "save_lora makes it too",
    ('read = lambda text: parse(text, [latex], extraction_mode="first_match", '
     "parsing_timeout=limit)", "extraction_mode='first_match'", "dropped"):
        "as TRL has it; no text was found that it reads otherwise",
    ("drop_below = 1.0", "1.0", "2.0"): "only the speed: all rows are then selected",
    ('self.cache_name = next((name for name in names if name in accepted), "")',
     "name in accepted", "name not in accepted"): "transformers 5.24 still takes the other name",
    ('kwargs: dict[str, Any] = {"use_cache": cache is not None, "attention_mask": mask.long()}',
     "cache is not None", "cache is None"):
        "a cache that is passed is used all the same; without one, one is made and thrown away",
    ("ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)",
     "dtype=torch.long", "dropped"): "tokens nobody looks at",
    ('if getattr(config, "is_encoder_decoder", False):', "False", "True"): "all configs have it",
    ("eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)",
     "dtype=torch.long", "dropped"): "of no numbers, with which nothing is compared",
    ("dist.all_gather_object(parts, value)",
     "dist.all_gather_object(parts, value)", "pass"): PROCESSES,
    ("dist.all_gather_object(parts, value)", "parts, value", "value, parts"): PROCESSES,
    ("if len(parts) > 1:", "1", "2"): PROCESSES,
    ('again = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())',
     "False", "True"): "only the memory",
    ("if args.top_entropy_quantile < 1:",
     "args.top_entropy_quantile < 1", "args.top_entropy_quantile <= 1"):
        "only the time: of a quantile of 1 every token counts",
    ("if args.top_entropy_quantile < 1:",
     "1", "2"): "only the time: of a quantile of 1 every token counts",
    ("threshold = values.quantile(1 - self.args.top_entropy_quantile) if len(values) else 0",
     "0", "1"): "there is nothing to compare with it",
    ("layer: Any = self.layers[0]", "0", "1"): "all layers of a recording have one shape",
    ("fsync(root / name)", "fsync(root / name)", "pass"): "only a power cut would tell",
    ('scale = 2.0 ** int(math.log2(max(1, rows if aggregation == "row_sum" else tokens)))',
     "rows if aggregation == 'row_sum' else tokens",
     "tokens if aggregation == 'row_sum' else rows"): "another power of two",
    ('scale = 2.0 ** int(math.log2(max(1, rows if aggregation == "row_sum" else tokens)))',
     "aggregation == 'row_sum'", "aggregation != 'row_sum'"): "another power of two",
    ("logged.append((1, self.optimizer_step(total, loss_scale)))",
     "1", "2"): "a weight that all have",
    ("log_metric = lambda name, value: self.reward_metrics.append((1, {str(name): float(value)}))",
     "1", "2"): "a weight that all have",
    ('ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")',
     "1", "2"): "any negative number will do",
    ('every = args.beta or args.loss_type == "opmd" or args.top_entropy_quantile < 1',
     "args.top_entropy_quantile < 1", "args.top_entropy_quantile <= 1"): "only the speed",
    ('every = args.beta or args.loss_type == "opmd" or args.top_entropy_quantile < 1',
     "1", "2"): "only the speed",
    ("by_length = rollout.completion_mask.sum(1).view(P, G).amax(1).argsort(stable=True).tolist()",
     "stable=True", "dropped"): "in which order groups of one length are added up",
    ("by_length = rollout.completion_mask.sum(1).view(P, G).amax(1).argsort(stable=True).tolist()",
     "True", "False"): "in which order groups of one length are added up",
    ("if self.world > 1:", "1", "2"): PROCESSES,
    ("for parameter in self.params.values() if self.world > 1 else ():", "1", "2"): PROCESSES,
    ("dist.broadcast(parameter.data, src=0)",
     "dist.broadcast(parameter.data, src=0)", "pass"): PROCESSES,
    ("dist.broadcast(parameter.data, src=0)",
     "src=0", "dropped"): "torch refuses it, where there are processes",
    ("dist.broadcast(parameter.data, src=0)", "0", "1"): "another process is as good",
    ("exact = {*bases} <= {torch.float32, torch.float64}",
     "{*bases} <= {torch.float32, torch.float64}",
     "{*bases} < {torch.float32, torch.float64}"): "no model has layers of both",
    ("rate = 1.25e-5 * (2000 / width) ** 0.78", "2000", "2001"): "two digits are kept",
    ("dist.all_reduce(parameter.grad)", "dist.all_reduce(parameter.grad)", "pass"): PROCESSES,
    ("MANY = 2**16", "2 ** 16", "2 * 16"): "only the speed",
    ("MANY = 2**16", "2", "3"): "only the speed",
    ("MANY = 2**16", "16", "17"): "only the speed",
    ('for index in tqdm(range(self.step // n, end // n), "GRPO", disable=self.rank > 0 or None):',
     "disable=self.rank > 0 or None", "dropped"): "whether there is a progress bar",
    ('for index in tqdm(range(self.step // n, end // n), "GRPO", disable=self.rank > 0 or None):',
     "self.rank > 0", "self.rank >= 0"): "whether there is a progress bar",
    ('for index in tqdm(range(self.step // n, end // n), "GRPO", disable=self.rank > 0 or None):',
     "self.rank > 0 or None", "self.rank > 0 and None"): "whether there is a progress bar",
    ('for index in tqdm(range(self.step // n, end // n), "GRPO", disable=self.rank > 0 or None):',
     "0", "1"): "whether there is a progress bar",
    ("rng = lambda epoch: torch.Generator().manual_seed(self.args.seed + epoch)",
     "self.args.seed + epoch", "self.args.seed - epoch"): "another order of the rows",
    ('transformers.set_seed((int.from_bytes(digest[:4], "big") + self.rank) % 2**32)',
     "4", "5"): "which bytes of a digest",
    ('transformers.set_seed((int.from_bytes(digest[:4], "big") + self.rank) % 2**32)',
     "2", "3"): "no digest is that large, nor 2 ** 32 less a rank",
    ('transformers.set_seed((int.from_bytes(digest[:4], "big") + self.rank) % 2**32)',
     "32", "33"): "no digest is that large, nor 2 ** 32 less a rank",
    ('transformers.set_seed((int.from_bytes(digest[:4], "big") + self.rank) % 2**32)',
     "int.from_bytes(digest[:4], 'big') + self.rank",
     "int.from_bytes(digest[:4], 'big') - self.rank"): "another seed for each process",
    ('self.generator = torch.Generator().manual_seed(int.from_bytes(digest[4:8], "big"))',
     "8", "9"): "which bytes of a digest",
    ("near = torch.where(A > 0, moved <= high, moved >= -epsilon)", "A > 0", "A >= 0"): ZERO,
    ("loss = loss * torch.where(mask, token_weights.detach(), 0.0)",
     "0.0", "1.0"): "the mask drops it: any finite number does",
    ("with naming(file, ValueError, TypeError):",
     "ValueError, TypeError", "TypeError, ValueError"): "the order of kinds",
    ("prepare()", "prepare()", "pass"): "it changes only the speed",
    ("if left < len(rows) * lm.drop_below:",
     "left < len(rows) * lm.drop_below", "left <= len(rows) * lm.drop_below"):
        "it changes only the speed: all rows are then selected",
    ("width = layer.buffers[0].shape[2]", "0", "1"): "keys and values have one shape",
    ("self, save_steps: int = 50, save_total_limit: int | None = 2, resume: bool = False",
     "2", "3"): "a default",
    ('saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)',
     "True", "False"): "a file whose hash fits is one that we wrote",
    ("os.close(handle)", "os.close(handle)", "pass"): "a handle stays open",
    ("return super().update(key_states, value_states, *args, **kwargs)",
     "**kwargs", "dropped"): "layers of this kind read nothing else",
    ("fsync(path)", "fsync(path)", "pass"): "only a power cut would tell",
    ("for option, size in ((-1, 2**31 - 1), (-3, 2**25)):",
     "2 ** 31", "2 * 31"): "it changes only the speed",
    ("for option, size in ((-1, 2**31 - 1), (-3, 2**25)):",
     "2 ** 25", "2 * 25"): "it changes only the speed",
    ('self.generator = torch.Generator().manual_seed(int.from_bytes(digest[4:8], "big"))',
     "4", "5"): "which bytes of a digest",
    ("parts = torch.arange(base.in_features, device=base.weight.device).split(1024)",
     "1024", "1025"): "how many columns at a time",
    ("if isinstance(numbers[0], Fraction) and numbers[0] == numbers[1]:",
     "0", "1"): "no text is equal to a number",
    ('scale = 2.0 ** int(math.log2(max(1, rows if aggregation == "row_sum" else tokens)))',
     "1", "2"): "a power of two, which is taken out again",
    ("c = torch.where(A > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))",
     "A > 0", "A >= 0"): ZERO,
    ("return [0.0 if n <= 0 else -1.0 if n >= cache else -n / cache for n in over]",
     "n >= cache", "n > cache"): EDGE,
    ("return [0.0 if n <= 0 else -1.0 if n >= cache else -n / cache for n in over]",
     "n <= 0", "n < 0"): EDGE,
    ("log_ratio = (logps - old_logps)"
     ".clamp(max=min(80, math.log(torch.finfo(logps.dtype).max) - 1))",
     "80", "81"): "exp is finite in float32 there too",
    ("log_ratio = (logps - old_logps)"
     ".clamp(max=min(80, math.log(torch.finfo(logps.dtype).max) - 1))",
     "1", "2"): "exp is finite in float16 there too",
    ('stats["cispo_clip_ratio"] = (ratio > high) & (A > 0)',
     "ratio > high", "ratio >= high"): EDGE,
    ("tau = torch.full_like(A, sapo_temperature_neg).masked_fill(A > 0, sapo_temperature_pos)",
     "A > 0", "A >= 0"): ZERO,
    ("log_w = log_ratio.clamp(-20, 20).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)",
     "20", "21"): "the weight is 0 from w = e^7 on",
    ("k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)",
     "A >= 0", "A > 0"): ZERO,
    ("low_clip, high_clip = (ratio < 1 - epsilon) & (A < 0), (ratio > 1 + high) & (A > 0)",
     "ratio < 1 - epsilon", "ratio <= 1 - epsilon"): EDGE,
    ("low_clip, high_clip = (ratio < 1 - epsilon) & (A < 0), (ratio > 1 + high) & (A > 0)",
     "ratio > 1 + high", "ratio >= 1 + high"): EDGE,
    ("kl = kl_penalty(logps, torch.where(mask, ref_logps.detach(), 0.0), estimator=kl_estimator)",
     "0.0", "1.0"): "the mask drops it: any finite number does",
    ("tokens = torch.searchsorted(cdf, draws, right=True).squeeze(1)",
     "True", "False"): "a draw lies on a boundary once in 2 ** 53",
    ("tokens = torch.searchsorted(cdf, draws, right=True).squeeze(1)",
     "right=True", "dropped"): "a draw lies on a boundary once in 2 ** 53",
    ("model: nn.Module, rollout: Rollout, *, temperature: float, share_prompt: bool = True,",
     "True", "False"): "both paths give the same, which other tests show",
    ("chunk_size: int = 128,",
     "128", "129"): "the size of a chunk changes nothing, which other tests show",
    ('self.takes_cache = bool(self.cache_name) and not getattr(self.core, "_is_stateful", False)',
     "False", "True"): "all models have it",
    ("def new_cache(self, room: int = 0) -> DynamicCache:",
     "0", "1"): "a cache with room holds the same",
    ("ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)",
     "1", "2"): "tokens nobody looks at",
    ("result = self.core(input_ids=ids, use_cache=False)",
     "False", "True"): "the stub has no cache",
    ("result = self.core(input_ids=ids, use_cache=False)",
     "use_cache=False", "dropped"): "the stub has no cache",
    ('fixed = getattr(self.core, "_can_compile_fullgraph", False)',
     "False", "True"): "all models have it",
    ("trained = torch.is_grad_enabled() and self.logits(hidden[:1].detach()).requires_grad",
     "torch.is_grad_enabled() and self.logits(hidden[:1].detach()).requires_grad",
     "torch.is_grad_enabled() or self.logits(hidden[:1].detach()).requires_grad"):
        "for a frozen head both ways give the same",
    ("trained = torch.is_grad_enabled() and self.logits(hidden[:1].detach()).requires_grad",
     "1", "2"): "one state or two tell alike whether the head is trained",
    ("end = past + key_states.shape[-2]",
     "-2", "2"): "axis 2 of the four of a key is axis -2",
    ("buffer[:, :, -self.room :] = 0",
     "0", "1"): "hidden: any finite number does",
    ("return self.buffers[0].shape[2], 0",
     "0", "1"): "keys and values have the same length",
    ("return super()._show(self.buffers[0].shape[2] if self.buffers else end)",
     "0", "1"): "keys and values have the same length",
    ('slides = [getattr(layer, "is_sliding", False) for layer in cache.layers]',
     "False", "True"): "all layers have it",
    ("with torch.cuda.device(inputs[0].device):",
     "0", "1"): "all inputs are on one device",
    ("inputs[0].clone()",
     "0", "1"): "on a GPU: a recording of anything at all",
    ("inputs[0].clone()",
     "inputs[0].clone()", "pass"): "on a GPU: a recording of nothing, which torch only warns of",
    ('entropy = -z.clamp_(min=-1e4).mul_(p).sum(dim=-1)',
     "10000.0", "10001.0"): "any finite number does",
    ("one = p.new_full((len(y), 1), 1 / temperature)",
     "1", "2"): "a second column, which scatter_add_ does not read",
}
# fmt: on


def reason(mutant: dict) -> str:
    return EQUIVALENT.get((mutant["source"], mutant["was"], mutant["is"]), "")


# ---------------------------------------------------------------------- executing a mutant's module


def imported(source: str) -> set[str]:
    """Names of the modules that a source imports at its top, and of what it takes from them."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def our_modules() -> dict[str, Any]:
    """Our loaded modules by name, with their code, each after those that it imports."""
    ours, ordered = {}, {}
    for name, module in sys.modules.items():
        path = Path(getattr(module, "__file__", None) or "/")
        if ROOT in path.parents and path.suffix == ".py" and "benchmarks" not in path.parts:
            ours[name] = path

    def add(name: str) -> None:
        if name not in ordered:
            ordered[name] = None  # a circle ends here
            source = ours[name].read_text(encoding="utf-8")
            for other in sorted(imported(source) & ours.keys()):
                add(other)
            del ordered[name]
            ordered[name] = compile(source, str(ours[name]), "exec")

    for name in ours:
        add(name)
    return ordered


def execute_again(modules: dict[str, Any], mutant: Mutant | None, items: list) -> None:
    """Execute our modules anew, in their places, one of them mutated. And so the tests."""
    for name, code in modules.items():
        module = sys.modules[name]
        if mutant and Path(str(module.__file__)) == ROOT / mutant.about["file"]:
            setattr(mutant.parent, mutant.field, mutant.new)
            tree = ast.fix_missing_locations(mutant.tree)
            code = compile(tree, str(module.__file__), "exec")
        exec(code, vars(module))
    for item in items:
        item.obj = getattr(item.module, item.originalname)


# -------------------------------------------------------------------------------------- the judging


IMPORT = -1  # in place of a test's number


class Test(NamedTuple):
    """A test, the seconds that it takes, and the lines that it reaches, by file."""

    item: Any
    file: str
    seconds: float
    lines: dict[str, set[int]]


class Reports:
    """A pytest plugin that keeps the failures of the test that runs."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(str(report.longrepr).strip().rpartition("\n")[2])


def be_a_child(scratch: str) -> None:
    """After a fork: no output, a folder of its own, a bound on memory, and a process group."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    tempfile.tempdir = scratch
    os.chdir(scratch)
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 8 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


class MutationTesting(Reports):
    """A pytest plugin: judges mutants in place of running the tests that were collected."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.children: set[int] = set()
        self.on_import: dict[str, set[int]] = {}  # lines by file

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if not any(word in item.name for word in SLOW)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items, self.modules = list(session.items), our_modules()
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by a signal", 1))
        started = time.perf_counter()
        try:
            self.tests = self.reached()
            seconds = time.perf_counter() - started
            print(f"\n{len(self.tests)} tests, which take {seconds:.0f} s with tracing", flush=True)
            judge_all(self)
        finally:
            for child in list(self.children):
                self.end(child)
        return True

    def end(self, child: int) -> None:
        """Kill a child, if it still runs, with all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.children.discard(child)

    def run(self, item: Any, following: Any) -> list[str]:
        """The failures of a test."""
        self.failed.clear()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return self.failed

    def reached(self) -> list[Test]:
        """Run all tests once, unmutated, in forked processes, and see which lines each reaches."""
        n = self.options.workers
        with tempfile.TemporaryDirectory() as scratch:
            for share in range(n):
                child = os.fork()
                if child == 0:
                    be_a_child(scratch)
                    with contextlib.suppress(BaseException):
                        self.trace(range(share, len(self.items), n), f"{scratch}/{share}")
                    os._exit(0)
                self.children.add(child)
            for child in list(self.children):
                os.waitpid(child, 0)
                self.children.discard(child)
            rows = []
            for share in range(n):
                rows += map(json.loads, Path(f"{scratch}/{share}").read_text().splitlines())
        tests = []
        for row in sorted(rows, key=lambda row: row["index"]):
            lines = {file: set(some) for file, some in row["lines"].items()}
            if row["index"] == IMPORT:
                self.on_import = lines
                continue
            item = self.items[row["index"]]
            if row["failed"]:
                print(f"left out: {item.name[:70]}: {'; '.join(row['failed'])[:200]}", flush=True)
            else:
                file = str(Path(item.path).relative_to(ROOT))
                tests.append(Test(item, file, row["seconds"], lines))
        if missing := len(self.items) + n - len(rows):
            print(f"left out: {missing} tests after a crash", flush=True)
        return tests

    def trace(self, indices: range, path: str) -> None:
        """Run some tests, and write what each reaches. Before them: what an import reaches."""
        judged, reached = {str(ROOT / file): file for file in JUDGED}, {}

        def on_call(frame: Any, event: str, arg: Any) -> Any:
            if frame.f_code.co_filename not in judged:
                return None
            seen = reached.setdefault(judged[frame.f_code.co_filename], set())

            def on_line(frame: Any, event: str, arg: Any) -> Any:
                seen.add(frame.f_lineno)
                return on_line

            return on_line(frame, event, arg)

        for index in [IMPORT, *indices]:
            reached.clear()
            start, failed = time.perf_counter(), []
            threading.settrace(on_call)
            sys.settrace(on_call)
            if index == IMPORT:
                execute_again(self.modules, None, self.items)
            else:
                failed = self.run(self.items[index], None)  # fixtures are made anew for each test
            sys.settrace(None)
            row = {"index": index, "seconds": time.perf_counter() - start, "failed": failed}
            row["lines"] = {file: sorted(lines) for file, lines in reached.items()}
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def selected(self, mutant: Mutant, killers: collections.Counter) -> list[Test]:
        """The tests that may notice, in the order in which they are to run."""
        file = mutant.about["file"]
        reach = lambda test, lines: bool(test.lines.get(file, set()) & lines)
        tests = [test for test in self.tests if test.file in JUDGED[file]]
        imported = mutant.on_import or mutant.lines & self.on_import.get(file, set())
        if not imported:
            tests = [test for test in tests if reach(test, mutant.lines)]
        first = {name for name, _ in killers.most_common(3)}
        far = lambda test: (test.item.name not in first, not reach(test, mutant.body), test.seconds)
        tests = sorted(tests, key=far)
        ends = itertools.accumulate(test.seconds for test in tests)
        return [test for test, end in zip(tests, ends, strict=True) if end < self.options.seconds]

    def start(self, mutant: Mutant, tests: list[Test]) -> "Running":
        read, write = os.pipe()
        scratch = tempfile.mkdtemp()
        child = os.fork()
        if child == 0:
            say, name = lambda text: os.write(write, f"{text}\n".encode()), "loading"
            try:
                be_a_child(scratch)
                execute_again(self.modules, mutant, [test.item for test in tests])
                for i, test in enumerate(tests):
                    say(i)
                    name = test.item.name
                    following = tests[i + 1].item if i + 1 < len(tests) else None
                    if self.run(test.item, following):
                        say(f"killed by {name}")
                        break
            except BaseException as error:
                say(f"killed by {name}: {type(error).__name__}")
            say("end")
            os._exit(0)
        self.children.add(child)
        os.close(write)
        return Running(mutant, tests, child, read, scratch)


class Running:
    """A mutant that is being judged in a process of its own."""

    def __init__(self, mutant: Mutant, tests: list, child: int, pipe: int, scratch: str) -> None:
        self.mutant, self.tests, self.child, self.scratch = mutant, tests, child, scratch
        self.pipe, self.unread, self.killed_by, self.ended = pipe, "", "", False
        self.name, self.limit = "loading", 30.0
        self.started = self.since = time.monotonic()

    def read(self) -> bool:
        """Take in what the process says. Returns whether it is done."""
        said = os.read(self.pipe, 4096).decode()
        *lines, self.unread = (self.unread + said).split("\n")
        for line in lines:
            if line.isdecimal():
                test = self.tests[int(line)]
                self.name, self.limit = test.item.name, 60 + 20 * test.seconds
                self.since = time.monotonic()
            elif line.startswith("killed by "):
                self.killed_by = line.removeprefix("killed by ")
            self.ended = self.ended or line == "end"
        return self.ended or not said

    def overdue(self) -> bool:
        """Whether a test takes far longer than usual. (A slow machine is no test.)"""
        return time.monotonic() - self.since > self.limit

    def result(self) -> dict[str, Any]:
        """How it went."""
        if not self.ended:
            self.killed_by = f"{self.name}: {'time limit' if self.overdue() else 'crash'}"
        os.close(self.pipe)
        shutil.rmtree(self.scratch, ignore_errors=True)
        seconds = round(time.monotonic() - self.started, 1)
        tests = {} if self.killed_by else {"tests": len(self.tests)}  # that it survived
        return self.mutant.about | {"killed_by": self.killed_by} | tests | {"seconds": seconds}


def judge_all(plugin: MutationTesting) -> None:
    """Judge the mutants that are asked for, several at a time, and keep what is found."""
    options, began, judged = plugin.options, time.perf_counter(), 0
    killers: dict[tuple, collections.Counter] = collections.defaultdict(collections.Counter)
    queue, running, work = collections.deque(options.work), list[Running](), len(options.work)
    place = lambda mutant: (mutant.about["file"], min(mutant.body))
    try:
        while queue or running:
            while queue and len(running) < options.workers:
                mutant = queue.popleft()
                tests = plugin.selected(mutant, killers[place(mutant)])
                running.append(plugin.start(mutant, tests))
            ready = select.select([one.pipe for one in running], [], [], 1.0)[0]
            done = [o for o in running if (o.pipe in ready and o.read()) or o.overdue()]
            for one in done:
                running.remove(one)
                plugin.end(one.child)
                options.known[one.mutant.key] = found = one.result()
                killers[place(one.mutant)][one.killed_by] += 1
                judged += 1
                if not found["killed_by"] and not reason(found):
                    print("survived:", json.dumps(found), flush=True)
                if judged % 50 == 0:
                    each, summary = (time.perf_counter() - began) / judged, write_results(options)
                    killed = f"{summary['killed']} of {summary['judged']} killed"
                    left = f"{(work - judged) * each / 60:.0f} minutes left"
                    print(f"{judged} of {work}: {killed}, {each:.2f} s each, {left}", flush=True)
    finally:
        each = (time.perf_counter() - began) / max(judged, 1)
        print(f"{judged} of {work} judged, {each:.2f} s each")
        print(json.dumps(write_results(options), indent=1), flush=True)


# ------------------------------------------------------------------------------------- the record


def write_results(options: argparse.Namespace) -> dict[str, Any]:
    """Write all that is known. Returns the figures."""
    rows = [options.known[m.key] for m in options.all if m.key in options.known]
    survivors = [row for row in rows if not row["killed_by"]]
    survivors = [row | {"why": reason(row)} for row in survivors]
    killed = len(rows) - len(survivors)
    summary: dict[str, Any] = {"command": options.command, "mutants": len(options.all)}
    summary |= {"judged": len(rows), "killed": killed, "score": killed / max(len(rows), 1)}
    summary["survivors_without_a_reason"] = sum(not row["why"] for row in survivors)
    seconds = sum(row["seconds"] for row in rows) / max(len(rows), 1)
    summary["seconds_of_a_process"] = round(seconds, 2)
    for file in JUDGED:
        own = [row for row in rows if row["file"] == file]
        there = sum(m.about["file"] == file for m in options.all)
        lived = sum(not row["killed_by"] for row in own)
        summary[file] = {"mutants": there, "judged": len(own), "survived": lived}
    parts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in summary.items()]
    for name, some in (("survivors", survivors), ("judged_mutants", rows)):
        lines = ",\n".join(f"  {json.dumps(row)}" for row in some)
        parts.append(f' "{name}": [\n{lines}\n ]')
    scratch = options.out.with_suffix(".tmp")
    scratch.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(scratch, options.out)
    return summary


def read_results(path: Path) -> dict[tuple, dict]:
    """What an earlier run found, by mutant."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = ("file", "source", "was", "is", "nth")
    return {tuple(row.get(n) for n in names): row for row in found.get("judged_mutants", ())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="judge every N-th mutant")
    parser.add_argument("--only", nargs="*", choices=JUDGED, default=list(JUDGED))
    parser.add_argument("--workers", type=int, default=2)
    text = "give up on a mutant after tests that take so long together"
    parser.add_argument("--seconds", type=float, default=math.inf, help=text)
    parser.add_argument("-k", default="", help="judge by tests of these names alone, as in pytest")
    parser.add_argument("--resume", action="store_true", help="judge those not judged yet")
    parser.add_argument("--again", action="store_true", help="judge survivors without a reason")
    parser.add_argument("--list", action="store_true", help="say how many there are, and stop")
    out = ROOT / "benchmarks" / "mutations.json"
    parser.add_argument("--out", type=Path, default=out, help="another file, for a sample, say")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.command = "python benchmarks/mutate.py"
    options.command += f" --every {options.every}" if options.every > 1 else ""
    options.all = [mutant for file in JUDGED for mutant in mutants(file)]
    for file in JUDGED:
        print(file, sum(m.about["file"] == file for m in options.all))
    names = {(m.about["source"], m.about["was"], m.about["is"]) for m in options.all}
    for key in EQUIVALENT.keys() - names:
        print("EQUIVALENT has a reason for what is no mutant any more:", key)
    if options.list:
        return
    known = read_results(options.out)
    work = [m for m in options.all if m.about["file"] in options.only][:: options.every]
    if options.resume:
        work = [m for m in work if m.key not in known]
    elif options.again:
        lived = lambda row: row is not None and not row["killed_by"] and not reason(row)
        work = [m for m in work if lived(known.get(m.key))]
    else:  # of the other files what is known stays
        known = {key: row for key, row in known.items() if row["file"] not in options.only}
    options.known, options.work = known, work
    print(f"{len(work)} mutants", flush=True)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    files = dict.fromkeys(test for file in options.only for test in JUDGED[file])
    plain = ["-q", "-s", "-o", "addopts=", "-k", options.k]
    plain += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout"]
    sys.exit(pytest.main([*plain, *files], plugins=[MutationTesting(options)]))


if __name__ == "__main__":
    main()
