"""The engine is the plain code, faster: the same tokens, log-probs and gradients."""

import contextlib
import inspect
import math
import os
from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_lora
from checks.test_families import FAMILIES, IDLE, family_model
from grpo_lora import SAMPLER_GAP, CausalLM
from lora import LoRAConfig, LoRALinear, apply_lora, lora_disabled, lora_merged
from runner import fast
from test_training import (
    adapters_of,
    gradients,
    prompts,
    sample,
    tiny_model,
    trainer,
    update,
    with_adapters,
)


@pytest.fixture(autouse=True)
def every_layer_is_large_enough(monkeypatch):
    monkeypatch.setattr(fast, "MANY", 1)


def test_a_cache_has_room_where_all_is_kept_and_stays_a_window_where_that_slides():
    windows = {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
    }
    gemma = tiny_model(
        config=transformers.Gemma3TextConfig, num_hidden_layers=2, hidden_size=32, **windows
    )
    kinds = [type(layer).__name__ for layer in fast.FastLM(gemma).new_cache(room=4).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "_RoomyLayer"]
    assert {type(layer).__name__ for layer in fast.FastLM(gemma).new_cache().layers} == {
        "DynamicSlidingWindowLayer",
        "DynamicLayer",
    }


@torch.no_grad()
def test_a_roomy_cache_holds_what_a_dynamic_one_holds_and_copies_nothing_to_write_a_token():
    lm, (ids, mask) = fast.FastLM(tiny_model()), prompts()
    plain, roomy = lm.new_cache(), lm.new_cache(room=8)

    def on_both(act):
        for cache in (plain, roomy):
            act(cache)
        for a, b in zip(plain.layers, roomy.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            assert a.get_seq_length() == b.get_seq_length()

    on_both(lambda cache: lm.hidden(ids, mask, cache))
    on_both(lambda cache: cache.batch_repeat_interleave(3))
    mask = mask.repeat_interleave(3, dim=0)
    place = roomy.layers[0].keys.data_ptr()
    for token in range(8):
        if token == 4:
            assert roomy.layers[0].keys.data_ptr() == place
            kept = torch.tensor([0, 2, 5])
            on_both(lambda cache, kept=kept: cache.batch_select_indices(kept))
            mask, place = mask[kept], roomy.layers[0].keys.data_ptr()
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        on_both(
            lambda cache, mask=mask, token=token: lm.hidden(
                torch.full((len(mask), 1), 7 + token), mask, cache
            )
        )
    assert roomy.layers[0].keys.data_ptr() == place and roomy.get_seq_length() == 15


@pytest.mark.parametrize("ending", [True, False])
def test_one_number_a_token_is_asked_of_the_device_while_decoding(ending, monkeypatch):
    """What our decode loop waits for; a forward of transformers' may look whether the mask is all True."""
    asked = defaultdict(int)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked[func.overloadpacket.__name__] += 1
            return func(*args, **kwargs or {})

    model, (ids, mask) = tiny_model(), prompts()
    hidden, forwards = fast.FastLM.hidden, []

    def uncounted(self, *args):
        before = dict(asked)
        out = hidden(self, *args)
        asked.clear()
        asked.update(before)
        forwards.append(1)
        return out

    monkeypatch.setattr(CausalLM, "hidden", uncounted)
    with Count():
        rollout = sample(
            model, ids, mask, eos_token_ids=range(5, 12) if ending else [], max_completion_length=20
        )
    lengths = rollout.completion_mask.sum(dim=1)
    assert asked["_local_scalar_dense"] <= len(forwards) + 4  # a few before and after the loop
    assert asked["nonzero"] <= (len(set(lengths.tolist())) if ending else 0) + 2


# Families of which no decode step is recorded: transformers says that theirs may not be, or they take no positions or cache.
UNRECORDED = set(
    "gpt_neo bloom mpt bart openai-gpt mamba mamba2 falcon_mamba jamba bamba recurrent_gemma rwkv lfm2 qwen3_next zamba2".split()
)
# Families that ask the host something in a step: experts that are looped over, tensors made on the CPU.
ASKING = set(
    "granitemoe mixtral qwen2_moe qwen3_moe olmoe gpt_oss phimoe deepseek_v2 deepseek_v3 xglm".split()
)
ASKING |= {"falcon", "falcon alibi", "falcon grouped"}
GPU = torch.cuda.is_available()


@pytest.fixture
def recordings(monkeypatch):
    """Decode steps are recorded: with a GPU really, else with what acts like a CUDA graph. A list of the recordings made."""
    made, record = [], fast._recorded

    def noted(step, inputs):
        outputs = []

        def watched(*given):
            outputs.append(step(*given))
            return outputs[-1]

        class Graph:  # reads from and writes to the same places each time
            def replay(self):
                for x, place in zip(step(*inputs), outputs[-1], strict=True):
                    place.copy_(x)

        if not GPU:
            monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
            for name in ("device", "current_stream", "graph"):
                monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
        replay = record(watched, inputs)
        given_up = replay is watched  # on a GPU, in the middle of the call that is recorded
        assert len(outputs) == 2 or given_up, "a first call, and the one that is recorded"
        made.extend([] if given_up else [replay])
        return replay

    monkeypatch.setattr(fast, "_recorded", noted)
    monkeypatch.setattr(fast, "GRAPHS", {"cpu", "cuda"})
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_family_samples_the_same_where_decode_steps_are_recorded(family, recordings, monkeypatch):
    device = "cuda" if GPU else "cpu"
    model, ids = family_model(family).to(device), torch.arange(3, 17, device=device).view(2, 7)
    prompt_mask = torch.arange(7, device=device) >= torch.tensor([[3], [0]], device=device)

    def rollout():
        return fast.generate(
            model, ids, prompt_mask, num_generations=4, max_completion_length=16, temperature=0.7,
            eos_token_ids=range(0, 50, 6), pad_token_id=0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    with monkeypatch.context() as patch:  # memory not written yet may hold anything
        patch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, math.nan))
        recorded = rollout()
    monkeypatch.setattr(fast, "GRAPHS", set())
    expected = rollout()
    for name in ("completion_ids", "completion_mask"):
        assert torch.equal(getattr(recorded, name), getattr(expected, name))
    torch.testing.assert_close(recorded.logps, expected.logps, atol=1e-5, rtol=1e-5)

    lengths = expected.completion_mask.sum(dim=1)
    assert lengths.unique().numel() > 1
    sizes = [8]  # of the batch, at each step: rows that ended stay until seven in ten have
    for t in range(1, int(lengths.max())):
        left = int((lengths > t).sum())
        sizes.append(left if left < 0.3 * sizes[-1] else sizes[-1])
    assert len(recordings) == (
        0 if family in UNRECORDED or (GPU and family in ASKING) else len(set(sizes[1:]))
    )


def test_no_decode_step_of_a_model_on_several_devices_or_spread_over_processes_is_recorded(
    monkeypatch,
):
    monkeypatch.setattr(fast, "GRAPHS", {"cpu"})
    model = tiny_model()
    assert fast.FastLM(model).records
    model.model.norm.to("meta")
    assert not fast.FastLM(model).records
    model = tiny_model()
    monkeypatch.setattr(type(model.model), "unshard", None, raising=False)
    assert not fast.FastLM(model).records
    monkeypatch.setattr(fast, "GRAPHS", {"cuda"})
    assert not fast.FastLM(tiny_model()).records


def test_a_decode_step_that_cannot_be_recorded_is_taken_as_it_is_and_that_is_said(monkeypatch):
    """On a GPU because the model asks the host how long the rows are (its RoPE is dynamic); else because we say so."""
    device = "cuda" if GPU else "cpu"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model, (ids, mask) = (
        tiny_model(rope_parameters=rope).to(device),
        [x.to(device) for x in prompts()],
    )
    expected = sample(model, ids, mask, engine=fast, max_completion_length=6, eos_token_ids=[])
    monkeypatch.setattr(fast, "GRAPHS", {"cpu", "cuda"})
    if not GPU:
        cuda = {
            name: mock.MagicMock()
            for name in ("device", "current_stream", "set_stream", "graph", "CUDAGraph")
        }
        cuda["device"].return_value.__exit__.return_value = None
        cuda["graph"].return_value.__exit__.return_value = None
        cuda["graph"].return_value.__enter__.side_effect = [
            RuntimeError("an error during capture\nand more of it"),
            None,
        ]
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
    with pytest.warns(UserWarning, match="no CUDA graph of a step can be recorded: .*captur.*$"):
        plain = sample(model, ids, mask, engine=fast, max_completion_length=6, eos_token_ids=[])
    assert torch.equal(plain.completion_ids, expected.completion_ids)
    torch.testing.assert_close(plain.logps, expected.logps)
    if GPU:  # nothing is left as it is while recording
        assert torch.rand(2, device=device).isfinite().all()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    else:
        cuda["set_stream"].assert_called_with(cuda["current_stream"].return_value)
        assert cuda["graph"].call_count == 2 and cuda["graph"].return_value.__exit__.call_count == 1


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("default_device", ["cpu", "cuda"])
def test_an_update_on_a_gpu_samples_the_same_and_has_the_gradient_of_one_on_a_cpu(
    default_device, request
):
    gradients, samples = [], []
    request.addfinalizer(lambda: torch.set_default_device(None))
    models = [with_adapters(tiny_model()).to(device) for device in ("cpu", "cuda")]
    for model, default in zip(models, (None, default_device), strict=True):
        torch.set_default_device(default)
        t = trainer(model, beta=0.1)
        update(t)
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in t.params.values()]))
        samples.append(t.last_batch[0].completion_ids.cpu())
    assert torch.equal(*samples)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm() > 0


# ------------------------------------------------------------------------------ products and log-probs


def gradient(loss: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, inputs)[0]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_log_probs_have_the_value_and_gradient_of_the_plain_ones(chunk):
    torch.manual_seed(0)
    head = nn.Linear(4, 11, bias=False).double().requires_grad_(False)
    capped = lambda h: 3.0 * torch.tanh(head(h) / 3.0)  # a soft-capped head, as in Gemma 2
    hidden, targets = (
        torch.randn(7, 4, dtype=torch.float64, requires_grad=True),
        torch.randint(11, (7,)),
    )
    logps, entropies = fast._TokenLogps.apply(hidden, targets, capped, 0.7, chunk)
    log_probs = (capped(hidden) / 0.7).log_softmax(-1)
    plain = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logps, plain)
    torch.testing.assert_close(entropies, -(log_probs.exp() * log_probs).sum(-1))
    weights = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(
        gradient((logps * weights).sum(), hidden), gradient((plain * weights).sum(), hidden)
    )
    assert not entropies.requires_grad
    assert torch.autograd.gradcheck(
        lambda h: fast._TokenLogps.apply(h, targets, capped, 0.7, chunk)[0], hidden
    )


def test_log_probs_of_a_half_precision_head_are_taken_in_float32():
    hidden = torch.randn(5, 8, dtype=torch.bfloat16)
    head = nn.Linear(8, 4096, bias=False, dtype=torch.bfloat16)
    logits = head(hidden).float()
    logps, _ = fast._TokenLogps.apply(hidden, torch.arange(5), lambda h: head(h).float(), 1.0, 2)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, logits.log_softmax(-1)[torch.arange(5), torch.arange(5)])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out", [7, 48, 64, 192, 1024])
@pytest.mark.parametrize("shape", [(5, 3), (4, 1, 3), (1, 256, 3), (2, 129, 3), (3,), (0, 3)])
def test_a_quick_product_changes_neither_value_nor_gradient(shape, out, with_bias, frozen):
    layer = nn.Linear(3, out, bias=with_bias).requires_grad_(not frozen)
    torch.manual_seed(0)
    x, slope = (
        torch.randint(-9, 10, size).float() for size in (shape, (*shape[:-1], out))
    )  # small integers, whose sums are exact in any order
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randint(-9, 10, p.shape))

    def values_and_gradients(quick):
        x.requires_grad_().grad = None
        layer.zero_grad()
        with quick(layer):
            y = layer(x)
            assert ("forward" in vars(layer)) == (quick is fast.quick_products and frozen)
        assert y.is_contiguous()
        y.backward(slope)
        assert "forward" not in vars(layer)
        return y, x.grad, *(p.grad for p in layer.parameters())

    expected = values_and_gradients(contextlib.nullcontext)
    found = values_and_gradients(fast.quick_products)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for pack in (False, True):
        with torch.no_grad(), fast.quick_products(layer, pack):
            assert "forward" in vars(layer)
            assert torch.equal(layer(x), expected[0]) and layer(x).is_contiguous()


@pytest.mark.filterwarnings("ignore:TF32")
def test_which_layers_have_quick_products(monkeypatch):
    f64, meta = nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 8, device="meta")
    own, many, few = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 7)
    own.forward = lambda x: x  # a hook's, or a patch's

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Quantised(torch.Tensor):  # knows no product but its own
        pass

    quantised = nn.Linear(8, 8)
    quantised.weight = nn.Parameter(torch.ones(8, 8).as_subclass(Quantised), requires_grad=False)
    bias = nn.Linear(8, 8)
    for layer in (f64, meta, own, many, few, quantised, bias):
        layer.requires_grad_(False)
    bias.bias.requires_grad_()  # trained alone
    layers = nn.ModuleList([f64, meta, own, many, few, Scaled(8, 8), quantised, bias])
    monkeypatch.setattr(fast, "MANY", 64)

    def quick(model=layers):
        with fast.quick_products(model):
            linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not own]
            return [m for m in linear if "forward" in vars(m)]

    assert quick() == [many]
    with torch.no_grad():
        assert quick() == [many, bias]
        with torch.autocast("cpu"):
            assert quick() == []
        with torch.backends.mkldnn.flags(enabled=False):
            assert quick() == []
        for backend in (torch.backends.mkl, torch.backends.mkldnn):
            with mock.patch.object(backend, "is_available", lambda: False):
                assert quick() == []
        compiled = [nn.Sequential(nn.Linear(8, 8)), nn.Sequential(torch.compile(nn.Linear(8, 8)))]
        compiled[0].compile()
        assert [quick(model) for model in compiled] == [[], []]
    assert own(3) == 3


def test_a_quick_layer_says_as_a_plain_one_what_it_cannot_take():
    layer, x = nn.Linear(8, 8), torch.ones(2, 8, dtype=torch.float64)
    said = []
    for quick in (contextlib.nullcontext(), fast.quick_products(layer)):
        with torch.no_grad(), quick, pytest.raises(RuntimeError) as error:
            layer(x)
        said.append(str(error.value))
    assert said[0] == said[1]
    with torch.no_grad(), fast.quick_products(layer), torch.autocast("cpu"):
        assert layer(x.bfloat16()).dtype == torch.bfloat16  # a model may have a part of this kind


@pytest.mark.parametrize("shape", [(3, 5, 16), (5, 16), (16,), (0, 16)])  # (..., in); 8 outputs
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_on_a_bf16_base_backward_keeps_no_float32_copy_of_the_input_and_has_the_same_gradients(
    shape, autocast, use_dora, monkeypatch
):
    torch.manual_seed(0)
    layer = LoRALinear(
        nn.Linear(16, 8, dtype=torch.bfloat16),
        4,
        8,
        LoRAConfig(r=4, lora_alpha=8, use_dora=use_dora),
    )
    nn.init.normal_(layer.lora_B.weight)
    layer.base_layer.requires_grad_(False)
    x, kept, results = torch.randn(shape, dtype=torch.bfloat16), [], []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def note(packed):  # what autograd keeps, or what the engine keeps in its place
        tensor = packed[0] if isinstance(packed, tuple) else packed
        kept.append((tensor.dtype, tensor.numel()))
        return packed

    monkeypatch.setattr(
        fast, "saved_tensors_hooks", lambda pack, unpack: hooks(lambda t: note(pack(t)), unpack)
    )
    for plain in (False, True):
        if not plain:
            monkeypatch.setattr(LoRALinear, "_down", fast.narrow_inputs)
        else:
            monkeypatch.undo()
        leaves = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
        kept.clear()
        with hooks(note, lambda t: t), torch.autocast("cpu", enabled=autocast):
            y = layer(leaves[0])
        assert not x.numel() or ((torch.float32, x.numel()) in kept) == (plain and not autocast)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad((y.float() * weight).sum(), leaves)])
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(
            ours, wanted, rtol=0.02 if autocast else 1e-6, atol=0.05 if autocast else 1e-6
        )


# ------------------------------------------------------------------------- the engine and the plain code


def both_engines(model, ids, mask, **settings):
    """Rollout, log-probs, entropies and gradients, by the plain code and by the engine."""
    results = []
    for engine in (grpo_lora, fast):
        with torch.no_grad(), lora_merged(model):
            rollout = sample(model, ids, mask, engine=engine, **settings)
        plain = results[0][0] if results else rollout
        logps, entropies = engine.completion_logps(model, plain, temperature=0.7, chunk_size=5)
        slope = torch.linspace(-1, 1, logps.numel()).view_as(logps).to(logps)
        results.append((rollout, logps, entropies, gradients(model, (logps * slope).sum())))
    return results


def assert_engines_agree(model, ids, mask, tolerance, **settings):
    (plain, logps, entropies, slopes), (fast_, *others) = both_engines(model, ids, mask, **settings)
    for name in ("completion_ids", "completion_mask", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(plain, name), getattr(fast_, name))
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(fast_.logps, plain.logps, **close)
    torch.testing.assert_close(others[0], logps, **close)
    torch.testing.assert_close(others[1], entropies, **close)
    whole = torch.cat([g.flatten() for g in slopes.values()])
    other = torch.cat([others[2][name].flatten() for name in slopes])
    assert (whole - other).norm() < 10 * tolerance * whole.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_engines_tokens_log_probs_and_gradients_in_the_plain_code_too(family):
    model = family_model(family)
    idle = IDLE.get(family, "none")
    apply_lora(model.requires_grad_(True), LoRAConfig(r=2))
    for name, p in model.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
            p.requires_grad_(idle not in name)
    ids = torch.arange(3, 17).view(2, 7)
    mask = torch.arange(7) >= torch.tensor([[3], [0]])
    assert_engines_agree(model, ids, mask, 1e-5, eos_token_ids=range(0, 50, 4), pad_token_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("trained_head", [False, True])
def test_engine_and_plain_code_agree_in_each_precision_and_with_each_adapter(
    dtype, config, trained_head
):
    if trained_head:
        config = config | {"target_modules": ["lm_head", "q_proj", "down_proj"]}
    model, (ids, mask) = with_adapters(tiny_model(dtype=dtype), **config), prompts((3, 6))
    if (
        dtype == torch.bfloat16
    ):  # products round elsewhere: tokens of merged half weights may differ
        rollout = sample(model, ids, mask)
        pairs = [e.completion_logps(model, rollout, temperature=0.7) for e in (grpo_lora, fast)]
        torch.testing.assert_close(pairs[0], pairs[1], atol=0.05, rtol=0.05)
    else:
        assert_engines_agree(model, ids, mask, 1e-5 if dtype == torch.float32 else 1e-9)


def test_the_engines_functions_have_the_plain_ones_signatures():
    for name in ("generate", "completion_logps"):
        plain, engine = (getattr(module, name) for module in (grpo_lora, fast))
        assert inspect.signature(plain) == inspect.signature(engine)


@pytest.mark.parametrize("engine", [grpo_lora, fast, None])
def test_an_update_is_the_same_with_each_engine(engine):
    updates = []
    for one in (grpo_lora, engine):
        t = trainer(with_adapters(tiny_model()), engine=one, beta=0.1, num_iterations=2)
        metrics = update(t)
        updates.append((metrics, adapters_of(t.model), [s["completion"] for s in t.samples]))
    (metrics, weights, texts), (others, other_weights, other_texts) = updates
    assert texts == other_texts
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], atol=1e-4, rtol=1e-4)
    for name in metrics.keys() - {SAMPLER_GAP}:
        assert metrics[name] == pytest.approx(others[name], rel=1e-3, abs=1e-5, nan_ok=True)


def test_malloc_is_told_to_keep_memory_and_attention_to_share_keys(monkeypatch):
    told, share = [], "TRANSFORMERS_SDPA_FORCE_GQA"
    libc = SimpleNamespace(mallopt=lambda option, size: told.append((option, size)))
    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: libc)
    for platform, gpu in (("linux", False), ("darwin", True)):
        monkeypatch.setenv(share, "")
        monkeypatch.delenv(share)
        monkeypatch.setattr(fast.sys, "platform", platform)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        caches = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
        for name in caches:
            monkeypatch.delenv(name, raising=False)
        fast.prepare.__wrapped__()
        assert [os.environ[name] for name in caches] == ["64", "64"]
        assert os.environ[share] == ("0" if gpu else "1")
        # M_TRIM_THRESHOLD at its largest, and M_MMAP_THRESHOLD of 32 MiB
        assert told == ([(-1, 2**31 - 1), (-3, 2**25)] if platform == "linux" else [])
        told.clear()


@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_merged_layers_have_quick_products_with_their_bias_and_their_parts_none(pack):
    torch.manual_seed(0)
    layers = {"up": nn.Linear(48, 64), "plain": nn.Linear(8, 8)}
    model = apply_lora(nn.ModuleDict(layers), LoRAConfig(r=2, lora_alpha=8, target_modules=["up"]))
    up, plain = model["up"], model["plain"]
    nn.init.normal_(up.lora_B.weight)
    x, quick = torch.randn(3, 48), lambda: {m for m in model.modules() if "forward" in vars(m)}
    with fast.quick_products(model, pack):
        assert quick() == {up.base_layer, up.lora_A, up.lora_B, plain}
    with lora_merged(model):
        on = up(x)
        with fast.quick_products(model, pack):
            assert quick() == {up, plain}
            assert (up.forward.args[-1] is not None) == pack
            torch.testing.assert_close(up(x), on)
        assert not quick()
        with lora_disabled(model):
            off = up(x)
            with fast.quick_products(model, pack):
                assert up not in quick()
                torch.testing.assert_close(up(x), off)


@torch.no_grad()
def test_a_rollout_packs_weights_and_scoring_does_not(monkeypatch):
    packed, product = [], fast.linear
    note = lambda x, w, b, p: packed.append(p is not None) or product(x, w, b, p)
    monkeypatch.setattr(fast, "linear", note)
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts(), engine=fast)
    assert packed and all(packed)
    packed.clear()
    fast.completion_logps(model, rollout, temperature=1.0)
    assert packed and not any(packed)


@pytest.mark.parametrize("shape", [(2, 3, 16), (3, 16), (16,)])
def test_what_a_quick_layer_returns_may_be_written_to(shape):
    layer, x = nn.Linear(16, 8).requires_grad_(False), torch.randn(shape)
    found = []
    for quick in (contextlib.nullcontext(), fast.quick_products(layer)):
        mine = x.clone().requires_grad_()
        with quick:
            y = layer(input=mine)
        y.clamp_(-0.1, 0.1).sum().backward()
        found.append((y.detach(), mine.grad))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_a_weight_that_is_made_anew_for_each_forward_is_never_an_old_one():
    found = []
    for engine in (grpo_lora, fast):
        torch.manual_seed(0)
        model = tiny_model().requires_grad_(True)
        nn.utils.weight_norm(model.model.layers[0].mlp.up_proj)
        t = trainer(model, engine=engine)
        metrics = [update(t) for _ in range(2)]
        found.append((metrics[1]["loss"], [s["completion"] for s in t.samples]))
    assert found[0][1] == found[1][1] and found[0][0] == pytest.approx(found[1][0], abs=1e-5)


@torch.no_grad()
def test_an_adapter_that_is_switched_off_within_a_merged_rollout_is_off():
    model = with_adapters(tiny_model())
    x, layer = torch.randn(3, 32), model.model.layers[0].self_attn.q_proj
    with lora_merged(model), fast.quick_products(model, pack=True):
        assert "forward" in vars(layer)
        with lora_disabled(model):
            assert torch.equal(layer(x), layer.base_layer(x))


def test_a_backward_pass_through_merged_weights_is_refused_by_the_engine_too():
    model = with_adapters(tiny_model(), modules_to_save=["norm"])
    rollout = sample(model, *prompts())
    with lora_merged(model):
        logps, _ = fast.completion_logps(model, rollout, temperature=1.0)
    with pytest.raises(RuntimeError, match="lora_merged hides the adapter"):
        logps.sum().backward()


def test_a_bias_or_a_weight_that_does_not_lie_in_a_row_is_left_to_torch():
    strided, wide = nn.Linear(16, 8), nn.Linear(16, 8)
    strided.bias = nn.Parameter(torch.randn(24)[::3])
    wide.bias = nn.Parameter(torch.randn(1, 8))
    sparse = nn.Linear(16, 8, bias=False)
    sparse.weight = nn.Parameter(torch.eye(8, 16).to_sparse_csr(), requires_grad=False)
    model = nn.ModuleList([strided, wide, sparse]).requires_grad_(False)
    with torch.no_grad(), fast.quick_products(model):
        assert not [m for m in model if "forward" in vars(m)]


def test_a_hook_on_the_head_sees_at_least_one_state_and_no_dropout_is_drawn_for_the_question():
    model, rows = with_adapters(tiny_model()), []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[-2]))
    rollout = sample(model, *prompts())
    rows.clear()
    fast.completion_logps(model, rollout, temperature=1.0)
    assert rows and min(rows) > 0


def test_a_head_that_alone_is_trained_gets_its_gradient():
    found = []
    for engine in (grpo_lora, fast):
        model = with_adapters(tiny_model(), target_modules=["lm_head"])
        rollout = sample(model, *prompts(), eos_token_ids=[])
        logps, _ = engine.completion_logps(model, rollout, temperature=1.0)
        logps.sum().backward()
        found.append(model.lm_head.lora_B.weight.grad)
    torch.testing.assert_close(*found)


def logp_gradients(model, rollout, engine) -> dict:
    """Of every trainable parameter: the sum of a rollout's log-probs."""
    model.zero_grad()
    logps, _ = engine.completion_logps(model, rollout, temperature=0.7)
    logps[rollout.completion_mask].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_head_that_borrows_a_trained_embedding_gets_its_gradient():
    """peft's trainable_token_indices on a tied model: the head's own module has no parameter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7])
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=True), config)
    rollout = sample(model, *prompts())
    plain, engine = (logp_gradients(model, rollout, e) for e in (grpo_lora, fast))
    assert any("delta" in name for name in plain)
    torch.testing.assert_close(engine, plain)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_an_adapted_head_of_a_half_precision_model_gets_its_gradient(targets):
    model = with_adapters(tiny_model(dtype=torch.bfloat16), target_modules=targets)
    rollout = sample(model, *prompts())
    plain, engine = (logp_gradients(model, rollout, e) for e in (grpo_lora, fast))
    torch.testing.assert_close(engine, plain, rtol=0.05, atol=0.05)


def test_log_probs_under_autocast_have_one_dtype():
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts())
    with torch.autocast("cpu", torch.bfloat16):
        both = [e.completion_logps(model, rollout, temperature=1.0) for e in (grpo_lora, fast)]
    torch.testing.assert_close(*both, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_layer_whose_forward_is_patched_keeps_it_while_others_are_quick():
    model, calls = with_adapters(tiny_model()), []
    layer = model.model.layers[0].self_attn.q_proj
    own = layer.forward
    layer.forward = patched = lambda x: (calls.append(1), own(x))[1]
    with lora_merged(model):
        sample(model, *prompts(), engine=fast)
    assert calls and layer.forward is patched
