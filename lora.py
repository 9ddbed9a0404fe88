"""LoRA from scratch: train a low-rank change of frozen weights, switch it off, merge it, save it in PEFT's format.

A linear layer computes W x. LoRA (Hu et al. 2021) freezes W and learns W + s·B A, with A (r, in), B (out, r) and r
small. B starts at zero, so training starts exactly at the base model, and "the base model" stays one switch away: the
reference policy of GRPO needs no second copy of the weights.

    model = apply_lora(model, LoRAConfig(r=16, lora_alpha=32))      # in place; everything else is frozen
    with lora_disabled(model): ...                                  # bit for bit the base model
    with lora_merged(model), torch.no_grad(): ...                   # dense weights, for fast rollouts
    save_lora(model, "adapter"); load_lora(fresh_base, "adapter")   # files that PEFT reads and writes

Left out: embeddings and convolutions as targets, biases, several adapters at once, quantised bases, and the fused
expert weights of mixture-of-experts models (PEFT has all of these). A setting we lack is refused, never ignored.
"""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is stored as (in, out)

# ---------------------------------------------------------------------------------------------------- configuration


@dataclass
class LoRAConfig:
    """What to adapt and how. Names, meanings and defaults are PEFT's. ValueError for a value that makes no sense."""

    r: int = field(default=8, metadata={"help": "Rank of the update B A."})
    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in training only."})
    target_modules: str | list[str] = field(
        default="all-linear",
        metadata={"help": "'all-linear' (all but the output head), a regular expression, or names of modules."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of which a full copy is trained and saved with the adapter."}
    )
    bias: str = field(default="none", metadata={"help": "Only 'none': biases stay frozen."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023)."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitude and direction apart (Liu et al. 2024)."})
    init_lora_weights: bool | str = field(
        default=True,
        metadata={"help": "True (uniform A, B = 0), 'gaussian' (normal A, B = 0) or 'pissa' (from the SVD)."},
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name or regex -> its own r."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Likewise for lora_alpha."})

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} = {getattr(self, name)!r}: must map module names to values")
        for name, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"{name} = {r!r}: a rank is a whole number of at least 1")
        for name, alpha in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"{name} = {alpha!r}: an alpha is a finite number above 0")
        strings = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in [*strings, *self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout = {self.lora_dropout}: must be at least 0 and below 1")
        if self.bias != "none":
            raise ValueError(f"bias = {self.bias!r}: only 'none' is supported; name whole modules in modules_to_save")
        if self.init_lora_weights is not True and self.init_lora_weights not in ("gaussian", "pissa"):
            raise ValueError(f"init_lora_weights = {self.init_lora_weights!r}: must be True, 'gaussian' or 'pissa'")


def _is_linear(module: Any) -> bool:
    """Whether a module is a linear layer; of subclasses with a forward of their own (routers are some), if it acts so."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight: Any = module.weight
    try:
        x = torch.ones(2, weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            y, wanted = module(x), F.linear(x, weight, module.bias)
        return isinstance(y, Tensor) and torch.allclose(y.float(), wanted.float(), rtol=0.02, atol=0.02)
    except Exception:  # a forward that takes other inputs may raise anything
        return False


def _matches(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a string is a regex for the whole name, a list holds names or dotted endings of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that is a regex for an ending of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


# ------------------------------------------------------------------------------------------------------------ layers


class _Switchable(nn.Module):
    """A wrapper around a module that can be switched off; to the model's code it looks like the module it wraps."""

    disabled = 0  # a count and not a flag, so that contexts nest
    wrapped = ""  # name of the submodule whose attributes (weight, in_features, ...) the wrapper shows

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.wrapped), name)


class _InBlocks(torch.autograd.Function):
    """x Wᵀ, some outputs at a time: x (n, in), W (out/k, in, k), which gets no gradient -> (n, out)."""

    @staticmethod
    def forward(x: Tensor, blocks: Tensor) -> Tensor:  # type: ignore[override]
        return torch.bmm(x.expand(len(blocks), -1, -1), blocks).transpose(0, 1).reshape(len(x), -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (blocks,) = ctx.saved_tensors
        return (blocks.mT.flatten(0, 1).T @ grad.T).T, None


def in_blocks(weight: Tensor, k: int) -> Tensor:
    """(out, in) -> (out/k, in, k), a view; unchanged where `linear` gains nothing by it, or k does not divide out."""
    gains = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()
    return weight.view(-1, k, weight.shape[1]).mT if gains and len(weight) % k == 0 else weight


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, x Wᵀ + bias: x (..., in), W (out, in), or in blocks (out/k, in, k) -> (..., out).

    In float32 on a CPU few rows go through W in blocks: MKL splits one product with so few rows badly between cores, and
    gives each core blocks of its own. A copy with k = 16 is read fastest; without one, k = 64."""
    blocks = weight if weight.dim() == 3 else in_blocks(weight, 64)
    if blocks.dim() == 2:
        return F.linear(input, weight, bias)
    x, with_grad = input.reshape(-1, input.shape[-1]), torch.is_grad_enabled()
    if not 0 < len(x) <= 256 or (with_grad and weight.requires_grad):
        return F.linear(input, blocks.mT.flatten(0, 1), bias)
    product = _InBlocks.apply if with_grad else _InBlocks.forward
    y = product(x, blocks).view(*input.shape[:-1], -1)
    return y if bias is None else y + bias


class _WideLinear(torch.autograd.Function):
    """x Wᵀ in the precision of W (r, in), for x (..., in) in a lower one, of which backward keeps no widened copy."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x, weight), grad = ctx.saved_tensors, grad.to(ctx.saved_tensors[1].dtype)  # autocast may have narrowed it
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        return (grad @ weight).to(x.dtype), grad.reshape(-1, len(weight)).T @ rows


class LoRALinear(_Switchable):
    """y = base(x) + s·B(A(dropout(x)))        s = α/r, or α/√r with use_rslora; x (..., in) -> y (..., out)

    A (r, in) ~ U(±1/√in), B (out, r) = 0. (Why a = √5 below? kaiming_uniform_ draws from ±√(6 / ((1 + a²) in)), so √5
    gives ±1/√in, nn.Linear's own default.) "gaussian": A ~ N(0, 1/r²). "pissa" (Meng et al. 2024): with W = U S Vᵀ,
    A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s), and the residual W - s·B A takes the place of W. With DoRA (Liu et al. 2024,
    eq. 5) n (out,) = ‖W + s·B A‖ per output row, without gradient, and m (out,) is trained and starts as n:

        y = base(x) + (m/n - 1)(base(x) - bias) + (m/n) s·B(A(x))

    The adapter is kept in fp32 on a half-precision base (float64 on a float64 one). The base layer is never written to.

    >>> layer = LoRALinear(nn.Linear(3, 2), r=1, alpha=1, config=LoRAConfig())
    >>> torch.equal(layer(torch.ones(3)), layer.base_layer(torch.ones(3)))  # B is 0
    True
    """

    wrapped = "base_layer"

    def __init__(self, base: nn.Linear | Conv1D, r: int, alpha: float, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = base
        self.transposed = isinstance(base, Conv1D)
        self.scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        out_features, in_features = self._oriented(base.weight).shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        options: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A = nn.Linear(in_features, r, **options)
        self.lora_B = nn.Linear(r, out_features, **options)
        self.lora_magnitude_vector: nn.Parameter | None = None
        self.residual: Tensor | None
        self.register_buffer("residual", None, persistent=False)  # PiSSA's weight while the adapter is on
        self.merged: tuple[Tensor, Tensor | None] | None = (
            None  # within lora_merged: weight, as `linear` takes it, and bias
        )
        with torch.no_grad():
            self._init_weights(config, r)

    def _init_weights(self, config: LoRAConfig, r: int) -> None:
        A, B, W = self.lora_A.weight, self.lora_B.weight, self.base_layer.weight
        if config.init_lora_weights == "pissa":
            if r > min(self._oriented(W).shape):
                raise ValueError(f"r = {r} for a weight of {tuple(W.shape)}: PiSSA needs r <= {min(W.shape)}")
            U, S, Vh = torch.linalg.svd(self._oriented(W).to(A.dtype), full_matrices=False)
            root = (S[:r] / self.scaling).sqrt().diag()
            A.copy_(root @ Vh[:r])
            B.copy_(U[:, :r] @ root)
            self.residual = self._oriented(self._oriented(W).to(A.dtype) - self.scaling * B @ A).to(W.dtype)
        else:
            nn.init.zeros_(B)
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self._norm())

    def _oriented(self, weight: Tensor) -> Tensor:
        """(out, in) from the base layer's own layout, or back: transposing is its own inverse."""
        return weight.T if self.transposed else weight

    def _frozen(self) -> Tensor:
        """The frozen part of the weight, in the base layer's layout: W, or with PiSSA what is left of it."""
        return self.base_layer.weight if self.residual is None else self.residual

    def _norm(self) -> Tensor:
        """DoRA's n, (out,): the length of each output row of W + s·B A. In PEFT's order of operations, to the bit."""
        delta = self.lora_B(self.lora_A.weight.T).T
        return torch.linalg.norm(self._oriented(self._frozen()).to(delta.dtype) + self.scaling * delta, dim=1)

    def merged_weight(self) -> Tensor:
        """The one dense weight that does what base and adapter do together, in the base layer's layout and dtype."""
        A, B = self.lora_A.weight, self.lora_B.weight
        weight = torch.addmm(self._oriented(self._frozen()).to(A.dtype), B, A, alpha=self.scaling)  # W + s·B A
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / self._norm()).unsqueeze(1)
        return self._oriented(weight).to(self.base_layer.weight.dtype).contiguous()

    def _base(self, x: Tensor) -> Tensor:
        """The frozen part of the layer."""
        if self.residual is None:
            return self.base_layer(x)
        return F.linear(x, self._oriented(self.residual), self.base_layer.bias)

    def _down(self, x: Tensor) -> Tensor:
        """A(x), (..., r), in the adapter's precision."""
        return self.lora_A(x) if x.dtype == self.lora_A.weight.dtype else _WideLinear.apply(x, self.lora_A.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.base_layer(x)
        if self.merged is not None:
            return linear(x, *self.merged)
        dropped = self.lora_dropout.training and isinstance(self.lora_dropout, nn.Dropout)
        x_adapter = self.lora_dropout(x.to(self.lora_A.weight.dtype)) if dropped else x
        if self.lora_magnitude_vector is None:
            # s·B(A(x)), to which base(x) is added in place. In this order what is freed was allocated last, and leaves no hole
            change = self.lora_B(self._down(x_adapter)).mul_(self.scaling)
            result = self._base(x)
            return change.add_(result).to(result.dtype)
        result = self._base(x)
        ratio = self.lora_magnitude_vector / self._norm().detach()
        bias = self.base_layer.bias
        plain = result if bias is None else result - bias
        if dropped:  # then all of DoRA's part sees dropped inputs
            plain = F.linear(x_adapter, self._oriented(self._frozen()).to(x_adapter.dtype))
        change = (ratio - 1) * plain + ratio * self.lora_B(self._down(x_adapter)) * self.scaling
        return (result + change).to(result.dtype)


class TrainedCopy(_Switchable):
    """A module trained in full (modules_to_save) beside its original, which comes back when adapters are disabled."""

    wrapped = "trained"

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.trained = copy.deepcopy(original).requires_grad_(True)
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.original if self.disabled else self.trained)(*args, **kwargs)


# ------------------------------------------------------------------------------------------- apply, disable, merge


def apply_lora(model: Any, config: LoRAConfig) -> Any:
    """Put adapters into `model`, in place, and freeze the rest. Returns the same model.

    ValueError where a target, a module to save or a pattern matches nothing, with the names that would.
    """
    if any(isinstance(module, _Switchable) for module in model.modules()):
        raise ValueError("the model already carries a LoRA adapter: merge_and_unload it, or start from the base model")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = dict(model.named_modules())
    saved = [name for name in modules if any(name.endswith(key) for key in config.modules_to_save or [])]  # PEFT's rule
    saved = [
        name for name in saved if not any(name.startswith(f"{outer}.") for outer in saved)
    ]  # what lies inside another one
    linear = {
        name: module
        for name, module in modules.items()
        if _is_linear(module) and not any(name == s or name.startswith(f"{s}.") for s in saved)
    }
    if config.target_modules == "all-linear":
        targets = [name for name, module in linear.items() if module is not head]
    else:
        targets = [name for name in linear if _matches(name, config.target_modules)]
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else [[t] for t in config.target_modules]
    candidates = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    for want in wanted:
        if not targets or (want != "all-linear" and not any(_matches(name, want) for name in targets)):
            shown = want if isinstance(want, str) else want[0]
            raise ValueError(f"target_modules: {shown!r} matches no linear layer of the model; it has {candidates}")
    for want_saved in config.modules_to_save or []:
        if not any(name.endswith(want_saved) for name in modules):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()}))
            raise ValueError(f"modules_to_save: {want_saved!r} matches no module of the model; it has {names}")
    for key in [*config.rank_pattern, *config.alpha_pattern]:
        if not any(_pattern_value({key: True}, name, False) for name in targets):
            adapted = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
            raise ValueError(f"rank_pattern or alpha_pattern: {key!r} matches no adapted module; there are {adapted}")

    layers: dict[str, LoRALinear | TrainedCopy] = {}  # all of them first: a refusal leaves the model as it was
    for name in targets:
        r = _pattern_value(config.rank_pattern, name, config.r)
        alpha = _pattern_value(config.alpha_pattern, name, config.lora_alpha)
        try:
            layers[name] = LoRALinear(linear[name], r, alpha, config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    layers |= {name: TrainedCopy(modules[name]) for name in saved}
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, layer.train(modules[name].training))
    model.lora_config = dataclasses.replace(config, target_modules=targets, modules_to_save=saved or None)
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _adapters(model: nn.Module) -> dict[str, "LoRALinear | TrainedCopy"]:
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear | TrainedCopy)}
    if not adapters:
        raise ValueError("the model carries no LoRA adapter: call apply_lora or load_lora first")
    return adapters


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base model, bit for bit. Nests; restores on exceptions."""
    adapters = list(_adapters(model).values())
    for module in adapters:
        module.disabled += 1
    try:
        yield
    finally:
        for module in adapters:
            module.disabled -= 1


@contextmanager
def lora_merged(model: nn.Module) -> Iterator[None]:
    """Within it each adapted layer is one dense product with W + s·B A, which is faster when nothing is learnt.

    The base weights are not touched, so nothing has to be undone: an in-place merge moves tied embeddings along and
    drifts by rounding in bf16. RuntimeError from a backward pass inside, or through what
    was computed inside: its gradient would miss the adapter.
    """

    def refuse(gradient: Tensor) -> Tensor:
        raise RuntimeError("backward inside lora_merged: the merged weight hides the adapter; leave the context first")

    layers = [module for module in _adapters(model).values() if isinstance(module, LoRALinear)]
    outer = [layer.merged for layer in layers]
    with ExitStack() as hooks:
        try:
            for layer in layers:
                with torch.no_grad():
                    merged = in_blocks(layer._oriented(layer.merged_weight()), 16).contiguous()
                merged.requires_grad_().register_hook(refuse)  # a backward pass through what was computed inside
                layer.merged = merged, layer.base_layer.bias
                if layer.lora_B.weight.requires_grad:
                    # and any backward while inside
                    hooks.callback(layer.lora_B.weight.register_hook(refuse).remove)
            yield
        finally:
            for layer, before in zip(layers, outer, strict=True):
                layer.merged = before


class lora_snapshot:
    """The policy as it is now, frozen: `with snapshot(): ...` runs the model with the trainable weights of this moment.

    It is the reference for training that continues an adapter, and for full fine-tuning. It copies only what is
    trained, and swaps parameters rather than writing into them. `tensors` (name -> Tensor) is all its state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        now = dict(self.model.named_parameters())
        frozen = {
            id(now[name]): nn.Parameter(t.to(now[name].device), requires_grad=False) for name, t in self.tensors.items()
        }
        swapped = []
        try:
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in frozen:
                        swapped.append((module, name, parameter))
                        module._parameters[name] = frozen[id(parameter)]
            yield
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter


def merge_and_unload(model: Any) -> Any:
    """Fold the adapter into the weights and remove it: a plain model again, all of it trainable. Returns the model.

    A head that was adapted and shared its weight with the embedding gets a weight of its own, and the config says so.
    """
    for name, module in _adapters(model).items():
        if isinstance(module, LoRALinear):
            with torch.no_grad():
                module.base_layer.weight = nn.Parameter(module.merged_weight())
            _replace(model, name, module.base_layer)
        else:
            _replace(model, name, module.trained)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    del model.lora_config
    return model.requires_grad_(True)


# -------------------------------------------------------------------------------------------------- parameters, files


def param_groups(
    model: nn.Module, lr: float, lora_plus_ratio: float = 1.0, modules_to_save_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups of whatever is trainable: A at lr, B and DoRA's magnitudes at lr·ratio, the rest at its own rate.

    LoRA+ (Hayou et al. 2024): the best rate of B is above that of A. `modules_to_save_lr` (None: lr) is for parameters
    that are trained in full; their best rate is about a tenth of an adapter's. Each group has params, lr and a name.
    """
    rates = {"A": lr, "B": lr * lora_plus_ratio, "full": lr if modules_to_save_lr is None else modules_to_save_lr}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "B"}
            groups[next((kinds[part] for part in name.split(".") if part in kinds), "full")].append(parameter)
    return [{"params": groups[kind], "lr": rates[kind], "name": kind} for kind in rates if groups[kind]]


PREFIX = "base_model.model."  # PEFT's nesting: PeftModel.base_model (LoraModel) .model
TRAINED = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# PEFT settings we lack, and the values at which they do nothing besides None, False and empty ones.
INACTIVE = {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
IGNORED = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "fan_in_fan_out", "auto_mapping"}


def _file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's file keys -> our parameters."""
    tensors: dict[str, Tensor] = {}
    for name, module in _adapters(model).items():
        if isinstance(module, LoRALinear):
            state = {key: value for key, value in module.named_parameters() if key in TRAINED}
        else:
            state = dict(module.trained.state_dict(keep_vars=True))
        tensors.update({f"{PREFIX}{name}.{key}": value for key, value in state.items()})
    return tensors


def save_lora(model: Any, directory: str | Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which PeftModel.from_pretrained and load_lora read."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    adapters = _adapters(model).values()
    config = dataclasses.asdict(model.lora_config) | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "fan_in_fan_out": any(m.transposed for m in adapters if isinstance(m, LoRALinear)),
        "inference_mode": True,
    }
    tensors = {key: value.detach().contiguous().cpu() for key, value in _file_tensors(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def load_lora(model: Any, directory: str | Path) -> Any:
    """Put a saved adapter, ours or PEFT's, on a base model, trainable. Returns the model.

    ValueError, naming file and module, for anything that does not fit. (PEFT loads what fits and leaves the rest at its
    initialisation, so that an adapter with wrong names loads as one that does nothing.)
    """
    config = read_lora_config(directory)
    file = Path(directory) / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read as a safetensors file: {error}") from None
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model = apply_lora(model, config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    try:
        _fill(model, tensors, file)
    except ValueError:  # leave the model as it was
        for name, module in _adapters(model).items():
            _replace(model, name, module.base_layer if isinstance(module, LoRALinear) else module.original)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        del model.lora_config
        raise
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy a file's tensors into the adapters: all of them, and no others."""
    wanted = _file_tensors(model)
    base = dict(model.named_parameters(remove_duplicate=False))
    for key in [key for key in tensors if key not in wanted]:  # PEFT adds the weights of a head that it adapts
        name = key.removeprefix(PREFIX)
        if name in base and torch.equal(base[name].cpu(), tensors[key].to(base[name].dtype)):
            del tensors[key]
    for key in sorted(tensors.keys() ^ wanted.keys()):
        problem = "does not belong to this model and configuration" if key in tensors else "is missing"
        raise ValueError(f"{file}: tensor {key} {problem}; it has {len(tensors)} tensors, {len(wanted)} are needed")
    for key, value in wanted.items():
        if tensors[key].shape != value.shape:
            shapes = f"{tuple(tensors[key].shape)}, the model needs {tuple(value.shape)}"
            raise ValueError(f"{file}: tensor {key} has shape {shapes} (another rank, or another base model?)")
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(tensors[key])


def read_lora_config(directory: str | Path) -> LoRAConfig:
    """The LoRAConfig in a directory's adapter_config.json. ValueError for a setting that we lack and that is active."""
    file = Path(directory) / "adapter_config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise ValueError(f"{file}: peft_type is {found!r}; only 'LORA' adapters can be loaded")
    ours = {f.name for f in dataclasses.fields(LoRAConfig)}
    for key, value in raw.items():
        if key not in ours and key not in IGNORED and value and value != INACTIVE.get(key):
            raise ValueError(f"{file}: {key} = {value!r} is not supported here; load this adapter with peft")
    if raw.get("init_lora_weights") in (False, "orthogonal"):  # these leave W alone, and the file brings A and B
        raw["init_lora_weights"] = True
    try:
        return LoRAConfig(**{key: value for key, value in raw.items() if key in ours and value is not None})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
