"""Several processes: torchrun, weights spread over them (FSDP2), and the faults of peers.

    torchrun --nproc-per-node 4 grpo_lora.py ...          # add --fsdp for a base too big for one

The trainer itself works in several processes: see `gather` and `share` in grpo_lora.py.
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from grpo_lora import CausalLM, Rollout, evaluating, rank_and_world, widest


class PeerError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


def join_processes(ddp_timeout: float) -> None:
    """Under torchrun: meet the others. ddp_timeout: seconds that one waits for the others."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=ddp_timeout))


def exit_process(status: int) -> int:
    """Return the exit status. With several processes, exit at once if it is not 0: the others must
    not wait for this one."""
    if dist.is_initialized():
        if status:
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


def say(text: str) -> None:
    """To stderr, once and not by every process."""
    if rank_and_world()[0] == 0:
        print(text, file=sys.stderr)


@contextmanager
def peers_answer() -> Iterator[None]:
    """PeerError, in one line, for what torch.distributed raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        talking = any(Path(dist.__file__).parent in Path(f.filename).parents for f in frames)
        if not talking or isinstance(error, torch.OutOfMemoryError):
            raise
        rank, world = rank_and_world()
        reason = str(error).partition("\n")[0]
        raise PeerError(
            f"process {rank} of {world}: another process has ended or does not answer "
            f"({reason:.200}); --resume goes on from the newest checkpoint"
        ) from error


def choose_device(name: str, fsdp: bool) -> torch.device:
    """The device of this process. Raises ValueError, in one line, if there is none such."""
    try:
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if name in ("auto", "cuda") and 0 < gpus <= local:
            here = f"process {local + 1} of this machine, which has {gpus} GPU(s)"
            raise ValueError(f"--device {name}: {here}")
        auto = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        ours = name == "auto" or (name == "cuda" and gpus > 0)  # without a GPU "cuda" is refused
        device = torch.device(auto if ours else name)
        if fsdp and device.type != torch.device(auto).type:
            kind = torch.device(auto).type
            raise ValueError(f"--device {name}: fsdp spreads the model over {kind} devices here")
        if device.type == "cuda" and rank_and_world()[1] > 1:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device, dtype=widest(device)).item()  # tokens are drawn in it
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None


# ------------------------------------------------------------------------------------------- FSDP2


def shard_base(model: nn.Module) -> None:
    """FSDP2: the frozen weights of the decoder's layers are spread over the processes. A layer's
    weights are fetched when it runs.

    What is trained, the embeddings and the head (which may be one with them) stay whole in every
    process. Call it before the trainer is made, and give that an engine that keeps InStep.
    """
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    if not dist.is_initialized() or len(trained) == len(list(model.parameters())):
        raise ValueError(
            "fsdp: spreads frozen weights over processes; start with torchrun, and train adapters"
        )
    decoder = CausalLM(model).decoder
    size = lambda module: sum(p.numel() for p in module.parameters())
    layers = max((m for m in decoder.modules() if isinstance(m, nn.ModuleList)), key=size)
    for layer in layers:
        fully_shard(layer, ignored_params=trained)
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(
        decoder, ignored_params={p for p in model.parameters() if p not in inside} | trained
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")


class InStep:
    """An engine around another one. Every process makes the same number of forwards, as FSDP needs:
    a layer's weights are fetched by all processes at once."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def generate(
        self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, **settings: Any
    ) -> Rollout:
        rollout = self.engine.generate(model, prompt_ids, prompt_mask, **settings)
        lm, G = CausalLM(model), settings["num_generations"]
        lengths = rollout.completion_mask.sum(dim=1)
        with torch.no_grad(), evaluating(lm.core):
            for _, _, rows in lm.prompt_batches(prompt_ids, prompt_mask, G):
                for _ in range(int(lengths[rows].max()), settings["max_completion_length"]):
                    lm.hidden(prompt_ids[:1], prompt_mask[:1])  # others may still be writing
        return rollout

    def completion_logps(
        self, model: nn.Module, rollout: Rollout, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        T = rollout.completion_ids.shape[1]
        if T == 1:  # one forward, where longer rows take two: so they are made longer
            names = ("completion_ids", "completion_mask", "logps")
            wider = {name: pad(getattr(rollout, name), (0, 1)) for name in names}
            rollout = dataclasses.replace(rollout, **wider)
        logps, entropies = self.engine.completion_logps(model, rollout, **settings)
        return logps[:, :T], entropies[:, :T]
