"""Save a run and go on with it, to the bit.

    GRPOTrainer(model, ..., callbacks=[Checkpoints(save_steps=50, resume=True)])

A checkpoint is written whole or not at all: under another name first, with a hash of every file,
and then renamed. A resumed run ends with the same bytes as one that never stopped.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import shutil
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from grpo_lora import GRPOTrainer, Record, gather, rank_and_world, to_json
from lora import LoRAConfig, save_lora
from runner.processes import say

# settings that may differ when a run is resumed: they change its results by rounding at most (but
# the size of a micro-batch also which inputs lora_dropout drops)
MAY_CHANGE = {"output_dir", "eval_steps", "per_device_train_batch_size", "gradient_checkpointing"}
# learning rates that do not depend on max_steps, which may then differ too
ENDLESS = {"constant", "constant_with_warmup", "inverse_sqrt"}


class ResumeError(ValueError):
    """The run in output_dir cannot be resumed with these settings. The message names the one."""


class Checkpoints(Record):
    """A callback: records a run as grpo_lora.Record does, and saves its state.

    save_steps: every so many updates, and at the end; 0: where it is stopped. save_total_limit: how
    many to keep; None: all. resume: go on from the newest intact checkpoint in output_dir, if there
    is one.
    Stand it after callbacks that add to the metrics.
    """

    def __init__(
        self, save_steps: int = 50, save_total_limit: int | None = 2, resume: bool = False
    ) -> None:
        if save_steps < 0 or (save_total_limit is not None and save_total_limit < 1):
            what = f"save_steps = {save_steps}, save_total_limit = {save_total_limit}"
            raise ValueError(f"{what}: at least 0, and at least 1; None keeps all checkpoints")
        self.save_steps, self.save_total_limit, self.resume = save_steps, save_total_limit, resume
        self.identity: dict[str, Any] = {}
        self.saved = -1  # the update that was saved last
        self.trainer: Callable[[], Any] = lambda: None  # a weak reference
        self.lock: Any = None

    def begin(self, trainer: GRPOTrainer) -> None:
        if self.trainer() is trainer:  # train was called a second time
            return
        check_output_dir(trainer.args.output_dir, self.resume)
        if not trainer.args.output_dir:
            raise ValueError("output_dir: checkpoints need a folder")
        gather(None)  # all processes have looked before one of them writes
        if trainer.rank == 0:
            self.lock = lock(Path(trainer.args.output_dir))
        self.identity, self.saved = identity(trainer), -1
        if self.resume:
            load_newest(trainer, self.identity)
            if len(set(gather(trainer.step))) > 1:
                what = "the processes found different checkpoints"
                raise ResumeError(f"resume: {what}; output_dir must be on a disk that all share")
            if trainer.rank == 0:
                cut_back(trainer)
        if trainer.rank == 0:
            write_identity(Path(trainer.args.output_dir), self.identity)
        self.trainer = weakref.ref(trainer)  # not where this was refused

    def __call__(self, trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
        super().__call__(trainer, metrics)
        due = trainer.step >= trainer.end or trainer.due(self.save_steps)
        if trainer.step and (trainer.stop or (self.save_steps and due)):
            self.save(trainer)

    def save(self, trainer: GRPOTrainer) -> None:
        """Save now, unless the policy itself is not finite, or this update has been saved."""
        if trainer.step == self.saved:
            return
        self.saved = trainer.step
        if trainer.rank == 0 and all(bool(p.isfinite().all()) for p in trainer.params.values()):
            root = Path(str(trainer.args.output_dir))
            for name in ("metrics.jsonl", "completions.jsonl"):
                fsync(root / name)
            save_checkpoint(trainer, self.identity)
            if self.save_total_limit:
                mine = [p for p in checkpoints(root) if number(p) <= trainer.step]
                for old in mine[self.save_total_limit :]:  # later ones are damaged: left alone
                    old.unlink() if old.is_symlink() else shutil.rmtree(old)


def check_output_dir(output_dir: str | None, resume: bool) -> None:
    """Raises ValueError if a run cannot write there, or if another run has."""
    if resume and not output_dir:
        raise ValueError("resume: needs output_dir, the folder of the run to go on with")
    if output_dir:
        path = Path(output_dir).absolute()
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            what = "cannot be written to" if there.is_dir() else "is a file"
            raise ValueError(f"output_dir: {there} {what}; name another folder")
    if output_dir and not resume:
        names = (
            "metrics.jsonl",
            "completions.jsonl",
            "adapter",
            "summary.json",
            "run.json",
            "settings.args",
        )
        held = [name for name in names if (Path(output_dir) / name).exists()]
        held += [p.name for p in Path(output_dir).glob("checkpoint-*")]
        if held:
            what = f"{output_dir} holds another run ({held[0]})"
            raise ValueError(f"output_dir: {what}; resume it or name a new one")


def lock(root: Path) -> Any:
    """Mark a folder as this process's while the file that this returns is open. Raises ResumeError
    if it is another one's."""
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / ".lock", "a", encoding="utf-8")  # noqa: SIM115
    with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, a disk maybe no locks
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            what = f"another process is training in {root}"
            raise ResumeError(f"output_dir: {what}; wait for it, or name a new folder") from None
    return file


def identity(trainer: GRPOTrainer) -> dict[str, Any]:
    """What must be the same for a resumed run to be the run that it resumes."""
    settings = dataclasses.asdict(trainer.args)
    free = MAY_CHANGE | ({"max_steps"} if trainer.args.lr_scheduler_type in ENDLESS else set())
    same = {name: value for name, value in settings.items() if name not in free}
    lora = getattr(trainer.model, "lora_config", None)
    if isinstance(lora, LoRAConfig):
        same |= {f"lora.{name}": value for name, value in dataclasses.asdict(lora).items()}
    for name, rows in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset or ())):
        data = hashlib.sha256()
        for i in range(len(rows)):
            data.update(json.dumps(rows[i], default=as_text).encode())
        same[f"{name} data"] = data.hexdigest()
    template = str(getattr(trainer.tokenizer, "chat_template", None))
    same["chat template"] = hashlib.sha256(template.encode()).hexdigest()
    frozen = ((n, p) for n, p in trainer.model.named_parameters() if not p.requires_grad)
    same |= {"base model": fingerprint(frozen)}
    funcs = zip(map(inspect.unwrap, trainer.reward_funcs), trainer.reward_names, strict=True)
    same["rewards"] = [f"{getattr(f, '__module__', '')}:{name}" for f, name in funcs]
    same["reference"] = "a copy" if hasattr(trainer.reference, "tensors") else "the base model"
    shapes = {name: list(p.shape) for name, p in trainer.params.items()}
    return json.loads(to_json(same | {"trainable parameters": shapes}))


def as_text(value: Any) -> Any:
    """What JSON lacks, such as a set or a function, as the same text in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return getattr(value, "__qualname__", None) or str(value)


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Tells base models apart, and their dtypes, by a sample of each tensor."""
    digest = hashlib.sha256()
    for name, p in parameters:
        whole: Any = p.full_tensor() if hasattr(p, "full_tensor") else p  # FSDP spreads it
        sample = whole.detach().flatten()[:: p.numel() // 32 + 1].tolist()
        digest.update(f"{name} {p.dtype} {sample}".encode())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What may change the results by rounding."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "machine": platform.machine()}
    return versions | {"threads": torch.get_num_threads(), "processes": rank_and_world()[1]}


def save_checkpoint(trainer: GRPOTrainer, same: dict[str, Any]) -> Path:
    """Write checkpoint-N, all or nothing.

    Raises OSError, with the state of things, if it cannot be written (a full disk, say). Older
    checkpoints are not touched.
    """
    root = Path(str(trainer.args.output_dir))
    final, scratch = root / f"checkpoint-{trainer.step}", root / f".checkpoint-{trainer.step}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        save_lora(trainer.model, scratch / "adapter")
        torch.save(trainer.state_dict(), scratch / "trainer.pt")
        files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
        hashes = {path.relative_to(scratch).as_posix(): sha256(path) for path in files}
        state = {"step": trainer.step, "run": same, "made_with": machine(), "files": hashes}
        text = to_json(state)
        text = to_json(state | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
        (scratch / "state.json").write_text(text, encoding="utf-8")
        for path in [*scratch.rglob("*"), scratch]:
            fsync(path)
        if final.exists():  # a torn one of the same number, which --resume passed over
            os.replace(final, root / f"torn-{final.name}-{time.time_ns()}")
        os.replace(scratch, final)
        fsync(root)
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        what = f"{final} could not be written: {error}"
        raise OSError(f"{what}; earlier checkpoints are as they were") from error
    return final


def load_newest(trainer: GRPOTrainer, same: dict[str, Any]) -> None:
    """Bring the trainer to the newest intact checkpoint of output_dir, if there is one.

    Raises ResumeError, naming the setting, if the run to resume was another one.
    """
    for folder in checkpoints(Path(str(trainer.args.output_dir))):
        state, damage = read_state(folder)
        if damage:
            say(f"resume: passing over {folder}: {damage}")
            continue
        check_same(state["run"], same)
        for name, value in machine().items():
            if state["made_with"].get(name) != value:
                was = f"{name} was {state['made_with'].get(name)}, now {value}"
                say(f"resume: {was}: results may differ by rounding")
        saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        trainer.load_state_dict(saved)
        say(f"resume: going on from {folder}")
        return
    root = Path(str(trainer.args.output_dir))
    if (root / "adapter").exists() and max(recorded(root), default=1) > 0:
        what = f"{root} holds the adapter of a run that ended, and no intact checkpoint"
        raise ResumeError(f"resume: {what}; name a new folder, as this would write over it")
    if (root / "run.json").exists():
        check_same(read_identity(root), same)
    elif held := [p.name for p in root.glob("*.jsonl") if p.stat().st_size]:
        what = f"{root} holds {held[0]} of a run that saved nothing to go on from"
        raise ResumeError(f"resume: {what}; name a new folder, as this would write over it")
    say(f"resume: no intact checkpoint in {root}, starting at the beginning")


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ResumeError, naming the setting, if these are the identities of different runs."""
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            what = f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
            advice = "it must stay, or start a new run in another folder"
            raise ResumeError(f"resume: {what:.300}; {advice}")


def write_identity(root: Path, same: dict[str, Any]) -> None:
    """run.json, whole or not at all: what a run is, also before its first checkpoint."""
    scratch = root / ".run.json.tmp"
    scratch.write_text(to_json(same) + "\n", encoding="utf-8")
    fsync(scratch)
    os.replace(scratch, root / "run.json")


def read_identity(root: Path) -> dict[str, Any]:
    """What write_identity wrote. Raises ResumeError for a file that it did not write."""
    try:
        return dict(json.loads((root / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        what = f"{root / 'run.json'} cannot be read: {error}"
        raise ResumeError(f"resume: {what}; name a new folder") from None


def read_state(folder: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state.json, and what is wrong with the checkpoint; '' if nothing is."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        digest = state.pop("sha256")
        if hashlib.sha256(to_json(state).encode()).hexdigest() != digest:
            return {}, "state.json has changed"
        for name, known in state["files"].items():
            if sha256(folder / name) != known:
                return {}, f"{name} has changed"
        return state, ""
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return {}, f"{type(error).__name__}: {error}"


def cut_back(trainer: GRPOTrainer) -> None:
    """Drop from a run's record what came after the checkpoint, a torn last line included. Nothing
    is kept where the run starts over. Says which updates the record lacks."""
    root, step, n = Path(str(trainer.args.output_dir)), trainer.step, trainer.args.num_iterations
    for path in (root / "metrics.jsonl", root / "completions.jsonl"):
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            kept = [line for line in lines if step and 0 <= step_of(line) <= step]
            scratch = path.with_suffix(".tmp")
            scratch.write_bytes(b"".join(line + b"\n" for line in kept))
            os.replace(scratch, path)
    if lost := sorted({*range(n, step + 1, n)} - recorded(root)):
        what = f"lacks {len(lost)} of {step // n} lines, the first that of update {lost[0]}"
        say(f"resume: {root / 'metrics.jsonl'} {what}")


def recorded(root: Path) -> set[int]:
    """The updates that a run's metrics are of; 0 for an evaluation before the first."""
    path = root / "metrics.jsonl"
    return {step_of(line) for line in path.read_bytes().split(b"\n")} if path.exists() else set()


def step_of(line: bytes) -> int:
    """The update that a line of a record is about; -1 for a line that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in root.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=number, reverse=True)


def number(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Onto the disk. Windows opens no folders, and writes back only what is open for writing."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
