"""Mutation testing: change the code in one small way at a time, and see whether a test notices.

    python benchmarks/mutate.py [--every N] [--only lora.py]        # writes benchmarks/mutations.json
    python benchmarks/mutate.py --again        # only what survived and has no reason, with the tests as they are now

Mutants: comparisons, arithmetic and Boolean operators exchanged, `not` and unary minus dropped, numbers and truth values
changed, statements deleted. Judged: lora.py, rewards.py, and of grpo_lora.py the objective, log-prob and rollout parts. Left
out, because they change nothing by construction: annotations, zip's `strict`, and `dim=-1` of what has two dimensions. Each
mutant runs, in a forked process with a time limit, first the tests that need no fixture but tmp_path, quickest first; then, if
it is still alive, the whole suite but its slowest parts. It is killed by the first test that fails. What survives either has
a reason in EQUIVALENT, or is a gap in the tests.
"""

import argparse
import ast
import copy
import inspect
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["HYPOTHESIS_PROFILE"] = "gallery"

import pytest  # noqa: E402
import torch  # noqa: E402

import test_training  # noqa: E402

JUDGED = {  # of grpo_lora.py
    "group_advantages", "_nanstd", "combine_rewards", "multi_objective_advantages", "completion_mask", "kl_penalty",
    "grpo_loss", "CausalLM", "_RoomyLayer", "_ShownLayer", "_FasterHead", "Rollout", "generate", "_recorded", "_decode",
    "_TokenLogps", "_chunk_logps", "completion_logps", "evaluating", "adapter_dropout", "default_reference",
}  # fmt: skip
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def change(node: ast.AST) -> list[ast.AST]:
    """What one node may turn into."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        return [ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)]
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        other = copy.copy(node)
        other.op = SWAPS[type(node.op)]()
        return [other]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        return [ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)]
    if isinstance(node, ast.IfExp):
        return [ast.IfExp(node.test, node.orelse, node.body)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [ast.Pass()]
    return [ast.Pass()] if isinstance(node, ast.Raise | ast.AugAssign) else []


def sites(tree: ast.AST):
    """(parent, field, index, replacement) for each mutant."""
    typed = [t for node in ast.walk(tree) for t in (getattr(node, "annotation", None), getattr(node, "returns", None))]
    annotations = {inner for outer in typed if outer is not None for inner in ast.walk(outer)}
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if isinstance(parent, ast.JoinedStr | ast.FormattedValue | ast.Raise):
                continue
            if name in ("annotation", "returns", "decorator_list") or parent in annotations:
                continue
            if isinstance(parent, ast.keyword) and parent.arg in ("strict", "dim"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    for other in change(child):
                        yield parent, name, index if isinstance(value, list) else None, other


def mutants(file: str):
    source = (HERE.parent / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    for top in tree.body:
        if file == "grpo_lora.py" and getattr(top, "name", None) not in JUDGED:
            continue
        if isinstance(top, ast.Import | ast.ImportFrom):
            continue
        for parent, name, index, other in list(sites(top)):
            old = getattr(parent, name) if index is None else getattr(parent, name)[index]
            put = lambda new, p=parent, n=name, i=index: (
                setattr(p, n, new) if i is None else getattr(p, n).__setitem__(i, new)
            )
            line, before = getattr(old, "lineno", 0), ast.unparse(old)
            put(other)
            text = ast.unparse(ast.fix_missing_locations(tree))
            put(old)
            about = {
                "file": file,
                "source": source.splitlines()[line - 1].strip(),
                "was": before,
                "is": ast.unparse(other),
            }
            yield about, source, text


def usable(tests: dict) -> dict:
    fits = lambda f: (
        set(inspect.signature(f).parameters)
        <= {"tmp_path"}
        | {
            n.strip()
            for m in getattr(f, "pytestmark", [])
            if m.name == "parametrize"
            for n in (m.args[0].split(",") if isinstance(m.args[0], str) else m.args[0])
        }
    )
    slow = ("gallery", "thousand", "merging_a", "262", "frequency", "process", "hangs", "warning")
    here = lambda f: all(m.name == "parametrize" for m in getattr(f, "pytestmark", []))  # and not only on a GPU
    return {n: f for n, f in tests.items() if here(f) and fits(f) and not any(s in n for s in slow)}


EDGE = "the two differ only where the numbers are equal, and there both ways give the same"
ZERO = "the two differ only where A = 0, and there everything it multiplies is 0"
AXES = "axis 2 of the four of a key is axis -2"
DUMMY = "for _ in range(t + 1, steps if lm.sharded else 0):  # the other processes may still be writing"
EQUIVALENT = {  # (source line, was, is) -> why nothing can notice
    ("nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "pass"):
        "nn.Linear has just drawn A from the same distribution; the line is there to be read",
    ("product = _InBlocks.apply if with_grad else _InBlocks.forward", "_InBlocks.apply if with_grad else _InBlocks.forward",
        "_InBlocks.forward if with_grad else _InBlocks.apply"): "autograd finds the same gradient, in more memory",
    ('names = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()}))', "-1", "1"):
        "which names a refusal suggests",
    ('json.dumps(config, indent=2, sort_keys=True) + "\\n", encoding="utf-8"', "True", "False"): "the order of keys in a file",
    ('start, last = -1, ""', "-1", "1"): "what is in a box starts at 7 at the earliest",
    ("if boxed and begin > start:", "begin > start", "begin >= start"): "no two boxes start at one place",
    ("scores.append(0.0 if over <= 0 else -1.0 if over >= cache else -over / cache)", "over >= cache", "over > cache"): EDGE,
    ("scores.append(0.0 if over <= 0 else -1.0 if over >= cache else -over / cache)", "over <= 0", "over < 0"): EDGE,
    ("tau = torch.where(A > 0, A.new_tensor(sapo_temperature_pos), A.new_tensor(sapo_temperature_neg))", "A > 0", "A >= 0"):
        ZERO,
    ("lam, k = torch.where(A >= 0, 3.0, 2.0), torch.where(A >= 0, 2.0, 3.0)", "A >= 0", "A > 0"): ZERO,
    ('stats["clip_ratio/low_mean"] = (ratio < 1 - epsilon) & (A < 0)', "ratio < 1 - epsilon", "ratio <= 1 - epsilon"): EDGE,
    ('stats["clip_ratio/high_mean"] = (ratio > 1 + high) & (A > 0)', "ratio > 1 + high", "ratio >= 1 + high"): EDGE,
    ("loss = loss / (max_completion_length or 1)", "1", "2"): "None was refused at the start of the function",
    ("buffer[:, :, -self.room :] = 0  # NaN would spread, hidden or not", "0", "1"): "hidden: any finite number does",
    ('cache.layers = [_ShownLayer(room, place, getattr(layer, "is_sliding", False)) for layer in cache.layers]',
        "False", "True"): "all layers have it",
    ("return (self.buffers[0].shape[2], 0) if self.buffers else super().get_mask_sizes(query_length)", "0", "1"):
        "keys and values have the same length",
    ("return super()._fill_to(self.buffers[0].shape[2] if self.buffers else end)", "0", "1"):
        "keys and values have the same length",
    ('fixed = getattr(self.core, "_can_compile_fullgraph", False) and self.takes_cache and self.takes_positions',
        "False", "True"): "all models have it",
    ('warnings.warn(f"decoding takes longer, as no CUDA graph of a step can be recorded: {why}", stacklevel=2)', "2", "3"):
        "which line of ours a warning names",
    ("with torch.cuda.device(inputs[0].device):  # nothing that runs on another one would be recorded", "0", "1"):
        "all inputs are on one device",
    ("inputs[0].clone()", "0", "1"): "on a GPU: a recording of anything at all",
    ("inputs[0].clone()", "inputs[0].clone()", "pass"): "on a GPU: a recording of nothing, which torch only warns of",
    ("past, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]", "-2", "2"): AXES,
    ("dummy = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)", "1", "2"): "tokens nobody looks at",
    ("dummy = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)", "0", "1"): "tokens nobody looks at",
    ("self.core(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.core.device))", "1", "2"): "tokens nobody looks at",
    ('if getattr(config, "is_decoder", True) is False and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:',
        "True", "False"): "all configs of encoders have is_decoder",
    ("tokens = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)", "True", "False"):
        "a draw lies on a boundary once in 2 ** 53",
    ("lm.hidden(prompt_ids[:1], prompt_mask[:1])", "1", "2"): "a dummy forward for the other processes, of two rows",
    (DUMMY, "0", "1"): "t + 1 is above 1 already",
    ("slope = p.mul_(-1 / T).scatter_add_(1, y.unsqueeze(1), p.new_full((len(y), 1), 1 / T))", "1", "2"):
        "a second column, which scatter_add_ does not read",
    ('entropy = -torch.einsum("nv,nv->n", p, z.clamp_(min=-1e4))  # 0 log 0 = 0', "10000.0", "10001.0"):
        "any finite number does",
    ("model: nn.Module, rollout: Rollout, *, temperature: float, share_prompt: bool = True, chunk_size: int = 128",
        "True", "False"): "both paths give the same, which other tests show",
    ("return zero + torch.zeros_like(mask, dtype=h.dtype), torch.zeros_like(mask, dtype=h.dtype)",
        "zero + torch.zeros_like(mask, dtype=h.dtype)", "zero - torch.zeros_like(mask, dtype=h.dtype)"): "zeros",
    ("def new_cache(self, room: int = 0, place: Tensor | None = None) -> DynamicCache:", "0", "1"):
        "a cache with room holds the same",
    ("x = torch.ones(2, weight.shape[1], dtype=weight.dtype, device=weight.device)", "2", "3"): "rows of a trial input",
    ("U, S, Vh = torch.linalg.svd(self._oriented(W).to(A.dtype), full_matrices=False)", "False", "True"):
        "only the first r vectors are used",
    ('names = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()}))', "1", "2"):
        "which names a refusal suggests",
    ("state = dict(module.trained.state_dict(keep_vars=True))", "True", "False"): "what is written and copied is the same",
    ('json.dumps(config, indent=2, sort_keys=True) + "\\n", encoding="utf-8"', "2", "3"): "how a file is indented",
    ('start, last = -1, ""', "1", "2"): "what is in a box starts at 7 at the earliest",
    ("assert found is not None and found.loader is not None", "found is not None and found.loader is not None",
        "found is not None or found.loader is not None"): "both always hold: it is said for the type checker",
    ("near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]", "1", "2"): "of two, the first is the same",
    ("log_ratio = (logps - old_logps).clamp(max=80)  # where exp is finite in float32: 0·inf would make the gradient NaN",
        "80", "81"): "exp is finite there too",
    ('stats["cispo_clip_ratio"] = (ratio > high) & (A > 0)', "ratio > high", "ratio >= high"): EDGE,
    ("kl = kl_penalty(logps, torch.where(mask, ref_logps, 0.0), estimator=kl_estimator)", "0.0", "1.0"):
        "the mask drops it: any finite number does",
    ("log_w = log_ratio.clamp(-20, 20).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)", "20", "21"):
        "the weight is 0 from w = e^7 on",
    ('if getattr(self.core.config, "is_encoder_decoder", False):', "False", "True"): "all configs have it",
    ('self.takes_cache = bool(self.cache_name) and not getattr(self.core, "_is_stateful", False)', "False", "True"):
        "all models have it",
    ("logits = self.core(input_ids=dummy, use_cache=False).logits.squeeze(0)  # where [0] fills zeros in backward",
        "False", "True"): "the stub has no cache",
    ("tokens = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)", "u * cdf[:, -1:]", "u / cdf[:, -1:]"):
        "cdf ends at 1 but for rounding",
    ("model: nn.Module, rollout: Rollout, *, temperature: float, share_prompt: bool = True, chunk_size: int = 128",
        "128", "129"): "the size of a chunk changes nothing, which other tests show",
    ("if torch.is_grad_enabled() and lm.head_is_trained():", "torch.is_grad_enabled() and lm.head_is_trained()",
        "torch.is_grad_enabled() or lm.head_is_trained()"): "for a frozen head both ways give the same",
    ("mask.shape[1] - 1, int(lm.sharded)", "mask.shape[1] - 1", "mask.shape[1] + 1"): "a column more, which is cut off below",
}  # fmt: skip


def reason(mutant: dict) -> str:
    return EQUIVALENT.get((mutant["source"], mutant["was"], mutant["is"]), "")


LATE = "not (gallery or processes or process_that_dies or torchrun or random_moments or signal_finishes or thousand or "
LATE += "killed or hangs or demo or frequency or warning or out_of_memory or trls_accumulated or family_is_scored)"


class FirstFailure:
    """A pytest plugin that writes the name of the first test that fails to a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            os.write(self.pipe, report.nodeid.rpartition("::")[2].encode())
            os._exit(0)


def run_suite(file: str, text: str, pipe: int) -> None:
    """pytest on the whole suite but its slowest parts, with the mutant in the place of its module."""
    for name in ("lora", "rewards", "grpo_lora", "test_math", "test_training"):
        sys.modules.pop(name, None)
    module = sys.modules[file.removesuffix(".py")] = types.ModuleType(file.removesuffix(".py"))
    module.__file__ = str(HERE.parent / file)
    exec(compile(text, module.__file__, "exec"), vars(module))
    os.chdir(HERE.parent)
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "-k", LATE, "test_math.py", "test_training.py"]
    pytest.main(quiet, plugins=[FirstFailure(pipe)])


def judge(file: str, source: str, text: str, order: list[str]) -> str:
    """The test that kills the mutant, or '' - in a forked process, so that nothing of the mutant is left."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            signal.alarm(40)
            with test_training.source_patched(file, source, text) as tests:
                for name in order:
                    signal.alarm(40)
                    try:
                        test_training.run_test(tests[name])
                    except BaseException:
                        os.write(write, name.encode())
                        os._exit(0)
            signal.alarm(1200)  # several times what the suite takes: a slow machine is no test
            run_suite(file, text, write)
        except BaseException as error:
            os.write(write, f"loading: {type(error).__name__}".encode())
        os._exit(0)
    os.close(write)
    return child, read


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="judge every N-th mutant")
    parser.add_argument("--only", nargs="*", default=["lora.py", "rewards.py", "grpo_lora.py"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="judge the survivors without a reason again")
    options = parser.parse_args()
    torch.set_num_threads(1)

    seconds = {}
    with test_training.source_patched() as tests:
        for name, test in usable(tests).items():
            start = time.perf_counter()
            test_training.run_test(test)
            seconds[name] = time.perf_counter() - start
    order = sorted((n for n, s in seconds.items() if s < 20), key=seconds.get)
    print(f"{len(order)} tests, {sum(seconds.values()):.0f} s", flush=True)

    work = [m for file in options.only for m in mutants(file)][:: options.every]
    known, kept = {"mutants": len(work)}, []
    if options.again:
        known = json.loads((HERE / "mutations.json").read_text())
        kept = [s for s in known["survivors"] if reason(s)]
        again = [(s["source"], s["was"], s["is"]) for s in known["survivors"] if not reason(s)]
        work = [m for m in work if (m[0]["source"], m[0]["was"], m[0]["is"]) in again]
    print(f"{len(work)} mutants", flush=True)
    running, results, favourites = {}, [], {}

    def finish() -> None:
        child, status = os.wait()
        read, about = running.pop(child)
        killer = os.read(read, 200).decode() or ("time limit" if os.WIFSIGNALED(status) else "")
        os.close(read)
        favourites[killer] = favourites.get(killer, 0) + 1
        results.append(about | {"killed_by": killer})
        if not killer:
            print("survived:", about, flush=True)
        if len(results) % 50 == 0:
            print(f"{len(results)} judged, {sum(bool(r['killed_by']) for r in results)} killed", flush=True)

    for about, source, text in work:
        if len(running) >= options.workers:
            finish()
        first = sorted(order, key=lambda n: (seconds[n] > 1.5, -favourites.get(n, 0), seconds[n]))
        child, read = judge(about["file"], source, text, first)
        running[child] = (read, about)
    while running:
        finish()

    survivors = kept + [{k: r[k] for k in ("file", "source", "was", "is")} for r in results if not r["killed_by"]]
    survivors = [mutant | {"why": reason(mutant)} for mutant in survivors]
    total, killed = known["mutants"], known["mutants"] - len(survivors)
    command = "python benchmarks/mutate.py" + (f" --every {options.every}" if options.every > 1 else "")
    summary = {"command": command, "mutants": total, "killed": killed, "score": killed / total}
    summary["survivors_without_a_reason"] = sum(not mutant["why"] for mutant in survivors)
    (HERE / "mutations.json").write_text(json.dumps(summary | {"survivors": survivors}, indent=1) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
