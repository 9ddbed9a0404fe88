"""The engine: `generate` and `completion_logps` of grpo_lora.py, faster.

    GRPOTrainer(model, ..., engine=fast)            # from runner import fast

The functions have the same names, arguments and results. They run the loops of grpo_lora.py on
FastLM, which is CausalLM with another cache, another head and other log-probs. checks/ proves the
two equal: the same tokens, log-probs and gradients to rounding, in all model families.

What each trick is for (benchmarks/README.md says what it brings):

    _RoomyLayer     a token is written into the cache, not copied with all that went before it
    _ShownLayer     on a GPU a decode step is one launch, recorded once as a CUDA graph and replayed
    _TokenLogps     the head's gradient is taken while a chunk's logits exist, not in a second pass
    linear          products in float32 by oneDNN, of weights that lie as it likes them
    narrow_inputs   no float32 copy of a half-precision input is kept for the adapter's backward
    prepare         freed memory stays with the process; keys that heads share are not copied
"""

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import grpo_lora
from grpo_lora import CausalLM, Rollout
from lora import LoRALinear, is_dense

plain_down = LoRALinear._down
GRAPHS = {"cuda"}  # kinds of device where decode steps are recorded; an empty set for none


@functools.wraps(grpo_lora.generate)
def generate(model: nn.Module, *args: Any, **kwargs: Any) -> Rollout:
    prepare()
    lm = FastLM(model)
    with torch.no_grad(), quick_products(lm.core, pack=True):
        return grpo_lora.generate(lm, *args, **kwargs)  # type: ignore[arg-type]


@functools.wraps(grpo_lora.completion_logps)
def completion_logps(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    prepare()
    lm = FastLM(model)
    # a layer that is computed again in the backward pass must do there what it did here
    again = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    down, quick = (plain_down, nullcontext) if again else (narrow_inputs, quick_products)
    with patch.object(LoRALinear, "_down", down), quick(lm.decoder):
        return grpo_lora.completion_logps(lm, *args, **kwargs)  # type: ignore[arg-type]


@functools.cache
def prepare() -> None:
    """Once in a process. On Linux malloc keeps freed memory, which it would otherwise hand back and
    ask for again, page by page, at each update. transformers' attention on a CPU leaves it to torch
    that query heads share keys, instead of copying the keys for each of them."""
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "0" if torch.cuda.is_available() else "1")
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")  # oneDNN's kernels, one a shape; else 1024 of them
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a libc other than glibc
            for option, size in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_ and M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, size)


class FastLM(CausalLM):
    """CausalLM with the engine's caches, head and log-probs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # transformers' word for a forward that asks the host nothing, and whose mask says all that
        # there is to know about the cache
        fixed = getattr(self.core, "_can_compile_fullgraph", False)
        fixed = fixed and self.takes_cache and self.takes_positions
        devices = {p.device for p in self.core.parameters()}
        alone = len(devices) == 1 and not hasattr(self.decoder, "unshard")
        self.records = fixed and alone and self.core.device.type in GRAPHS
        if self.records:  # a recording has one shape: rows that ended stay until seven in ten have
            self.drop_below = 0.3

    def new_cache(self, room: int = 0) -> DynamicCache:
        cache = super().new_cache()
        if room and self.records:
            return _RecordedCache(cache, room, self.core.device)
        if room:
            roomy = lambda layer: _RoomyLayer(room) if type(layer) is DynamicLayer else layer
            cache.layers = [roomy(layer) for layer in cache.layers]
        return cache

    def next_logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        plain = super().next_logits
        if isinstance(cache, _RecordedCache) and cache.repeated:
            return cache.next_logits(ids, mask, lambda i, m: plain(i, m, cache))
        return plain(ids, mask, cache)

    def token_logps(
        self, hidden: Tensor, targets: Tensor, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):  # it may drop out
            trained = torch.is_grad_enabled() and self.logits(hidden[:1].detach()).requires_grad
        if trained:  # the head runs again in the backward pass, and there as it did here
            with patch.object(LoRALinear, "_down", plain_down):
                return super().token_logps(hidden, targets, temperature, chunk_size)
        with quick_products(self.core):  # the head's
            return _TokenLogps.apply(hidden, targets, self.logits, temperature, chunk_size)


# ------------------------------------------------------------------------------------------ caches


class _RoomyLayer(DynamicLayer):
    """Keys and values with room to grow, from when a prompt is repeated. A token is then written
    where DynamicLayer would copy all that went before it."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []  # keys and values, (rows, heads, tokens + room, width) each

    def batch_repeat_interleave(self, repeats: int) -> None:
        old: Any  # Tensor
        for old in (self.keys, self.values) if self.get_seq_length() else ():
            rows, heads, tokens, width = old.shape
            buffer = old.new_empty(rows, repeats, heads, tokens + self.room, width)
            buffer[..., :tokens, :] = old.unsqueeze(1)
            self.buffers.append(buffer.flatten(0, 1))
        self._show(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(self.get_seq_length())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.buffers:
            return super().update(key_states, value_states, *args, **kwargs)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:end] = new
        return self._show(end)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        if self.buffers:
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values  # type: ignore[return-value]


class _ShownLayer(_RoomyLayer):
    """Shows all of its room once the prompt is repeated, so that no shape changes between steps.

    position (), on the device: where the next token goes. The attention mask must hide what comes
    after it and, as nothing slides out, what comes before a window.
    """

    def __init__(self, room: int, position: Tensor, is_sliding: bool) -> None:
        super().__init__(room)
        self.position, self.is_sliding = position, is_sliding

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for buffer in self.buffers:
            buffer[:, :, -self.room :] = 0  # NaN would spread, hidden or not

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.buffers:
            return super().update(key_states, value_states, *args, **kwargs)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.position, new)
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> Any:
        return self.position if self.buffers else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.buffers:
            return super().get_mask_sizes(query_length)
        return self.buffers[0].shape[2], 0

    def _show(self, end: Any) -> tuple[Tensor, Tensor]:
        return super()._show(self.buffers[0].shape[2] if self.buffers else end)


class _RecordedCache(DynamicCache):
    """A cache of _ShownLayers, and the recording of a decode step that reads and writes it.

    On a GPU a step is a thousand small kernels, and to launch them takes longer than to run them.
    A recording launches them all at once.
    """

    def __init__(self, cache: DynamicCache, room: int, device: torch.device) -> None:
        super().__init__()
        self.position = torch.zeros((), dtype=torch.long, device=device)
        slides = [getattr(layer, "is_sliding", False) for layer in cache.layers]
        self.layers = [_ShownLayer(room, self.position, sliding) for sliding in slides]
        self.layer_class_to_replicate = None
        self.replay: Any = None

    @property
    def repeated(self) -> bool:
        layers: Any = self.layers
        return any(layer.buffers for layer in layers)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.replay = None  # it was of another shape

    def next_logits(self, ids: Tensor, mask: Tensor, step: Callable[..., Tensor]) -> Tensor:
        """step of ids (b, 1) and a mask that covers the whole room, by way of the recording."""
        layer: Any = self.layers[0]
        width = layer.buffers[0].shape[2]
        self.position.fill_(mask.shape[1] - 1)
        inputs = ids.clone(), F.pad(mask, (0, width - mask.shape[1]))  # (b, 1), (b, width)
        self.replay = self.replay or _recorded(step, inputs)
        return self.replay(*inputs)


def _recorded(step: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """step as a CUDA graph. It takes inputs like these. The next call overwrites what this one
    returned. Where step asks the host something on its way, which cannot be recorded: step itself,
    and a warning."""
    with torch.cuda.device(inputs[0].device):  # nothing that runs on another one is recorded
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        step(*inputs)  # what libraries set up at their first call is no part of a graph
        try:
            with torch.cuda.graph(graph):
                outputs = step(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            # torch gives no random numbers until a recording ends well: so here is a small one
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                inputs[0].clone()
            why = str(error.__context__ or error).partition("\n")[0]
            text = f"decoding takes longer, as no CUDA graph of a step can be recorded: {why}"
            warnings.warn(text, stacklevel=2)
            return step

    def replay(*new: Tensor) -> Any:
        for x, held in zip(new, inputs, strict=True):
            held.copy_(x)
        graph.replay()
        return outputs

    return replay


# --------------------------------------------------------------------------------------- log-probs


class _TokenLogps(torch.autograd.Function):
    """log p(target) and entropy from hidden states, in chunks, under a head that is not trained.

        d logp_t / d h_t = headᵀ (onehot(y_t) - p_t) / temperature

    This is one vector a token, whatever the loss will be. So it is taken while the chunk's logits
    exist, and only scaled in the backward pass: no logits are kept, and nothing is computed twice.
    hidden: (n, H), targets: (n,).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Any, temperature: float, chunk_size: int
    ) -> Any:
        with_slope = ctx.needs_input_grad[0]

        def of_chunk(h: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # its buffers go when it returns
            with torch.set_grad_enabled(with_slope):
                h = h.detach().requires_grad_(with_slope)
                logits = head(h)
            z = (logits.detach() / temperature).log_softmax(dim=-1)  # (chunk, V)
            logp, p = z.gather(1, y.unsqueeze(1)).squeeze(1), z.exp()
            entropy = -z.clamp_(min=-1e4).mul_(p).sum(dim=-1)  # 0 log 0 = 0
            if not with_slope:
                return logp, entropy
            one = p.new_full((len(y), 1), 1 / temperature)
            slope = p.mul_(-1 / temperature).scatter_add_(1, y.unsqueeze(1), one)  # d logp/d logits
            return logp, entropy, torch.autograd.grad(logits, h, slope)[0]

        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        parts = zip(*(of_chunk(h, y) for h, y in chunks), strict=True)
        logp, entropy, *slope = (torch.cat(part) for part in parts)
        ctx.save_for_backward(*slope)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return (grad_logps.unsqueeze(1) * slopes).to(slopes.dtype), None, None, None, None


def narrow_inputs(layer: LoRALinear, x: Tensor) -> Tensor:
    """LoRALinear._down, A(x) in the adapter's precision, without the wide copies of x.

    A half-precision x is widened for this, and autograd would keep the wide copy until the backward
    pass: one for each of q, k, v, gate and up. So x itself is kept instead, and widened again then.
    """
    dtype = layer.lora_A.weight.dtype
    if x.dtype == dtype:
        return layer.lora_A(x)
    wide = x.to(dtype)
    address = wide.data_ptr()  # of wide, or of a flat view of it: autograd keeps either

    def pack(t: Tensor) -> tuple[Tensor, torch.dtype]:
        return (x.reshape(t.shape) if t.data_ptr() == address else t), t.dtype

    with saved_tensors_hooks(pack, lambda packed: packed[0].to(packed[1])):
        return layer.lora_A(wide)


# ---------------------------------------------------------------------------- products by oneDNN

MANY = 2**16  # weights of a layer; with fewer the longer call costs more than it saves


class _Product(torch.autograd.Function):
    """x Wᵀ + bias by oneDNN: x (n, in), W (out, in), bias (out,) -> (n, out). Only x has a
    gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return _Product.forward(grad, weight.T, None), None, None


def by_onednn(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` may take these: dense, many, in float32 on a CPU (an x86: others were not
    tried), and not trained."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        return False
    if weight.numel() < MANY or weight.dim() != 2:
        return False
    if bias is not None and not (bias.is_contiguous() and bias.shape == weight.shape[:1]):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (weight, bias)):
        return False
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    allowed = bool(torch.backends.mkldnn.enabled) and not torch.is_autocast_enabled("cpu")
    kind = weight.device.type == "cpu" and weight.dtype == torch.float32
    return there and allowed and kind


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    """F.linear, x Wᵀ + bias, by oneDNN.    x (..., in), W (out, in), bias (out,) -> (..., out)

    packed: a copy of W that lies as oneDNN reads it fastest. To make one takes as long as a few
    products, so it is for weights that many tokens pass one after the other.
    """
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)  # which says what is wrong
    product = _Product.apply if torch.is_grad_enabled() else _Product.forward
    rows = x.reshape(-1, x.shape[-1])  # oneDNN would return a view, which nothing may write to
    return product(rows, weight if packed is None else packed, bias).view(
        *x.shape[:-1], len(weight)
    )


def quick_forward(
    m: Any, held: str, weight: Tensor, bias: Tensor | None, packed: Tensor | None, input: Tensor
) -> Tensor:
    """The forward of a layer by `linear`, as long as `weight` is what it holds: an optimiser, a
    hook or a parametrisation may put another one there."""
    if getattr(m, held) is weight and not vars(m).get("disabled"):
        return linear(input, weight, bias, packed)
    return type(m).forward(m, input)


@contextmanager
def quick_products(model: nn.Module, pack: bool = False) -> Iterator[None]:
    """Within it linear layers, and adapted ones while they are merged, go through `linear`. pack:
    with packed weights, which have no backward pass. A compiled model is left alone, as it would be
    compiled again for each new forward."""
    layers: dict[nn.Module, tuple[str, Tensor, Tensor | None]] = {}
    merged: set[nn.Module] = set()  # the parts of merged layers, which these do not call
    compiled = any(m._compiled_call_impl or "_orig_mod" in m._modules for m in model.modules())
    for m in model.modules() if not compiled else ():
        if isinstance(m, LoRALinear) and m.merged is not None and not m.disabled:
            merged.update(m.children())
            if is_dense(m.base_layer):  # else merged has a dtype of its own
                layers[m] = "merged", m.merged, m.base_layer.bias
        elif type(m) is nn.Linear and m not in merged:
            layers[m] = "weight", m.weight, m.bias
    # a layer with a forward of its own has a hook or a patch there
    layers = {m: x for m, x in layers.items() if by_onednn(*x[1:]) and "forward" not in vars(m)}
    try:
        for m, (held, weight, bias) in layers.items():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach()) if pack else None
            m.forward = functools.partial(quick_forward, m, held, weight, bias, packed)
        yield
    finally:
        for m in layers:
            vars(m).pop("forward", None)
