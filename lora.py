"""LoRA from scratch: train a low-rank change of frozen weights.

A linear layer computes W x. LoRA (Hu et al. 2021) freezes W and uses W + s·B A: A (r, in) and B
(out, r) are trained, r is small, s a constant. B starts at zero, so training starts at the base
model, which stays one switch away: GRPO's reference policy needs no second copy of the weights.

    model = apply_lora(model, LoRAConfig(r=16, lora_alpha=32))   # in place; the rest is frozen
    with lora_disabled(model): ...                               # bit for bit the base model
    with lora_merged(model), torch.no_grad(): ...                # dense weights, for fast rollouts
    save_lora(model, "adapter"); load_lora(base, "adapter")      # files that PEFT reads and writes

The frozen weights may be quantised. Left out, and refused: embeddings and convolutions as targets,
biases, several adapters at once, fused expert weights of mixtures of experts. (PEFT has them.)
"""

import copy
import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from numbers import Integral, Real
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer: its weight is (in, out)

# ---------------------------------------------------------------------------------- configuration


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of settings. rules: see check_settings."""
    kind: dict[str, Any] = {"default_factory": dict} if default == {} else {"default": default}
    return field(**kind, metadata={"help": help, **rules})


# fmt: off
@dataclass
class LoRAConfig:
    """What to adapt and how. Names, meanings and defaults are PEFT's (but for target_modules)."""

    r: int = setting(8, "Rank of the update B A.", at_least=1)
    lora_alpha: float = setting(8, "The update is scaled by s = lora_alpha / r.", above=0)
    lora_dropout: float = setting(0.0, "Dropout of its input, in training.", at_least=0, below=1)
    # "all-linear" is every linear layer but the output head
    target_modules: str | list[str] = setting("all-linear", "'all-linear', a regex, or names.")
    modules_to_save: list[str] | None = setting(None, "Modules of which a full copy is trained.")
    bias: str = setting("none", "Only 'none': biases stay frozen.", choices=["none"],
                        why="; or use modules_to_save")
    use_rslora: bool = setting(False, "s = lora_alpha / sqrt(r) (Kalajdzievski 2023).")
    use_dora: bool = setting(False, "Train magnitude and direction apart (Liu et al. 2024).")
    init_lora_weights: bool | str = setting(True, "True (A uniform, B 0), 'gaussian' or 'pissa'.",
                                            choices=[True, "gaussian", "pissa"])
    rank_pattern: dict[str, int] = setting({}, "Module name or regex -> its own r.", at_least=1)
    alpha_pattern: dict[str, float] = setting({}, "Name or regex -> its own lora_alpha.", above=0)
    # fmt: on

    def __post_init__(self) -> None:
        check_settings(self)
        targets = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in [*targets, *self.rank_pattern, *self.alpha_pattern]:
            with naming(f"{pattern!r} is not a regular expression", re.error):
                re.compile(pattern if pattern in targets else f"({pattern})")  # as _by_pattern does


# ----------------------------------------------------------------------------------------- layers


class _Switchable(nn.Module):
    """A wrapper around a module, which can be switched off. It shows the module's attributes."""

    disabled = False  # True within lora_disabled
    wrapped = ""  # name of the submodule whose attributes (weight, in_features, ...) show through

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.wrapped), name)


class LoRALinear(_Switchable):
    """y = base(x) + s·B(A(dropout(x)))    s = α/r, or α/√r with use_rslora; α is lora_alpha

    x (..., in) -> y (..., out). At first A (r, in) ~ U(±1/√in), B (out, r) = 0. The base layer
    is never written to. Adapters are float32 on a half-precision base (float64 on a float64 one).

    DoRA (Liu et al. 2024, eq. 5): y = (m/n)(W + s·B A) x + bias. n = ‖W + s·B A‖ (out,) are
    the rows' lengths, without gradient; m starts as n and is trained. As a change of base(x):

        y = base(x) + (m/n - 1)(base(x) - bias) + (m/n) s·B(A(x))

    >>> layer = LoRALinear(nn.Linear(3, 2), r=1, alpha=1, config=LoRAConfig())
    >>> torch.equal(layer(torch.ones(3)), layer.base_layer(torch.ones(3)))  # B is 0
    True
    """

    wrapped = "base_layer"

    def __init__(self, base: Any, r: int, alpha: float, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = base
        self.transposed = isinstance(base, Conv1D)
        self.scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        sizes = (base.nx, base.nf) if self.transposed else (base.in_features, base.out_features)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        options: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(sizes[0], r, **options)
        self.lora_B = nn.Linear(r, sizes[1], **options)
        self.lora_magnitude_vector: Any = None  # DoRA's m
        self.residual: Tensor | None  # PiSSA: W less the initial s·B A; in W's place
        self.register_buffer("residual", None, persistent=False)
        self.merged: Tensor | None = None  # (out, in), within lora_merged
        with torch.no_grad():
            self._init_weights(config, r)

    def _init_weights(self, config: LoRAConfig, r: int) -> None:
        A, B = self.lora_A.weight, self.lora_B.weight
        nn.init.zeros_(B)
        if config.init_lora_weights == "pissa":
            W = dense_weight(self.base_layer)
            # Meng et al. 2024. W = U S Vᵀ: s·B A starts as its r largest terms; the rest stays
            if r > min(W.shape):
                raise ValueError(f"r = {r}, W is {tuple(W.shape)}: PiSSA needs r <= {min(W.shape)}")
            U, S, Vh = torch.linalg.svd(W.to(A.dtype), full_matrices=False)
            root = (S[:r] / self.scaling).sqrt().diag()
            A.copy_(root @ Vh[:r])
            B.copy_(U[:, :r] @ root)
            self.residual = (W.to(A.dtype) - self.scaling * B @ A).to(W.dtype)
        elif config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            # Why √5? kaiming_uniform_ draws from ±√(6 / ((1 + a²) in)), so a = √5 gives
            # ±1/√in, which is nn.Linear's own default
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self._norm())

    def _frozen(self) -> Tensor:
        """(out, in), the frozen part of the weight: W, or with PiSSA what is left of it."""
        return dense_weight(self.base_layer) if self.residual is None else self.residual

    def _norm(self) -> Tensor:
        """DoRA's n (out,): ‖W + s·B A‖ per output row, in PEFT's order, so rounding agrees."""
        delta = self.lora_B(self.lora_A.weight.T).T
        return torch.linalg.norm(self._frozen().to(delta.dtype) + self.scaling * delta, dim=1)

    def merged_weight(self) -> Tensor:
        """(out, in): the one dense weight that does what base and adapter do together."""
        A, B, W = self.lora_A.weight, self.lora_B.weight, self._frozen()
        weight = torch.addmm(W.to(A.dtype), B, A, alpha=self.scaling)  # W + s·B A
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / self._norm()).unsqueeze(1)
        return weight.to(W.dtype)

    def _down(self, x: Tensor) -> Tensor:
        """A(x), (..., r), in the adapter's precision."""
        return self.lora_A(x.to(self.lora_A.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.base_layer(x)
        if self.merged is not None:
            return F.linear(x, self.merged.to(x.dtype), self.base_layer.bias)
        bias, residual = self.base_layer.bias, self.residual
        result = self.base_layer(x) if residual is None else F.linear(x, residual.to(x.dtype), bias)
        dropout = self.lora_dropout.training and self.lora_dropout.p > 0
        x_adapter = self.lora_dropout(x.to(self.lora_A.weight.dtype)) if dropout else x
        change = self.lora_B(self._down(x_adapter))
        if self.lora_magnitude_vector is None:  # in place: no third tensor of this size
            return change.mul_(self.scaling).add_(result).to(result.dtype)
        plain = result if bias is None else result - bias
        if dropout:  # the formula's second base(x) sees dropout too
            plain = F.linear(x_adapter, self._frozen().to(x_adapter.dtype))
        ratio = self.lora_magnitude_vector / self._norm().detach()
        added = (ratio - 1) * plain + ratio * change * self.scaling  # in PEFT's order
        return (result + added).to(result.dtype)


REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes: eval mode repacks, and ends the gradient


def is_dense(base: Any) -> bool:
    """Whether a layer's weight is a matrix of numbers, rather than quantised."""
    return type(base.weight) in (Tensor, nn.Parameter) and base.weight.is_floating_point()


@torch.no_grad()
def dense_weight(base: Any) -> Tensor:
    """(out, in): a linear layer's weight. Of a quantised one: base(identity)ᵀ less the bias."""
    if is_dense(base):
        return base.weight.T if isinstance(base, Conv1D) else base.weight
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    parts = torch.arange(base.in_features, device=base.weight.device).split(1024)
    Wt = torch.cat([base(F.one_hot(i, base.in_features).to(dtype)) for i in parts])  # (in, out)
    return (Wt if base.bias is None else Wt - base.bias).T


class TrainedCopy(_Switchable):
    """A module trained in full (modules_to_save), beside the original that it was copied from."""

    wrapped = property(lambda self: "original" if self.disabled else "trained")  # type: ignore

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.trained = copy.deepcopy(original).requires_grad_(True)
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.original if self.disabled else self.trained)(*args, **kwargs)


Adapters = dict[str, LoRALinear | TrainedCopy]  # by module name

# ------------------------------------------------------------------------------------------ apply


def apply_lora(model: Any, config: LoRAConfig) -> Any:
    """Put adapters into `model`, in place, freeze the rest, and return it. Raises ValueError, with
    the names that would do, where a target, a module to save or a pattern matches nothing; the
    model is then left as it was."""
    return _insert(model, config, make_adapters(getattr(model, "_orig_mod", model), config))


def make_adapters(model: Any, config: LoRAConfig, strict: bool = True) -> Adapters:
    """The adapters that a config asks for, by module name; they are not in the model yet. strict:
    every name in the config must match a module. (PEFT is content if one does.)"""
    modules, select = dict(model.named_modules()), partial(_select, strict=strict)
    if hasattr(model, "peft_config") or any(isinstance(m, _Switchable) for m in modules.values()):
        raise ValueError("the model already carries a LoRA adapter: merge_and_unload it first")
    named = select(modules, config.modules_to_save or [], str.endswith, "modules_to_save: none")
    saved = [n for n in named if not any(n.startswith(f"{outer}.") for outer in named)]  # outermost
    inside = lambda name: any(f"{name}.".startswith(f"{s}.") for s in saved)
    linear = [n for n, module in modules.items() if n and _is_linear(module) and not inside(n)]
    others = {type(m).__name__ for n, m in modules.items() if n not in linear and not inside(n)}
    odd = "".join(f" ({kind} cannot be adapted)" for kind in sorted(others) if "Linear" in kind)

    wanted = config.target_modules or ([] if saved else "")  # "" matches no layer
    if wanted == "all-linear" and hasattr(model, "get_output_embeddings"):
        linear = [n for n in linear if modules[n] is not model.get_output_embeddings()]
    keys, matches = ([wanted], _by_regex) if isinstance(wanted, str) else (wanted, _by_ending)
    none = f"target_modules: no linear layer{odd}"
    targets = select(linear, keys, matches, none) or _select(linear, keys, matches, none)
    ranks = select(targets, config.rank_pattern, _by_pattern, "rank_pattern: no adapted layer")
    alphas = select(targets, config.alpha_pattern, _by_pattern, "alpha_pattern: no adapted layer")

    layers: Adapters = {}
    for name in targets:
        r = config.rank_pattern[ranks[name]] if name in ranks else config.r
        alpha = config.alpha_pattern[alphas[name]] if name in alphas else config.lora_alpha
        with naming(name, ValueError):
            layers[name] = LoRALinear(modules[name], r, alpha, config)
    return layers | {name: TrainedCopy(modules[name]) for name in saved}


# PEFT's rules for what a name means: in target_modules as text, and as a list; in ..._pattern
_by_regex = lambda name, regex: regex == "all-linear" or re.fullmatch(regex, name)
_by_ending = lambda name, ending: f".{name}".endswith(f".{ending}")
_by_pattern = lambda name, regex: re.fullmatch(rf"(.*\.)?({regex})", name)


def _select(
    names: Collection[str], keys: Collection[str], matches: Any, nothing: str, strict: bool = True
) -> dict[str, str]:
    """name -> the first key that it matches, of the names that match one. strict: raises ValueError
    for a key that matches no name; its message starts with `nothing`, and lists the names."""
    for key in keys if strict else ():
        if not any(matches(name, key) for name in names):
            there = {end for n in names if not (end := n.rpartition(".")[2]).isdigit()} - {""}
            raise ValueError(f"{nothing} matches {key!r}; there are {', '.join(sorted(there))}")
    found = {name: [key for key in keys if matches(name, key)] for name in names}
    return {name: matching[0] for name, matching in found.items() if matching}


def _insert(model: Any, config: LoRAConfig, layers: Adapters) -> Any:
    """Put adapters in the places of their modules, and freeze all else."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(model.get_submodule(name).training)
        model.set_submodule(name, layer)
    names = [name for name, layer in layers.items() if isinstance(layer, LoRALinear)]
    saved = [name for name in layers if name not in names] or None
    model.lora_config = replace(copy.deepcopy(config), target_modules=names, modules_to_save=saved)
    return model


@torch.no_grad()
def _is_linear(m: Any) -> bool:
    """Whether a module is a linear layer. One with its own forward must act like one."""
    if type(m).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if hasattr(m, REPACKS):
        setattr(m, REPACKS, False)
    try:
        W = dense_weight(m)
        x = torch.ones(2, m.in_features, dtype=W.dtype, device=W.device, requires_grad=True)
        with torch.enable_grad():
            y = m(x).view(2, m.out_features).float()
            torch.autograd.grad(y.sum(), x)
        return torch.allclose(y, F.linear(x, W, m.bias).float(), 0.02, 0.02)
    except Exception:  # no sizes, no gradient; a router takes other inputs, and may raise anything
        return False


def _adapters(model: nn.Module) -> Adapters:
    adapters: Any = {n: m for n, m in model.named_modules() if isinstance(m, _Switchable)}
    if not adapters:
        raise ValueError("the model carries no LoRA adapter: call apply_lora or load_lora first")
    return adapters


# ---------------------------------------------------------------------------- switch off and merge


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base model, bit for bit. Nests; restores on exceptions."""
    with ExitStack() as stack:
        for module in _adapters(model).values():
            stack.enter_context(patch.object(module, "disabled", True))
        yield


@contextmanager
def lora_merged(model: nn.Module) -> Iterator[None]:
    """Within it each adapted layer is one dense product with W + s·B A: faster, for rollouts.

    The merged weights lie beside the base weights, which are not touched. Merging in place would
    move tied embeddings along, and drift by rounding. Raises RuntimeError from a backward pass
    inside, or through what was computed inside: A and B would get no gradient.
    """

    def refuse(gradient: Tensor) -> Tensor:
        raise RuntimeError("lora_merged hides the adapter: run forward and backward outside it")

    layers = [m for m in _adapters(model).values() if isinstance(m, LoRALinear)]
    with ExitStack() as stack:
        for layer in layers:
            # weight's hook refuses backward of a forward made inside; B's, any backward made inside
            weight = layer.merged_weight().detach().requires_grad_()
            weight.register_hook(refuse)
            if layer.lora_B.weight.requires_grad:
                stack.enter_context(layer.lora_B.weight.register_hook(refuse))
            stack.enter_context(patch.object(layer, "merged", weight))
        yield


class lora_snapshot:
    """A frozen copy of the policy; `with snapshot(): ...` runs it. tensors: what is trained."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor] | None = None) -> None:
        self.model, named = model, model.named_parameters()
        self.tensors = tensors or {n: p.detach().clone() for n, p in named if p.requires_grad}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        now = dict(self.model.named_parameters())  # by id below, as a tied weight has two places
        frozen = {id(now[name]): t.to(now[name].device) for name, t in self.tensors.items()}
        with ExitStack() as stack:
            for module in self.model.modules():
                held = module._parameters
                own = {key: frozen[id(p)] for key, p in held.items() if id(p) in frozen}
                stack.enter_context(patch.dict(held, own))
                if isinstance(module, LoRALinear):  # what lora_merged merged is the policy of now
                    stack.enter_context(patch.object(module, "merged", None))
            yield


def default_reference(model: nn.Module) -> Callable[[], Any]:
    """The policy as it is now: if nothing is trained yet lora_disabled, else a snapshot."""
    adapters: Any = {n: m for n, m in model.named_modules() if isinstance(m, _Switchable)}
    own = {id(p) for p in _file_tensors(adapters).values()}  # what lora_disabled switches off
    same = lambda m: all(map(torch.equal, m.trained.parameters(), m.original.parameters()))
    fresh = lambda m: same(m) if isinstance(m, TrainedCopy) else not m.lora_B.weight.any()
    trained = (p for p in model.parameters() if p.requires_grad)
    if own and all(map(fresh, adapters.values())) and all(id(p) in own for p in trained):
        return lambda: lora_disabled(model)
    return lora_snapshot(model)


def merge_and_unload(model: Any) -> Any:
    """Fold the adapter into the weights and remove it. Returns the model, trainable but for what
    is still quantised. An adapted head that was tied to the embedding gets a weight of its own."""
    for name, module in _adapters(model).items():
        if isinstance(module, LoRALinear):
            base, weight = module.base_layer, module.merged_weight().detach()
            if not is_dense(base):  # it was quantised, and is no more
                dense = nn.Linear(base.in_features, base.out_features, device="meta")
                dense.bias, base = base.bias, dense
                weight = weight.to(getattr(model, "dtype", weight.dtype))
            base.weight = nn.Parameter((weight.T if module.transposed else weight).contiguous())
            model.set_submodule(name, base)
        else:
            model.set_submodule(name, module.trained)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    del model.lora_config
    for parameter in model.parameters():
        parameter.requires_grad = type(parameter) is nn.Parameter and parameter.is_floating_point()
    return model


# ------------------------------------------------ parameters, files (a first reading ends here)


def param_groups(
    model: nn.Module, lr: float, lora_plus_ratio: float = 1, modules_to_save_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups of all that is trainable, each with params, lr and a name.

        "A": lr        "B", with DoRA's magnitudes: lr · lora_plus_ratio        "full": the rest

    LoRA+ (Hayou et al. 2024): the best rate of B is above that of A. The best rate of parameters
    trained in full, modules_to_save_lr (None: lr), is about a tenth of an adapter's.
    """
    full = lr if modules_to_save_lr is None else modules_to_save_lr
    rates = {"A": lr, "B": lr * lora_plus_ratio, "full": full}
    kinds = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "B"}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next((kinds[part] for part in name.split(".") if part in kinds), "full")
            groups[kind].append(parameter)
    return [{"params": ps, "lr": rates[kind], "name": kind} for kind, ps in groups.items() if ps]


PREFIX = "base_model.model."  # PEFT's nesting: PeftModel.base_model (a LoraModel) .model
# PEFT settings that we lack, at values that do nothing (None, False and empty ones do nothing)
INACTIVE = {"megatron_core": "megatron.core", "qalora_group_size": 16}
IGNORED = "base_model_name_or_path peft_type task_type peft_version".split()
IGNORED += "revision inference_mode fan_in_fan_out auto_mapping".split()


def _file_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """PEFT's file keys -> our tensors: all of an adapter but the original module."""
    tensors: dict[str, Tensor] = {}
    for name, module in adapters.items():
        for key, value in module.state_dict(keep_vars=True).items():
            if not key.startswith(("base_layer.", "original.")):
                tensors[f"{PREFIX}{name}.{key.removeprefix('trained.')}"] = value
    return tensors


def save_lora(model: Any, directory: str | Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, in PEFT's format: the adapter, and
    nothing else that is trained. A model without one of ours is saved by its own library."""
    if not hasattr(model, "lora_config"):
        return model.save_pretrained(directory)
    directory, adapters = Path(directory), _adapters(getattr(model, "_orig_mod", model))
    directory.mkdir(parents=True, exist_ok=True)
    base_name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    config |= {"fan_in_fan_out": any(getattr(m, "transposed", False) for m in adapters.values())}
    config |= {"base_model_name_or_path": base_name, **asdict(model.lora_config)}
    tensors = {k: v.detach().contiguous().cpu() for k, v in _file_tensors(adapters).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, default=lambda x: x.item()) + "\n"  # x: NumPy's number
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def load_lora(model: Any, directory: str | Path) -> Any:
    """Put a saved adapter, ours or PEFT's, on a base model, trainable. Returns the model.

    Raises ValueError, naming file and tensor, for anything that does not fit; the model is then as
    it was. (PEFT loads what fits, and an adapter with wrong names as one that does nothing.)
    """
    config, file = read_lora_config(directory), Path(directory) / "adapter_model.safetensors"
    with naming(f"{file}: cannot be read as a safetensors file", OSError, SafetensorError):
        tensors = load_file(file)
    with naming(directory, ValueError):
        adapters = make_adapters(model, config, strict=False)
    wanted, base = _file_tensors(adapters), dict(model.named_parameters(remove_duplicate=False))
    for key in tensors.keys() - wanted.keys():  # PEFT adds the base weight of an adapted head
        weight = base.get(key.removeprefix(PREFIX).replace(".base_layer", ""))
        if weight is not None and torch.equal(weight.cpu(), tensors[key].to(weight.dtype)):
            del tensors[key]
    for key in sorted(tensors.keys() | wanted.keys()):
        have, need = (tuple(t[key].shape) if key in t else "none" for t in (tensors, wanted))
        if have != need:
            reasons = "it is missing, has another rank, or belongs to another base model"
            raise ValueError(f"{file}: tensor {key} is {have}, must be {need} here: {reasons}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
    return _insert(model, config, adapters)


def read_lora_config(directory: str | Path) -> LoRAConfig:
    """The LoRAConfig of a saved adapter. Raises ValueError for an active PEFT setting we lack."""
    file = Path(directory) / "adapter_config.json"
    with naming(f"{file}: cannot be read as JSON", OSError, ValueError):
        raw = json.loads(file.read_text(encoding="utf-8"))
    found = raw.get("peft_type") if isinstance(raw, dict) else None
    if found != "LORA":
        raise ValueError(f"{file}: peft_type is {found!r}; only 'LORA' adapters can be loaded")
    ours = {f.name for f in fields(LoRAConfig)}
    for key, value in raw.items():
        if key not in ours and key not in IGNORED and value and value != INACTIVE.get(key):
            raise ValueError(f"{file}: {key} = {value!r} does not work here; load it with peft")
    if raw.get("init_lora_weights") in (False, "orthogonal"):  # these leave W alone
        raw["init_lora_weights"] = True  # and A and B are in the file
    given = {key: value for key, value in raw.items() if key in ours and value is not None}
    with naming(file, ValueError, TypeError):
        return LoRAConfig(**given)


# ---------------------------------------------------------------------------- settings and errors


def check_settings(settings: Any) -> None:
    """Raises ValueError for a setting that breaks its rules: choices; or at_least, above, at_most
    and below for a number, or for each value of a dict. why: how the message ends."""
    holds = {"at_least": ge, "above": gt, "at_most": le, "below": lt}
    for f in fields(settings):
        value, rules, why = getattr(settings, f.name), f.metadata, f.metadata.get("why", "")
        if f.default_factory is dict and not isinstance(value, dict):
            raise ValueError(f"{f.name} = {value!r}: must map names to values")
        bounds = [rule for rule in holds if rule in rules]
        kind = Integral if int in (f.type, *get_args(f.type)) else Real
        values = {f.name: value}
        if isinstance(value, dict):
            values = {f"{f.name}[{key!r}]": x for key, x in value.items()}
        for name, x in values.items() if value is not None else ():
            if choices := rules.get("choices", [True, False] if f.type is bool else []):
                check_choice(x, choices, name, why)
            number = isinstance(x, kind) and not isinstance(x, bool) and math.isfinite(x)
            if bounds and not (number and all(holds[rule](x, rules[rule]) for rule in bounds)):
                words = " and ".join(f"{rule.replace('_', ' ')} {rules[rule]}" for rule in bounds)
                what = "whole" if kind is Integral else "finite"
                raise ValueError(f"{name} = {x!r}: must be a {what} number {words}{why}")


def check_choice(value: Any, choices: Iterable[Any], what: str, why: str = "") -> None:
    """Raises ValueError for a value that is none of the choices, naming one that is near."""
    if value not in (choices := list(choices)):
        names = list(map(str, choices))
        near = difflib.get_close_matches(str(value), names, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}: {value!r} is unknown{hint} (all: {', '.join(names):.200}){why}")


@contextmanager
def naming(what: Any, *kinds: type[Exception]) -> Iterator[None]:
    """Within it an error of these kinds becomes a ValueError that says what it is about."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{what}: {error}") from error
