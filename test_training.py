"""The machine: models of many families, rollouts, training, files, faults, processes - and the gallery of known bugs.

Models are tiny and made from configs; nothing is downloaded. What can be exact is compared exactly.
"""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import hypothesis
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig
from transformers.pytorch_utils import Conv1D

import grpo_lora
import rewards
from grpo_lora import (
    GAP,
    CausalLM,
    GRPOConfig,
    GRPOTrainer,
    RewardError,
    Rollout,
    adapter_dropout,
    completion_logps,
    completion_mask,
    default_reference,
    demo_tokenizer,
    encode_prompt,
    generate,
    group_advantages,
    grpo_loss,
    main,
    multi_objective_advantages,
    printable,
)
from lora import (
    LoRAConfig,
    LoRALinear,
    TrainedCopy,
    apply_lora,
    load_lora,
    lora_disabled,
    lora_merged,
    lora_snapshot,
    merge_and_unload,
    param_groups,
    save_lora,
)

for profile, phases in (
    ("default", tuple(hypothesis.Phase)),
    ("gallery", (hypothesis.Phase.explicit, hypothesis.Phase.generate)),
):
    seeded = bool(os.environ.get("CI")) or profile == "gallery"
    settings.register_profile(profile, deadline=None, derandomize=seeded, phases=phases, database=None, max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # tiny models only get slower with more
TOKENIZER = demo_tokenizer()
VOCAB, EOS, PAD = len(TOKENIZER), TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
ROWS = rewards.sum_problems()[:40]


def tiny_model(seed: int = 0, config: type | None = None, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    if config is None:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config((config or LlamaConfig)(**sizes | kwargs)).to(dtype).eval()


def with_adapters(model, seed: int = 1, random: bool = True, **config):
    """`model` with adapters; random ones, unless told otherwise, so that they matter."""
    torch.manual_seed(seed)
    model = apply_lora(model, LoRAConfig(**{"r": 4, "lora_alpha": 8} | config))
    for name, p in model.named_parameters():
        if random and p.requires_grad and "magnitude" not in name:
            nn.init.normal_(p, std=0.2)
    return model


def prompts(lengths=(4, 7), seed: int = 0):
    """Left-padded prompts of random tokens: (P, L) ids and mask."""
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.full((len(lengths), max(lengths)), PAD), torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, n in enumerate(lengths):
        ids[row, -n:], mask[row, -n:] = torch.randint(5, VOCAB, (n,), generator=g), True
    return ids, mask


def sample(model, ids, mask, seed: int = 0, **kwargs) -> Rollout:
    options = {"num_generations": 3, "max_completion_length": 8, "temperature": 0.7, "eos_token_ids": [EOS, 7, 9]}
    options |= {"pad_token_id": PAD, "generator": torch.Generator().manual_seed(seed)}
    return generate(model, ids, mask, **options | kwargs)


def one_by_one(model, rollout: Rollout, temperature: float = 0.7) -> torch.Tensor:
    """The log-probs again, the simplest way there is: each row alone, no padding, no cache, the model's own logits."""
    G, out = rollout.num_generations, torch.zeros(rollout.completion_ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for row, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
            prompt = rollout.prompt_ids[row // G][rollout.prompt_mask[row // G]]
            whole = torch.cat([prompt, ids[mask]]).unsqueeze(0)
            logits = model(input_ids=whole).logits[0].double() / temperature
            n = int(mask.sum())
            out[row, :n] = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[mask].unsqueeze(1)).squeeze(1)
    return out


def gradients(model, loss) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def digits(completions, **columns):
    """A reward that tells random completions apart: how many characters are digits."""
    return [sum(c.isdigit() for c in rewards.completion_text(text)) / 4 for text in completions]


def trainer(model=None, reward=digits, rows=ROWS, eval_rows=None, **args) -> GRPOTrainer:
    defaults = {"max_steps": 2, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8}
    defaults |= {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 0}
    model = with_adapters(tiny_model(), random=False) if model is None else model
    return GRPOTrainer(model, reward, GRPOConfig(**defaults | args), rows, eval_rows, TOKENIZER)


def update(t: GRPOTrainer, index: int = 0) -> dict:
    t.seed("update", index)
    return t.update(t.batch(index))


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------- rollout


def test_rows_end_with_their_first_eos_and_are_padded_after_it():
    model, (ids, mask) = tiny_model(), prompts()
    rollout = sample(model, ids, mask, num_generations=8, max_completion_length=12)
    assert torch.equal(rollout.completion_mask, completion_mask(rollout.completion_ids, [EOS, 7, 9]))
    lengths = rollout.completion_mask.sum(1)
    assert lengths.max() == rollout.completion_ids.shape[1] and len(lengths.unique()) > 2
    ends = {int(row[n - 1]) for row, n in zip(rollout.completion_ids, lengths, strict=True) if n < 12}
    assert len(ends) > 1 and ends <= {EOS, 7, 9}  # each of several EOS ids ends a row
    assert (rollout.completion_ids[~rollout.completion_mask] == PAD).all()
    assert (rollout.logps[~rollout.completion_mask] == 0).all() and (rollout.logps[rollout.completion_mask] < 0).all()
    pad_is_eos = sample(model, ids, mask, num_generations=8, max_completion_length=12, pad_token_id=EOS)
    assert torch.equal(pad_is_eos.completion_mask, rollout.completion_mask)  # the chosen EOS stays inside
    endless = sample(model, ids, mask, eos_token_ids=[])
    assert endless.completion_ids.shape == (6, 8) and endless.completion_mask.all()
    short = sample(model, ids, mask, eos_token_ids=range(5, 36), max_completion_length=20)
    assert short.completion_mask.any(dim=0).all()  # no token more once all rows have ended


def test_tokens_are_drawn_with_the_probabilities_of_the_tempered_softmax():
    model, (ids, mask) = tiny_model(), prompts((3,))
    rollout = sample(model, ids, mask, num_generations=20000, max_completion_length=1, temperature=0.5)
    p = (model(input_ids=ids).logits[0, -1].double() / 0.5).softmax(-1)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=VOCAB).double()
    chi2 = ((counts - 20000 * p) ** 2 / (20000 * p)).sum().item()
    assert chi2 < VOCAB - 1 + 5 * math.sqrt(2 * VOCAB)  # five sigma
    torch.testing.assert_close(rollout.logps[:, 0].double(), p.log()[rollout.completion_ids[:, 0]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", [1, 2])
def test_what_a_row_draws_depends_on_no_other_row(split):
    model, (ids, mask) = tiny_model(dtype=torch.float64), prompts((4, 7, 5, 2))
    together, generator, parts = sample(model, ids, mask), torch.Generator().manual_seed(0), []
    for i in range(0, 4, split):
        parts.append(sample(model, ids[i : i + split], mask[i : i + split], generator=generator))
    rows = [row[m] for part in parts for row, m in zip(part.completion_ids, part.completion_mask, strict=True)]
    for row, m, own in zip(together.completion_ids, together.completion_mask, rows, strict=True):
        assert torch.equal(row[m], own)


def test_generation_leaves_the_model_as_it_was_and_acts_in_eval_mode():
    model = with_adapters(tiny_model(attention_dropout=0.5), lora_dropout=0.5)
    ids, mask = prompts()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    rollout = sample(model, ids, mask)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(rollout.logps.double(), one_by_one(model.eval(), rollout), atol=1e-5, rtol=0)


def test_the_models_own_generation_config_has_no_say():
    model, (ids, mask) = tiny_model(), prompts()
    before = sample(model, ids, mask)
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=1, top_p=0.1, temperature=0.1)
    assert torch.equal(sample(model, ids, mask).completion_ids, before.completion_ids)


def test_a_completion_of_t_tokens_takes_t_forwards_of_one_token_each_but_the_first(monkeypatch):
    model, (ids, mask) = tiny_model(), prompts()
    seen = []
    model.model.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    rollout = sample(model, ids, mask, eos_token_ids=[], max_completion_length=5)
    assert rollout.completion_ids.shape == (6, 5) and seen == [(2, 7)] + [(6, 1)] * 4
    seen.clear()
    rollout = sample(model, ids, mask, eos_token_ids=range(5, 36), max_completion_length=20)
    assert len(seen) == rollout.completion_ids.shape[1] < 20  # none after the last row has ended
    seen.clear()
    original = CausalLM.__init__
    monkeypatch.setattr(
        CausalLM, "__init__", lambda self, model: (original(self, model), setattr(self, "sharded", True))[0]
    )
    assert torch.equal(
        sample(model, ids, mask, eos_token_ids=range(5, 36), max_completion_length=20).logps, rollout.logps
    )
    assert len(seen) == 20  # as many as any other process may need


def test_draws_need_no_generator_and_one_that_rounds_to_one_gives_the_last_token(monkeypatch):
    model, (ids, mask) = tiny_model(), prompts()
    torch.manual_seed(0)
    first = sample(model, ids, mask, generator=None)
    torch.manual_seed(0)
    assert torch.equal(first.completion_ids, sample(model, ids, mask, generator=None).completion_ids)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(size, dtype=torch.float64))
    assert (sample(model, ids, mask, eos_token_ids=[]).completion_ids == VOCAB - 1).all()


def test_prompts_go_through_together_only_where_left_padding_is_safe():
    assert CausalLM(tiny_model()).blocks(3) == [slice(0, 3)]
    assert CausalLM(tiny_model()).blocks(2, together=False) == [slice(0, 1), slice(1, 2)]
    mamba = CausalLM(tiny_model(config=MambaConfig, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert not mamba.takes_cache and len(mamba.blocks(3)) == 3
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    gemma = tiny_model(config=transformers.Gemma3TextConfig, num_hidden_layers=2, hidden_size=32, **windows)
    assert CausalLM(gemma).takes_cache
    for dtype, attention, blocks in [("float64", "eager", 2), ("float64", "sdpa", 1), ("float32", "eager", 1)]:
        model = tiny_model(dtype=getattr(torch, dtype), attn_implementation=attention)
        assert len(CausalLM(model).blocks(2)) == blocks


def test_a_cache_has_room_where_all_is_kept_and_stays_a_window_where_that_slides():
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    gemma = tiny_model(config=transformers.Gemma3TextConfig, num_hidden_layers=2, hidden_size=32, **windows)
    kinds = [type(layer).__name__ for layer in CausalLM(gemma).new_cache(room=4).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "_RoomyLayer"]
    assert {type(layer).__name__ for layer in CausalLM(gemma).new_cache().layers} == {
        "DynamicSlidingWindowLayer",
        "DynamicLayer",
    }


@torch.no_grad()
def test_a_roomy_cache_holds_what_a_dynamic_one_holds_and_copies_nothing_to_write_a_token():
    lm, (ids, mask) = CausalLM(tiny_model()), prompts()
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
        on_both(lambda cache, mask=mask, token=token: lm.hidden(torch.full((len(mask), 1), 7 + token), mask, cache))
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
    hidden, forwards = CausalLM.hidden, []

    def uncounted(self, *args):
        before = dict(asked)
        out = hidden(self, *args)
        asked.clear()
        asked.update(before)
        forwards.append(1)
        return out

    monkeypatch.setattr(CausalLM, "hidden", uncounted)
    with Count():
        rollout = sample(model, ids, mask, eos_token_ids=range(5, 12) if ending else [], max_completion_length=20)
    lengths = rollout.completion_mask.sum(dim=1)
    assert asked["_local_scalar_dense"] <= len(forwards) + 4  # a few before and after the loop
    assert asked["nonzero"] <= (len(set(lengths.tolist())) if ending else 0) + 2


def test_a_group_that_is_masked_whole_keeps_one_column():
    rollout = sample(tiny_model(), *prompts())
    rollout.completion_mask[:3] = False
    assert rollout.select([0]).completion_ids.shape == (3, 1)


def test_merged_and_unmerged_rollouts_are_the_same():
    model, (ids, mask) = with_adapters(tiny_model(dtype=torch.float64)), prompts()
    plain = sample(model, ids, mask)
    with lora_merged(model):
        merged = sample(model, ids, mask)
    assert torch.equal(plain.completion_ids, merged.completion_ids)
    torch.testing.assert_close(plain.logps, merged.logps)


# --------------------------------------------------------------------------------------------------------- log-probs


def test_left_padding_moves_no_position():
    model = tiny_model(config=GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    rollout = sample(model, *prompts((2, 9)))
    torch.testing.assert_close(rollout.logps.double(), one_by_one(model, rollout), atol=1e-4, rtol=0)
    logps, _ = completion_logps(model, rollout, temperature=0.7)
    torch.testing.assert_close(logps.double(), one_by_one(model, rollout), atol=1e-4, rtol=0)


def test_half_precision_models_are_scored_in_float32():
    model = with_adapters(tiny_model(dtype=torch.bfloat16))
    rollout = sample(model, *prompts())
    logps, entropies = completion_logps(model, rollout, temperature=0.7)
    assert logps.dtype == entropies.dtype == rollout.logps.dtype == torch.float32
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(CausalLM(model).logits(hidden), model.lm_head(hidden).float())


@given(seed=st.integers(0, 99), chunk=st.integers(1, 20), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=10)
def test_log_probs_ignore_chunking_sharing_and_padding(seed, chunk, left, right):
    model = with_adapters(tiny_model(dtype=torch.float64))
    ids, mask = prompts((2, 6), seed)
    rollout = sample(model, ids, mask, seed)
    weights = torch.randn(rollout.logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain, entropies = completion_logps(model, rollout, temperature=0.7, share_prompt=False)
    wider = Rollout(
        nn.functional.pad(ids, (left, 0), value=3), nn.functional.pad(mask, (left, 0)),
        nn.functional.pad(rollout.completion_ids, (0, right), value=5), nn.functional.pad(rollout.completion_mask, (0, right)),
        nn.functional.pad(rollout.logps, (0, right)),
    )  # fmt: skip
    logps, entropies2 = completion_logps(model, wider, temperature=0.7, chunk_size=chunk)
    T = plain.shape[1]
    torch.testing.assert_close(logps[:, :T], plain)
    torch.testing.assert_close(entropies2[:, :T], entropies)
    assert not logps[:, T:].any() and (logps[~wider.completion_mask] == 0).all()
    wanted, got = gradients(model, (plain * weights).sum()), gradients(model, (logps[:, :T] * weights).sum())
    for name in wanted:  # Llama's norms compute in float32, whence the tolerance
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lm_head adapter", "lm_head copy", "everything", "tied"])
def test_a_trained_head_gets_the_gradient_of_the_plain_computation(kind):
    model = tiny_model(dtype=torch.float64, tie_word_embeddings=kind == "tied")
    if kind == "lm_head copy":
        with_adapters(model, modules_to_save=["lm_head"])
    elif kind in ("lm_head adapter", "tied"):
        with_adapters(model, target_modules=["lm_head", "q_proj"])
    rollout = sample(model, *prompts())
    logps, entropies = completion_logps(model, rollout, temperature=0.7, chunk_size=3)
    torch.testing.assert_close(logps.detach(), one_by_one(model, rollout), atol=1e-9, rtol=0)
    assert not entropies.requires_grad
    plain = 0.0
    for row, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        prompt = rollout.prompt_ids[row // 3][rollout.prompt_mask[row // 3]]
        logits = model(input_ids=torch.cat([prompt, ids[mask]]).unsqueeze(0)).logits[0] / 0.7
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[mask].unsqueeze(1))
        plain = plain + (row + 1) * own.sum()
    weights = torch.arange(1, 7).unsqueeze(1)
    wanted, got = gradients(model, plain), gradients(model, (logps * weights).sum())
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-4)


def test_scoring_changes_no_input():
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts())
    before = copy.deepcopy(rollout)
    for share in (True, False):
        logps, _ = completion_logps(model, rollout, temperature=0.7, share_prompt=share)
        logps.sum().backward()
    for f in dataclasses.fields(Rollout):
        assert torch.equal(getattr(rollout, f.name), getattr(before, f.name))


def test_a_failed_merge_leaves_nothing_merged_and_frozen_adapters_can_be_merged(monkeypatch):
    model, (ids, _) = with_adapters(tiny_model()), prompts()
    out, calls = model(ids).logits, []
    original = LoRALinear.merged_weight

    def third_fails(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        return original(layer)

    monkeypatch.setattr(LoRALinear, "merged_weight", third_fails)
    with pytest.raises(MemoryError), lora_merged(model):
        pass
    assert torch.equal(model(ids).logits, out) and all(m.merged is None for m in calls)
    model(ids).logits.sum().backward()
    with lora_snapshot(model)(), lora_merged(model), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, out, atol=1e-5, rtol=1e-5)


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    save_lora(with_adapters(tiny_model(), r=2), tmp_path / "right")
    save_lora(with_adapters(tiny_model(hidden_size=16)), tmp_path / "wrong")
    model, (ids, _) = tiny_model(), prompts()
    out, flags = model(ids).logits, [p.requires_grad for p in model.parameters()]
    for refused in (
        lambda: load_lora(model, tmp_path / "wrong"),
        lambda: apply_lora(model, LoRAConfig(r=20, init_lora_weights="pissa", rank_pattern={"q_proj": 4})),
    ):
        with pytest.raises(ValueError):
            refused()
        assert torch.equal(model(ids).logits, out) and flags == [p.requires_grad for p in model.parameters()]
    load_lora(model, tmp_path / "right")


def test_masks_of_numbers_are_masks():
    model, (ids, mask) = with_adapters(tiny_model()), prompts()
    rollout = sample(model, ids, mask.long())
    numbers = Rollout(ids, mask.long(), rollout.completion_ids, rollout.completion_mask.float(), rollout.logps)
    assert torch.equal(*(completion_logps(model, r, temperature=0.7)[0] for r in (rollout, numbers)))


def test_a_rollout_without_tokens_to_train_has_zero_gradient():
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts())
    rollout.completion_mask = torch.zeros_like(rollout.completion_mask)
    logps, _ = completion_logps(model, rollout, temperature=1.0)
    assert not logps.any() and not any(g.any() for g in gradients(model, logps.sum()).values())


def test_no_tensor_has_the_size_of_completion_times_vocabulary():
    """With a vocabulary of 262,144, scoring 64 tokens a few at a time never holds 64 rows of logits."""
    model = tiny_model(
        vocab_size=262_144, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = with_adapters(model)
    ids = torch.randint(5, 1000, (1, 4))
    completions = torch.randint(5, 1000, (4, 16))
    rollout = Rollout(
        ids, torch.ones_like(ids).bool(), completions, torch.ones_like(completions).bool(), torch.zeros(4, 16)
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Watch():
        logps, _ = completion_logps(model, rollout, temperature=1.0, chunk_size=4)
        logps.sum().backward()
    assert largest <= 8 * 262_144  # the weights themselves; the logits would be 64 rows


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_reaches_adapters_over_frozen_embeddings_and_changes_no_gradient(training):
    model = with_adapters(tiny_model(dtype=torch.float64))
    rollout = sample(model, *prompts())
    wanted = gradients(model, completion_logps(model, rollout, temperature=0.7)[0].sum())
    model.activation_checkpointing_enable({"use_reentrant": False})
    if training:
        model.train()
    with adapter_dropout(model) if not training else contextlib.nullcontext():
        logps, _ = completion_logps(model, rollout, temperature=0.7)
        got = gradients(model, logps.sum())
    torch.testing.assert_close(logps.detach(), one_by_one(model.eval(), rollout), atol=1e-9, rtol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_one_step_of_a_whole_lora_model_by_finite_differences():
    model = with_adapters(
        tiny_model(config=GPT2Config, dtype=torch.float64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )
    rollout = sample(model, *prompts())
    A = group_advantages(torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).flatten()
    old = completion_logps(model, rollout, temperature=0.7)[0].detach() + 0.05
    ref = old - 0.1

    def loss():
        logps, _ = completion_logps(model, rollout, temperature=0.7)
        return grpo_loss(logps, old, A, rollout.completion_mask, ref_logps=ref, beta=0.1, loss_type="grpo")[0]

    got = gradients(model, loss())
    for name, p in list(model.named_parameters()):
        if p.requires_grad:
            direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            with torch.no_grad():
                p += 1e-6 * direction
                up = loss()
                p -= 2e-6 * direction
                down = loss()
                p += 1e-6 * direction
            slope = ((up - down) / 2e-6).item()
            assert (got[name] * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


# ------------------------------------------------------------------------------------------------------------ models


@given(seed=st.integers(0, 999), dora=st.booleans(), tied=st.booleans())
@settings(max_examples=8)
def test_training_reaches_adapters_only_and_the_base_stays_bit_equal(seed, dora, tied):
    model = tiny_model(seed % 5, tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    model = with_adapters(model, use_dora=dora, random=False)
    ids = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(seed))
    with lora_disabled(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
    t = trainer(model, weight_decay=0.5, seed=seed)
    before = adapters_of(model)
    t.train()
    assert any(not torch.equal(before[name], p) for name, p in adapters_of(model).items())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with lora_disabled(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
    own = dict(base.named_parameters())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, own[name.replace(".base_layer", "")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_thousand_times_leaves_every_bit_of_the_base(dtype):
    model = with_adapters(tiny_model(dtype=dtype, tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    ids = torch.randint(0, VOCAB, (2, 5))
    state, out = copy.deepcopy(model.state_dict()), model(ids).logits
    with torch.no_grad():
        for _ in range(1000):
            with lora_merged(model):
                pass
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(model(ids).logits, out)


def test_merging_an_adapted_head_leaves_the_tied_embedding_alone(tmp_path):
    model = with_adapters(tiny_model(tie_word_embeddings=True), target_modules=["lm_head", "v_proj"])
    ids, embedding = torch.randint(0, VOCAB, (2, 5)), model.get_input_embeddings().weight.clone()
    out = model(ids).logits
    with torch.no_grad(), lora_merged(model):
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        torch.testing.assert_close(model(ids).logits, out)
    plain = merge_and_unload(model)
    assert torch.equal(plain.get_input_embeddings().weight, embedding) and not plain.config.tie_word_embeddings
    assert not any(isinstance(m, LoRALinear) for m in plain.modules())
    assert all(p.requires_grad for p in plain.parameters()) and not hasattr(plain, "lora_config")
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, out)
    assert torch.equal(again(ids).logits, plain(ids).logits)


ADAPTERS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*.up_proj": 3}},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "saved among all": {"modules_to_save": ["mlp"]},  # all-linear then leaves out what is inside
    "nested": {"modules_to_save": ["mlp", "down_proj"], "target_modules": ["q_proj"]},
    "norms": {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},  # PEFT's rule: every name that ends so
    "regex": {"target_modules": r".*\.1\..*_proj"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_saved_adapter_comes_back_to_the_bit_and_trainable(kind, tmp_path):
    model, ids = with_adapters(tiny_model(), **ADAPTERS[kind]), torch.randint(0, VOCAB, (2, 5))
    tmp_path = tmp_path / "made" / "for it"
    save_lora(model, tmp_path)
    save_lora(model, tmp_path)  # over itself
    again = load_lora(tiny_model(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(adapters_of(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] and isinstance(config["target_modules"], list)
    assert not any("residual" in key for key in model.state_dict())
    if kind == "plain":  # settings of other files that change nothing here
        for init in (False, "orthogonal"):
            (tmp_path / "adapter_config.json").write_text(
                json.dumps(config | {"init_lora_weights": init, "lora_bias": False})
            )
            assert torch.equal(load_lora(tiny_model(), tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c, t: t.pop(next(iter(t))), "is missing"),
        (lambda c, t: t.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(1)}), "layers.9.x"),
        (lambda c, t: c.update(r=5), "another rank"),
        (lambda c, t: c.update(peft_type="IA3"), "IA3"),
        (lambda c, t: c.update(layers_to_transform=[0]), "layers_to_transform"),
        (lambda c, t: c.update(target_parameters=["experts"]), "target_parameters"),
        (lambda c, t: c.update(bias="all"), "bias"),
        (lambda c, t: c.update(target_modules=["nope"]), "nope"),
    ],
)
def test_an_adapter_file_that_does_not_fit_is_refused_by_name(damage, words, tmp_path):
    from safetensors.torch import load_file, save_file

    save_lora(with_adapters(tiny_model()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=words) as refusal:
        load_lora(tiny_model(), tmp_path)
    assert "\n" not in str(refusal.value)
    save_lora(with_adapters(tiny_model()), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="safetensors"):
        load_lora(tiny_model(), tmp_path)
    for text, said in (
        ("{", "cannot be read as JSON"),
        ("[1]", "only 'LORA'"),
        ('{"peft_type": "IA3"}', "only 'LORA'"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            load_lora(tiny_model(), tmp_path)


def test_a_snapshot_is_the_policy_of_its_moment():
    for model in (with_adapters(tiny_model()), tiny_model(tie_word_embeddings=True)):
        ids = torch.randint(0, VOCAB, (2, 5))
        before, snapshot = model(ids).logits, lora_snapshot(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1
        after = model(ids).logits
        with pytest.raises(KeyError), snapshot():
            assert not model(ids).logits.requires_grad  # frozen: nothing can be learnt through it
            assert torch.equal(model(ids).logits, before)
            raise KeyError
        assert torch.equal(model(ids).logits, after) and not torch.equal(after, before)


def test_a_merged_and_unloaded_model_is_trainable_tied_as_before_and_the_file_names_its_base(tmp_path):
    model = with_adapters(tiny_model(tie_word_embeddings=True))
    model.config._name_or_path = "some/base"
    save_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    merged = merge_and_unload(model)
    assert all(p.requires_grad for p in merged.parameters()) and merged.config.tie_word_embeddings
    assert not hasattr(merged, "lora_config")


def test_modules_to_save_are_not_adapted_inside():
    model = with_adapters(tiny_model(), modules_to_save=["mlp"])
    assert not [name for name, m in model.named_modules() if isinstance(m, LoRALinear) and "mlp" in name]
    assert len([m for m in model.modules() if isinstance(m, TrainedCopy)]) == 2


def test_in_the_loss_forward_adapter_dropout_acts_and_no_other():
    model = with_adapters(tiny_model(attention_dropout=0.5), lora_dropout=0.5)
    with adapter_dropout(model):
        acting = {name for name, m in model.named_modules() if m.training}
    assert acting == {name for name, m in model.named_modules() if name.endswith("lora_dropout")} and len(acting) == 14


def test_models_that_cannot_be_right_are_refused():
    empty = tiny_model()
    empty.forward = lambda **kwargs: None
    with pytest.raises(ValueError, match="calls no submodule"):
        CausalLM(empty)
    with pytest.raises(ValueError, match="encoder-decoder"):
        CausalLM(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            )
        )
    gemma = transformers.Gemma3TextConfig(
        hidden_size=8, vocab_size=9, num_hidden_layers=1, use_bidirectional_attention=True
    )
    with pytest.raises(ValueError, match="later tokens"):
        CausalLM(AutoModelForCausalLM.from_config(gemma))
    bert = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, vocab_size=9, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="encoder, whose tokens see later ones"):
        CausalLM(transformers.BertLMHeadModel(bert))
    with pytest.raises(ValueError, match="already carries"):
        apply_lora(with_adapters(tiny_model()), LoRAConfig())
    with pytest.raises(ValueError, match="no LoRA adapter"), lora_disabled(tiny_model()):
        pass


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "args", [{}, {"loss_type": "grpo", "beta": 0.1}, {"loss_type": "dr_grpo", "top_entropy_quantile": 0.3}]
)
def test_the_update_does_not_depend_on_the_micro_batch_split(args):
    seen = []
    for size in (4, 8, 16):
        t = trainer(with_adapters(tiny_model(dtype=torch.float64)), per_device_train_batch_size=size, **args)
        metrics = update(t)
        seen.append(({name: p.grad.clone() for name, p in t.params.items()}, metrics))
    for grads, metrics in seen[1:]:
        for name in grads:
            torch.testing.assert_close(grads[name], seen[0][0][name], atol=1e-6, rtol=1e-5)
        for key in ("loss", "entropy", "grad_norm", "reward", GAP):
            assert metrics[key] == pytest.approx(seen[0][1][key], rel=1e-5, abs=1e-9), key


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_the_update_is_the_sum_over_rows_of_minus_a_grad_logp_under_the_normaliser(loss_type):
    """Groups without advantage are skipped and micro-batches split, yet the gradient is that of the whole batch."""
    pattern = [1.0, 0.0, 0.0, 0.5] * 2 + [1.0] * 4 + [0.0] * 4  # two of the four groups have equal rewards
    t = trainer(
        reward=lambda completions, **columns: pattern,
        loss_type=loss_type,
        max_grad_norm=1e9,
        model=with_adapters(tiny_model()),
    )
    seen = []
    original = t.sample
    t.sample = lambda rows, n: seen.append(original(rows, n)) or seen[-1]
    before = copy.deepcopy(t.model)
    update(t)
    rollout = seen[0]
    logps, _ = completion_logps(before, rollout, temperature=1.0, share_prompt=False)
    A = group_advantages(torch.tensor(pattern).view(4, 4)).flatten()
    m = rollout.completion_mask
    weight = {"dapo": 1 / m.sum(), "grpo": 1 / (m.sum(1, keepdim=True) * 16), "dr_grpo": 1 / (16 * 8), "luspo": 1 / 16}[
        loss_type
    ]
    wanted = gradients(before, -(A.unsqueeze(1) * logps * weight).sum())
    for name, p in t.params.items():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_a_batch_without_advantage_has_zero_gradients_and_is_still_a_step():
    t = trainer(reward=lambda completions, **columns: [1.0] * len(completions))
    metrics = update(t)
    assert all(p.grad is not None and not p.grad.any() for p in t.params.values())
    assert metrics["frac_reward_zero_std"] == 1 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert t.scheduler.last_epoch == 1


def test_the_first_update_is_exactly_on_policy_and_later_iterations_are_not():
    ratios = []
    original = grpo_loss

    def spy(logps, old_logps, *args, **kwargs):
        ratios.append((logps - old_logps).detach().exp())
        return original(logps, old_logps, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_lora, "grpo_loss", spy)
        update(trainer(with_adapters(tiny_model(), lora_dropout=0.3)))
        assert all((r == 1).all() for r in ratios)
        ratios.clear()
        t = trainer(num_iterations=2, per_device_train_batch_size=16, loss_type="grpo", learning_rate=0.05)
        metrics = update(t)
    assert len(ratios) == 2 and (ratios[0] == 1).all() and (ratios[1] - 1).abs().max() > 1e-3
    assert metrics["clip_ratio/region_mean"] > 0 and t.scheduler.last_epoch == 2


def test_the_sampler_and_the_scorer_agree_at_any_temperature():
    for temperature in (0.5, 1.0, 1.7):
        metrics = update(trainer(with_adapters(tiny_model(), lora_dropout=0.0), temperature=temperature))
        assert metrics[GAP] < 1e-5


def test_the_gap_compares_sampler_and_scorer_of_one_policy():
    assert update(trainer(num_iterations=2, learning_rate=0.3))[GAP] < 1e-5


def test_the_reference_is_the_policy_that_training_starts_from(tmp_path):
    fresh = with_adapters(tiny_model(), random=False)
    assert not isinstance(default_reference(fresh), lora_snapshot)  # adapter off is exactly that
    save_lora(with_adapters(tiny_model()), tmp_path)
    for model in (
        load_lora(tiny_model(), tmp_path),  # a continued adapter: adapter off would be the base model
        with_adapters(tiny_model(), random=False, init_lora_weights="pissa"),
        tiny_model(),  # full fine-tuning
    ):
        assert isinstance(default_reference(model), lora_snapshot)
    mixed = with_adapters(tiny_model(), random=False)
    mixed.model.norm.weight.requires_grad_(True)  # trainable, but not switched off with the adapters
    assert isinstance(default_reference(mixed), lora_snapshot)
    for model in (fresh, load_lora(tiny_model(), tmp_path), tiny_model(), mixed):
        t = trainer(model, beta=0.1, learning_rate=1e-3)
        first = update(t)
        assert first["kl"] == pytest.approx(0, abs=1e-7)
        assert update(t, 1)["kl"] > 1e-9


def test_truncated_rows_can_be_left_out_and_keep_their_place_in_the_statistics():
    t = trainer(mask_truncated_completions=True, max_completion_length=3, model=with_adapters(tiny_model()))
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = grpo_loss
        patch.setattr(grpo_lora, "grpo_loss", lambda *a, **k: calls.append((a, k)) or original(*a, **k))
        update(t)
    truncated = [not s["ended"] for s in t.samples]
    assert any(truncated) and not all(truncated)
    tokens = sum(s["length"] for s in t.samples if s["ended"])
    assert all(k["normalizer"] == tokens for _, k in calls)
    trained = sum(int(a[3].sum()) for a, _ in calls)
    assert 0 < trained <= tokens
    t = trainer(
        mask_truncated_completions=True,
        max_completion_length=1,
        reward=lambda completions, **c: [float(i) for i in range(16)],
    )
    t.eos_token_ids = [VOCAB + 1]  # nothing ever ends: no token to train on
    metrics = update(t)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_the_logged_loss_is_that_of_the_whole_batch():
    t = trainer(with_adapters(tiny_model()), loss_type="dapo")
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        original = grpo_loss

        def spy(*a, **k):
            losses.append(original(*a, **k))
            return losses[-1]

        patch.setattr(grpo_lora, "grpo_loss", spy)
        metrics = update(t)
    assert len(losses) > 1 and metrics["loss"] == pytest.approx(sum(loss.item() for loss, _ in losses))
    assert metrics["grad_norm"] > 0


def test_each_completion_is_graded_with_its_own_row():
    rows = [{"prompt": f"{a}+1+1=?", "answer": str(a), "note": a} for a in range(8)]
    seen = {}

    def check(prompts, completions, completion_ids, answer, note, trainer_state, log_extra, log_metric, **columns):
        assert all(p == f"{n}+1+1=?" and a == str(n) for p, a, n in zip(prompts, answer, note, strict=True))
        assert [len(list(g)) for _, g in itertools.groupby(prompts)] == [4] * 4
        assert all(isinstance(c, str) for c in completions) and len(completion_ids) == 16
        assert trainer_state.global_step == 0 and trainer_state.max_completion_length == 8
        log_extra("mine", list(range(16)))
        log_metric("my_metric", 0.25)
        seen["prompts"] = prompts
        return [float(n) for n in note]

    t = trainer(reward=check, rows=rows)
    metrics = update(t)
    assert metrics["my_metric"] == 0.25 and [s["mine"] for s in t.samples] == list(range(16))
    assert metrics["rewards/check/mean"] == pytest.approx(sum(int(p[0]) for p in seen["prompts"]) / 16)
    assert metrics["frac_reward_zero_std"] == 1  # one value a group


def test_chat_prompts_get_chat_completions_and_solution_serves_as_answer():
    rows = [{"prompt": row["prompt"], "solution": row["answer"]} for row in ROWS]

    def check(completions, answer, solution, **columns):
        assert answer == solution and all(c[0]["role"] == "assistant" for c in completions)
        return [0.0] * len(completions)

    update(trainer(reward=check, rows=rows))


def test_each_row_is_graded_by_its_answer_or_its_solution():
    rows = [{"prompt": "1+1=?", "answer": "2"}, {"prompt": "2+2=?", "solution": "4"}]
    seen = {}
    check = lambda answer, **columns: seen.update(answer=answer) or [0.0] * len(answer)
    update(trainer(reward=check, rows=rows, prompts_per_step=2))
    assert sorted(seen["answer"]) == ["2"] * 4 + ["4"] * 4


def test_an_update_that_is_not_finite_is_skipped_counted_and_the_third_in_a_row_ends_the_run_with_its_state_saved(
    tmp_path,
):
    bad = {1, 3, 4, 5}  # by number of the update, from 0
    t = trainer(max_steps=9, output_dir=str(tmp_path))
    next(iter(t.params.values())).register_hook(lambda g: g * math.nan if t.step in bad else g)
    after = {}
    original = t.update

    def watched(rows):
        metrics = original(rows)
        after[t.step] = adapters_of(t.model)
        return metrics

    t.update = watched
    with pytest.raises(FloatingPointError, match=r"update 6: 3 updates in a row.*lower learning_rate"):
        t.train()
    unchanged = {n for n in range(1, 6) if all(torch.equal(after[n][k], after[n - 1][k]) for k in after[n])}
    assert unchanged == bad
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 1, 1, 1] and rows[1]["grad_norm"] is None
    assert "skipped_updates is 1: " in rows[1]["warnings"][-1]
    assert (tmp_path / "checkpoint-6/manifest.json").exists()  # though save_steps is 0
    assert not (tmp_path / "adapter").exists()


def test_a_policy_that_is_not_finite_itself_is_not_saved(tmp_path):
    t = trainer(max_steps=9, output_dir=str(tmp_path), save_steps=1)
    B = next(p for name, p in t.params.items() if "lora_B" in name)
    original = t.update

    def watched(rows):
        metrics = original(rows)
        if t.step == 2:
            B.detach().fill_(math.inf)
        return metrics

    t.update = watched
    with pytest.raises(FloatingPointError, match="update 6"):
        t.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_policy_that_is_nan_is_noticed_where_no_group_has_an_advantage():
    t = trainer(reward=lambda completions, **columns: [1.0] * len(completions))
    assert update(t)["skipped_updates"] == 0
    next(p for name, p in t.params.items() if "lora_B" in name).detach().fill_(math.nan)
    assert update(t)["skipped_updates"] == 1


def test_a_run_that_three_bad_updates_ended_ends_at_once_when_it_is_resumed(tmp_path):
    for updates in (3, 4):
        t = trainer(max_steps=9, save_steps=1, output_dir=str(tmp_path), resume=updates > 3)
        t.update = lambda rows, original=t.update: original(rows) | {"skipped_updates": 1}
        with pytest.raises(FloatingPointError, match=f"update {updates}: {updates} updates in a row"):
            t.train()


@pytest.mark.parametrize("settings", [{}, {"top_entropy_quantile": 0.5}, {"mask_truncated_completions": True}])
def test_what_an_update_did_to_each_token_is_recorded(settings, tmp_path):
    t = trainer(
        num_completions_to_log=8, log_tokens_steps=1, max_steps=1, output_dir=str(tmp_path), temperature=0.7, **settings
    )
    t.train()
    rows, (rollout, batches) = lines(tmp_path / "completions.jsonl"), t.last_batch
    whole = dataclasses.replace(rollout, completion_mask=completion_mask(rollout.completion_ids, t.eos_token_ids))
    after = one_by_one(t.model, whole)
    assert len(rows) == 8 and all(len(row["tokens"]) == row["length"] for row in rows)
    for i, row in enumerate(rows):
        n = row["length"]
        assert "".join(row["tokens"]) == TOKENIZER.decode(rollout.completion_ids[i, :n])
        assert row["logps_sampled"] == pytest.approx(rollout.logps[i, :n].tolist())
        assert row["logps_after"] == pytest.approx(after[i, :n].tolist(), abs=1e-4)
        if settings.get("mask_truncated_completions"):
            assert row["trained"] == [row["ended"]] * n
    if "top_entropy_quantile" in settings:
        assert all(row["trained"] == [True] * row["length"] for row in rows) is False
        kept = {p: m for b in batches for p, m in zip(b.prompts, b.policy_mask.split(4), strict=True)}
        for i, row in enumerate(rows):
            assert row["trained"] == kept[i // 4][i % 4, : row["length"]].tolist()
    elif not settings:
        assert all(all(row["trained"]) for row in rows)


def test_the_default_learning_rate_follows_width_alpha_and_method():
    rate = lambda width=32, **config: grpo_lora.default_learning_rate(
        with_adapters(tiny_model(hidden_size=width), random=False, **config)
    )
    assert rate(lora_alpha=32) == pytest.approx(1.25e-4 * (2000 / 32) ** 0.78, rel=0.05)
    assert rate(lora_alpha=8) == pytest.approx(4 * rate(lora_alpha=32), rel=0.05)
    assert rate(r=1) == rate(r=16)  # s = α/r: the rank cancels
    assert rate(r=16, use_rslora=True) == pytest.approx(rate(r=4, use_rslora=True) / 2, rel=0.05)
    assert rate(width=64) == pytest.approx(rate(width=32) / 2**0.78, rel=0.05)
    assert grpo_lora.default_learning_rate(tiny_model()) == pytest.approx(rate(lora_alpha=32) / 10, rel=0.05)
    t = trainer(learning_rate=None)
    assert t.args.learning_rate == t.optimizer.param_groups[0]["lr"] == rate()


def test_what_rewards_log_is_a_mean_over_the_evaluation_and_must_fit():
    def counts(completions, log_metric, log_extra, **columns):
        log_metric("rows", torch.tensor(len(completions)))
        log_extra("x", [1] * (len(completions) if columns.get("fits", True) else 1))
        return [0.0] * len(completions)

    t = trainer(reward=counts, eval_rows=ROWS[:5], prompts_per_step=1, num_generations=2)
    assert t.evaluate()["eval_rows"] == pytest.approx((2 + 2 + 1) / 3)
    with pytest.raises(RewardError, match="log_extra"):
        update(trainer(reward=lambda **c: counts(c.pop("completions"), **c | {"fits": False})))


async def slow_reward(completions, **columns):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


def test_rewards_may_be_async_may_say_none_and_are_weighted():
    half = lambda completions, **columns: [1.0 if i % 2 else None for i in range(len(completions))]
    t = trainer(reward=[slow_reward, half], reward_weights=[2.0, 10.0])
    metrics = update(t)
    assert metrics["rewards/slow_reward/mean"] == 0.5 and metrics["reward"] == pytest.approx((1 + 11) / 2)
    assert [s["rewards/slow_reward"] for s in t.samples] == [0.5] * 16
    t = trainer(reward=lambda completions, **columns: [None] * len(completions))
    assert math.isnan(update(t)["reward"]) and not any(p.grad.any() for p in t.params.values())


def test_names_that_rewards_log_do_not_stand_in_for_ours(tmp_path):
    def shadows(completions, log_extra, log_metric, **columns):
        for name in ("length", "ended", "step", "advantage", "note"):
            log_extra(name, ["x"] * len(completions))
        for name in ("step", "reward", "grad_norm", "num_tokens", "mine"):
            log_metric(name, -1.0)
        return digits(completions)

    metrics = trainer(reward=shadows, output_dir=str(tmp_path)).train()
    assert (
        metrics["step"] == 2 and min(metrics[k] for k in ("reward", "grad_norm", "num_tokens")) >= 0 > metrics["mine"]
    )
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    sample = lines(tmp_path / "completions.jsonl")[0]
    assert sample["step"] == 1 and sample["note"] == "x" and isinstance(sample["length"], int)


def hanging(completions, **columns):
    while True:
        try:
            time.sleep(5)
        except Exception:
            continue


async def hanging_async(completions, **columns):
    while True:
        with contextlib.suppress(Exception):
            await asyncio.sleep(5)


def hanging_lazily(completions, **columns):
    return (hanging(completions) for _ in completions)


@pytest.mark.parametrize("function", [hanging, hanging_async, hanging_lazily])
def test_a_reward_that_hangs_is_stopped_and_named(function):
    started, handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(RewardError, match=f"reward {function.__name__} took longer than reward_timeout = 0.2 s"):
        update(trainer(reward=function, reward_timeout=0.2))
    assert time.monotonic() - started < 4
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_reward_that_hangs_in_another_thread_ends_the_process_and_is_named():
    code = "import threading, grpo_lora as g, test_training as t\n"
    code += "run = lambda: g.call_reward(t.hanging, 1, {'completions': ['']}, 0.2)\n"
    code += "x = threading.Thread(target=run); x.start(); x.join()"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "reward hanging took longer than 0.2 s" in result.stderr


def test_an_async_reward_runs_inside_a_running_event_loop_too():
    async def notebook():
        return update(trainer(reward=slow_reward))

    assert asyncio.run(notebook())["reward"] == 0.5


def test_running_out_of_memory_names_the_settings_that_need_less(model_dir, data, tmp_path, capsys):
    huge = ["--num_generations", "20000000", "--max_completion_length", "30", "--per_device_train_batch_size", "4"]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    command = ["--model", str(model_dir), "--data", str(data), *SMALL, *huge, "--output_dir", str(tmp_path / "out")]
    command += ["--device", "cpu"]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, limits[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: out of memory: lower per_device_train_batch_size")
    torch_error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(MemoryError, match="per_device_train_batch_size"), grpo_lora.memory_advice():
        raise torch_error


def broken(what):
    def reward(completions, **columns):
        if what == "raises":
            raise RuntimeError("boom")
        return {"short": [1.0], "inf": [math.inf] * len(completions), "text": ["x"] * len(completions), "none": None}[
            what
        ]

    return reward


@pytest.mark.parametrize(
    ("what", "words"),
    [("raises", "boom"), ("short", "1 values for 16"), ("inf", "infinite"), ("text", "x"), ("none", "None")],
)
def test_a_reward_that_fails_is_named(what, words):
    with pytest.raises(RewardError, match=f"reward reward .*{words}"):
        update(trainer(reward=broken(what)))


def test_a_trainer_that_cannot_work_says_so():
    for words, make in [
        ("no trainable parameter", lambda: trainer(tiny_model().requires_grad_(False))),
        ("lora_dropout", lambda: trainer(with_adapters(tiny_model(), lora_dropout=0.1), num_iterations=2)),
        ("reward_weights", lambda: trainer(reward_weights=[1.0, 2.0])),
        ("at least one reward", lambda: trainer(reward=[])),
        ("row 1: 'prompt'", lambda: trainer(rows=[ROWS[0], {"answer": "3"}])),
        ("row 0: no column 'answer'", lambda: trainer(reward="accuracy", rows=[{"prompt": "1"}])),
        ("row 0: the prompt has 80 tokens", lambda: trainer(rows=[{"prompt": "1+" * 40}])),
        ("data set is empty", lambda: trainer(rows=[])),
    ]:
        with pytest.raises(ValueError, match=words):
            make()


def test_every_eos_id_of_the_tokenizer_and_the_generation_config_counts():
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, 7, 9]
    t = trainer(with_adapters(model))
    assert t.eos_token_ids == [EOS, 7, 9]
    update(t)
    ends = [i for i, s in enumerate(t.samples) if s["ended"] and s["length"] < 8]
    assert ends and all(s["ended"] or s["length"] == 8 for s in t.samples)


def test_prompts_take_the_chat_template_the_system_prompt_or_neither():
    chat = [{"role": "user", "content": "1+2"}]
    decode = lambda *args: TOKENIZER.decode(encode_prompt(*args))
    assert decode("1+2", TOKENIZER) == "1+2"
    assert decode(chat, TOKENIZER) == "<user>1+2<end><assistant>"
    assert decode("1+2", TOKENIZER, "3") == decode(chat, TOKENIZER, "3") != decode(chat, TOKENIZER)
    begun = [*chat, {"role": "assistant", "content": "<think>1"}]
    assert decode(begun, TOKENIZER) == "<user>1+2<end><assistant><think>1"


def test_data_order_is_a_permutation_each_epoch_and_a_function_of_the_seed():
    t = trainer(rows=ROWS[:10], prompts_per_step=4)
    key = lambda rows: [row["prompt"][0]["content"] for row in rows]
    order = [k for i in range(5) for k in key(t.batch(i))]
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(key(ROWS[:10])) and order[:10] != order[10:]
    assert key(trainer(rows=ROWS[:10]).batch(3)) == key(t.batch(3)) != key(trainer(rows=ROWS[:10], seed=1).batch(3))


@pytest.mark.parametrize(
    "kind", ["full", "mixed", "dora+", "pissa", "bf16", "checkpointed", "gpt2", "mamba", "two rewards"]
)
def test_every_kind_of_model_trains(kind):
    args, reward = {"max_steps": 2, "beta": 0.01}, digits
    if kind == "full":
        model = tiny_model()
    elif kind == "mixed":
        model = with_adapters(tiny_model(), modules_to_save=["lm_head"], random=False)
    elif kind == "dora+":
        model, args = (
            with_adapters(tiny_model(), use_dora=True, lora_dropout=0.1, random=False),
            {"lora_plus_ratio": 4.0},
        )
    elif kind == "pissa":
        model = with_adapters(tiny_model(), init_lora_weights="pissa", random=False)
    elif kind == "bf16":
        model = with_adapters(tiny_model(dtype=torch.bfloat16), random=False)
    elif kind == "gpt2":
        model = with_adapters(
            tiny_model(config=GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64), random=False
        )
    elif kind == "mamba":
        model = with_adapters(
            tiny_model(config=MambaConfig, hidden_size=32, num_hidden_layers=2, state_size=4), random=False
        )
    else:
        model = with_adapters(tiny_model(), random=False)
        args |= {"gradient_checkpointing": kind == "checkpointed"}
        reward = [digits, digits] if kind == "two rewards" else digits
    before = adapters_of(model)
    metrics = trainer(model, reward, **args).train()
    assert metrics["grad_norm"] > 0 and metrics[GAP] < (
        0.05 if kind in ("bf16", "dora+") else 1e-4
    )  # rounding, dropout
    assert sum(not torch.equal(before[name], p) for name, p in adapters_of(model).items()) >= len(before) / 2
    if kind == "two rewards":
        assert metrics["reward"] == pytest.approx(metrics["rewards/digits_0/mean"] + metrics["rewards/digits_1/mean"])


# ------------------------------------------------------------------------------------------------------ early warnings


def equal_rewards(completions, **columns):
    return [0.5] * len(completions)


def noise(completions, **columns):
    """Tells completions apart, and cannot be learnt."""
    return [random.random() for _ in completions]


def first_is_20(completion_ids, **columns):
    return [float(ids[0] == 20) for ids in completion_ids]


def warned(reward=noise, **args) -> set[str]:
    """The metrics that a small run was warned of."""
    model = args.pop("model", None) or with_adapters(
        tiny_model(), random=False, target_modules=["down_proj", "lm_head"]
    )
    defaults = {"max_steps": 12, "max_completion_length": 4, "prompts_per_step": 2, "num_generations": 8}
    defaults |= {"per_device_train_batch_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        t = trainer(model, reward, output_dir=folder, **defaults | args)
        t.train()
        rows = lines(Path(folder) / "metrics.jsonl")
    texts = [text for row in rows for text in row.get("warnings", ())]
    assert len(texts) == len(set(texts))
    return {text.partition(" is ")[0] for text in texts}


def test_warning_equal_rewards_and_no_gradient():
    assert {"frac_reward_zero_std", "grad_norm"} <= warned(equal_rewards)


def test_warning_no_reward_at_all_is_no_crash():
    assert "reward" not in warned(lambda completions, **columns: [None] * len(completions), max_steps=41)


def test_warning_flat_reward():
    assert "reward" in warned(max_steps=42, learning_rate=1e-5)


def test_warning_kl_entropy_and_clipping_at_a_huge_learning_rate():
    assert {"kl"} <= warned(learning_rate=0.02, beta=1e-6, max_steps=30)
    assert "entropy/first" in warned(first_is_20, learning_rate=0.03, max_steps=40, max_completion_length=1, beta=1e-6)
    assert "clip_ratio/region_mean" in warned(learning_rate=0.1, num_iterations=8, max_steps=40)


def test_warning_truncation():
    assert "completions/clipped_ratio" in warned(max_completion_length=2)


def test_warning_a_gradient_that_jumps():
    outlier = lambda trainer_state, **columns: [
        x * (1000 if trainer_state.global_step == 11 else 1) for x in noise(**columns)
    ]
    assert "grad_norm/usual" in warned(outlier, scale_rewards="none")


def test_warning_the_sampler_is_not_the_policy_that_is_scored(monkeypatch):
    original = grpo_lora.generate
    monkeypatch.setattr(grpo_lora, "generate", lambda *a, **k: original(*a, **k | {"temperature": 2.0}))
    assert GAP in warned(temperature=0.5)


def test_warning_adapters_that_stay_at_zero(capsys):
    mamba = tiny_model(config=MambaConfig, hidden_size=32, num_hidden_layers=2, state_size=4)
    trainer(
        with_adapters(mamba, random=False), max_steps=4
    ).train()  # it reads dt_proj.weight, and never calls the layer
    said = capsys.readouterr().err
    assert "layers.0.mixer.dt_proj.lora_B" in said and "recomputes its past, slowly" in said
    assert "adapters at zero" in warned(learning_rate=0.0)
    assert "slowly" not in capsys.readouterr().err  # a Llama's cache can be repeated


def test_warnings_stay_silent_on_a_healthy_run_and_each_is_in_the_table():
    first_is_even = lambda completion_ids, **columns: [float(ids[0] % 2 == 0) for ids in completion_ids]
    model = with_adapters(tiny_model(), random=False, target_modules=["down_proj", "lm_head"])
    model.generation_config.eos_token_id = list(range(9, VOCAB, 2))  # completions end of themselves
    healthy = {"max_steps": 45, "learning_rate": 0.01, "prompts_per_step": 4, "max_completion_length": 16}
    assert warned(first_is_even, model=model, **healthy) == set()
    assert set(grpo_lora.WARNINGS) == {
        "frac_reward_zero_std", "reward", "kl", "entropy/first", "completions/clipped_ratio", "clip_ratio/region_mean",
        "grad_norm", "grad_norm/usual", "skipped_updates", "adapters at zero", GAP,
    }  # fmt: skip


def test_training_with_activation_checkpointing_moves_every_adapter():
    t = trainer(gradient_checkpointing=True)
    update(t)
    assert all(p.grad.any() for name, p in t.params.items() if "lora_B" in name)


def test_reward_rises_on_a_task_that_can_be_learnt():
    first_token = lambda completion_ids, **columns: [float(ids[0] == 20) for ids in completion_ids]
    model = with_adapters(tiny_model(), random=False, target_modules=["down_proj", "lm_head"])
    sizes = {"max_completion_length": 2, "prompts_per_step": 8, "num_generations": 8}
    t = trainer(model, first_token, max_steps=25, learning_rate=0.03, **sizes)
    assert update(t)["reward"] < 0.3
    assert t.train()["reward"] > 0.9


# ---------------------------------------------------------------------------------------------- a run's files, resuming


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, stop_at: int | None = None, **args) -> GRPOTrainer:
    """A small run with files: six updates, a checkpoint every second one. stop_at: ask it to stop during that update."""
    defaults = {"output_dir": str(folder), "max_steps": 6, "save_steps": 2, "save_total_limit": None, "eval_steps": 3}
    t = trainer(with_adapters(tiny_model(), lora_dropout=0.1, random=False), eval_rows=ROWS[:5], **defaults | args)
    original = t.update

    def watched(rows):
        t.stop = t.step + 1 == stop_at
        return original(rows)

    t.update = watched
    t.train()
    return t


def same_run(a: Path, b: Path) -> None:
    """Adapter files equal to the byte, metrics equal but for times, without gaps or doubles."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (a / "adapter" / name).read_bytes() == (b / "adapter" / name).read_bytes()
    drop = lambda rows: [{k: v for k, v in row.items() if k != "step_time"} for row in rows]
    assert drop(lines(a / "metrics.jsonl")) == drop(lines(b / "metrics.jsonl"))
    assert lines(a / "completions.jsonl") == lines(b / "completions.jsonl")
    assert [row["step"] for row in lines(b / "metrics.jsonl")] == list(range(7))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


def test_stopping_and_resuming_is_the_same_run_to_the_bit(straight, tmp_path):
    assert run(tmp_path, stop_at=3).step == 3  # saves there, out of turn
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward": 1}\n{"step": 5, "rew')  # what a crash may leave behind: ahead, and torn
    run(tmp_path, resume=True)
    same_run(straight, tmp_path)


def test_several_iterations_and_a_reference_resume_to_the_bit(tmp_path):
    def go(name, steps, **more):
        args = {"num_iterations": 2, "beta": 0.1, "output_dir": str(tmp_path / name), "save_steps": 2}
        trainer(max_steps=steps, **args | more).train()
        return (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()

    assert go("straight", 6) != go("resumed", 4)
    assert go("resumed", 6, resume=True) == go("straight2", 6)


def test_a_damaged_checkpoint_is_named_passed_over_and_left_alone(straight, tmp_path, capsys):
    run(tmp_path, stop_at=4)
    weights = tmp_path / "checkpoint-4/trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # a single bit
    weights.write_bytes(data)
    (tmp_path / "checkpoint-9").mkdir()  # torn before it had anything
    run(tmp_path, resume=True)
    said = capsys.readouterr().err
    assert (
        "checkpoint-4: trainable.safetensors has changed" in said and "checkpoint-9" in said and "checkpoint-2" in said
    )
    same_run(straight, tmp_path)
    assert bytes(data) in [p.read_bytes() for p in tmp_path.glob("torn-checkpoint-4-*/trainable.safetensors")]


def test_resuming_on_another_machine_says_what_differs_by_name(tmp_path, capsys, monkeypatch):
    run(tmp_path, stop_at=2)
    machine = grpo_lora._machine()
    assert {"torch", "transformers", "threads", "processes", "machine"} <= machine.keys()
    monkeypatch.setattr(grpo_lora, "_machine", lambda: machine | {"threads": 99, "torch": "0.0"})
    run(tmp_path, resume=True, max_steps=3)
    said = [line for line in capsys.readouterr().err.splitlines() if "results may differ" in line]
    assert len(said) == 2 and "torch was" in said[0] and f"threads was {machine['threads']}, now 99" in said[1]


def test_resuming_without_a_checkpoint_starts_over_and_says_so(straight, tmp_path, capsys):
    run(tmp_path, max_steps=0)
    run(tmp_path, resume=True)
    assert "no intact checkpoint" in capsys.readouterr().err
    same_run(straight, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "lora"),
    [
        ("learning_rate", {"learning_rate": 0.5}, {}),
        ("num_generations", {"num_generations": 2}, {}),
        ("train data", {"rows": ROWS[:39]}, {}),
        ("rewards", {"reward": "format"}, {}),
        ("base model", {"base": 1}, {}),
        ("lora.r", {}, {"r": 8}),
        ("lora.lora_alpha", {}, {"lora_alpha": 9}),
    ],
)
def test_resuming_another_run_is_refused_with_the_setting_named(straight, name, change, lora):
    change = dict(change)
    model = with_adapters(tiny_model(change.pop("base", 0)), **{"lora_dropout": 0.1, "random": False} | lora)
    t = trainer(model, output_dir=str(straight), resume=True, **{"max_steps": 6, "save_steps": 2} | change)
    with pytest.raises(ValueError, match=f"resume: {name}.* was "):
        t.train()


def test_old_checkpoints_go_and_a_full_disk_leaves_the_rest(tmp_path):
    run(tmp_path, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(p.stat().st_size for p in (tmp_path / "checkpoint-6").rglob("*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, limits[1]))  # a write in the middle of a file fails
    try:
        with pytest.raises(OSError, match=r"checkpoint-8 could not be written.*earlier checkpoints are as they were"):
            run(tmp_path, max_steps=8, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    run(tmp_path, max_steps=8, resume=True)
    assert (tmp_path / "checkpoint-8/manifest.json").exists()


def test_old_checkpoints_are_counted_from_the_present_update(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()  # damaged, and left alone
    run(tmp_path, save_total_limit=1, resume=True)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_a_snapshot_reference_survives_resuming(tmp_path):
    start = tmp_path / "start"
    save_lora(with_adapters(tiny_model()), start)
    args = {"output_dir": str(tmp_path / "run"), "save_steps": 1, "beta": 0.1}
    first = trainer(load_lora(tiny_model(), start), max_steps=2, **args)
    first.train()
    again = trainer(load_lora(tiny_model(), start), max_steps=3, resume=True, **args)
    again.train()
    for name, tensor in first.reference.tensors.items():
        assert torch.equal(tensor, again.reference.tensors[name])
        assert not torch.equal(tensor, again.params[name])


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


SMALL = ["--prompts_per_step", "2", "--num_generations", "2", "--max_completion_length", "6", "--max_steps", "2"]


def test_the_command_line_trains_resumes_and_writes_what_it_says(model_dir, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "--model",
        str(model_dir),
        "--data",
        str(data),
        "--eval_size",
        "5",
        "--rewards",
        "accuracy,format",
        *SMALL,
    ]
    command += ["--output_dir", "out", "--variant", "gspo", "--epsilon", "0.1", "--save_steps", "1", "--r", "2"]
    assert main(command) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "think_rate_before", "think_rate_after", "seconds", "seed"} <= set(
        summary
    )
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2] and lines(out / "completions.jsonl")
    state = json.loads((out / "checkpoint-2/state.json").read_text())["run"]
    assert (
        state["epsilon"] == 0.1 and state["epsilon_high"] == 4e-4 and state["importance_sampling_level"] == "sequence"
    )
    assert state["lora.r"] == 2 and "before" in capsys.readouterr().out
    load_lora(AutoModelForCausalLM.from_pretrained(model_dir), out / "adapter")
    assert main(command) == 2 and "holds another run" in capsys.readouterr().err
    assert main([*command, "--resume", "--learning_rate", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: resume: learning_rate was 0.0031, now 1.0")
    assert main([*command, "--resume", "--max_steps", "3"]) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2, 3]
    goes_on = [*command[: command.index("--output_dir")], "--adapter", "out/adapter"]
    assert main(goes_on) == 0  # in a new folder under runs/
    assert len(list((tmp_path / "runs").glob("*/adapter"))) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--num_generations", "1"], "num_generations = 1"), (["--temperature", "0"], "temperature"),
        (["--epsilon", "-0.1"], "epsilon = -0.1"), (["--rewards", "acuracy"], "did you mean 'accuracy'"),
        (["--variant", "dappo"], "did you mean 'dapo'"), (["--learning_rte", "1"], "'learning_rate'"),
        (["--use_vllm", "true"], "vLLM"), (["--top_p=0.9"], "untruncated"), (["--data", "none.jsonl"], "none.jsonl"),
        (["--model", "no/such/model"], "no/such/model"), (["--resume"], "output_dir"), (["--eval_size", "40"], "40 rows"),
        (["--rewards", "none.py:f"], "none.py"), (["--reward_weights", "1", "2"], "reward_weights"), (["stray"], "stray"),
        (["--target_modules", "nope"], "nope"), (["--device", "cuda:77"], "device"), (["--max_completion_length", "60"], "data.jsonl:1"),
        (["--delta", "2", "--variant", "cispo"], "delta"), (["--rewards", ""], "at least one"), (["--adapter", "nowhere"], "nowhere"),
        (["--learning_rate", "nan"], "learning_rate"), (["--beta", "x"], "--beta: invalid float"), (["--use-vllm"], "vLLM"),
        (["--loss_type", "gpro"], "grpo"), (["--r", "0"], "r = 0"), (["--lora_alpha", "nan"], "lora_alpha"), (["--adapter", "x", "--r", "64"], "--r"),
        (["--target_modules", "*_proj"], "regular expression"), (["--rank_pattern", "[1]"], "rank_pattern"), (["--device", "meta"], "device"), (["--num_iterations", "3"], "multiple"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_line_and_exit_code_2(change, words, model_dir, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(model_dir), "--data", str(data), *SMALL, *change]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and words in said
    assert not (tmp_path / "runs").exists()  # and leaves nothing behind


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "1"\n', ":1: "), (b'{"prompt": "1", "answer": "2"}\n\n[1]\n', ":3: "), (b"", "no rows"), (b"\n \n", "no rows"),
        (b'{"prompt": "1", "answer": "2"}\n{"prompt": "1"}\n', ":2: no column 'answer'"), (b'{"prompt": ""}', ":1: 'prompt'"),
        (b'{"answer": "2"}', ":1: 'prompt'"), (b'{"prompt": [{"role": "user"}]}', ":1: 'prompt'"), (b"\xff\xfe{}", ":1: "),
        (b'{"prompt": 7}', ":1: 'prompt'"), (b"[" * 100_000, ":1: "), (b'{"prompt": "' + b"1+" * 99 + b'", "answer": "1"}', ":1: the prompt has"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_with_file_and_line(content, words, model_dir, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert main(["--model", str(model_dir), "--data", str(path), "--output_dir", str(tmp_path / "out"), *SMALL]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{path}" in said and words in said and not (tmp_path / "out").exists()


def test_a_tokenizer_without_eos_is_refused(data, tmp_path, capsys):
    model = tiny_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer = demo_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--data", str(data), *SMALL]) == 2
    assert "EOS" in capsys.readouterr().err


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for kind in (grpo_lora.ScriptArguments, LoRAConfig, GRPOConfig):
        for f in dataclasses.fields(kind):
            assert f"--{f.name}" in text and " ".join(f.metadata["help"].split())[:30] in text


def test_a_failing_reward_ends_the_run_with_one_line_and_exit_code_1(model_dir, data, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions, **columns):\n    raise RuntimeError('boom')\n")
    command = ["--model", str(model_dir), "--data", str(data), "--rewards", f"{tmp_path}/bad.py:bad", *SMALL]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: reward bad raised RuntimeError: boom"


def test_settings_may_stand_in_a_file_which_each_run_leaves_behind(model_dir, data, tmp_path, capsys):
    common = tmp_path / "common.args"
    common.write_text(f"--model '{model_dir}'\n--data '{data}' --seed 3 " + " ".join(SMALL))
    assert (
        main([f"@{common}", "--seed", "4", "--system_prompt", "be 'brief'", "--output_dir", str(tmp_path / "a")]) == 0
    )
    script, _, args = grpo_lora.parse([f"@{tmp_path}/a/settings.args"])
    assert (script.model, args.seed, args.system_prompt) == (
        str(model_dir),
        4,
        "be 'brief'",
    )  # the later flag beats the file
    assert main([f"@{tmp_path}/a/settings.args", "--output_dir", str(tmp_path / "b")]) == 0
    same_files(tmp_path / "a", tmp_path / "b")
    for bad in ("nowhere.args", "bad.args"):
        (tmp_path / "bad.args").write_text("--model 'unclosed")
        assert main([f"@{tmp_path}/{bad}"]) == 2 and f"{bad}: not a file of settings" in capsys.readouterr().err


TUNING = "--prompts_per_step 4 --num_generations 4 --max_completion_length 6 --max_steps 30 --r 2".split()


def test_no_file_beside_the_script_is_read_unasked(tmp_path):
    (tmp_path / "grpo_lora.args").write_text("--seed 77")
    with mock.patch.object(sys, "argv", [str(tmp_path / "grpo_lora.py")]):
        assert grpo_lora.parse([])[2].seed == 0


def tuning(model_dir, data, folder) -> list[str]:
    (folder / "r.py").write_text("from test_training import digits")
    return ["--model", str(model_dir), "--data", str(data), "--rewards", f"{folder}/r.py:digits", *TUNING]


def test_tuning_halves_runs_that_are_beginnings_of_whole_ones_and_can_be_resumed(model_dir, data, tmp_path, capsys):
    out = tmp_path / "tuning"
    command = [*tuning(model_dir, data, tmp_path), "--seed", "5", "--learning_rate", "0.008"]
    assert main([*command, "--tune", "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    folders = {p.name.removeprefix("learning_rate"): p for p in out.iterdir() if p.is_dir()}
    assert sorted(map(float, folders)) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
    rewards = {x: [row["reward"] for row in lines(folder / "metrics.jsonl")] for x, folder in folders.items()}
    assert sorted(map(len, rewards.values())) == [3, 3, 3, 3, 6, 6, 12, 12]
    assert "48 updates, where 8 whole runs take 240" in said
    better = lambda among, a, b: sorted(among, key=lambda x: (-sum(rewards[x][a:b]), abs(math.log2(float(x) / 0.008))))
    four = better(rewards, 0, 3)[:4]
    two = better(four, 3, 6)[:2]
    gaps = [a - b for a, b in zip(*(rewards[x][6:12] for x in better(two, 6, 12)), strict=True)]
    tied = sum(gaps) / 6 <= statistics.stdev(gaps) / 6**0.5  # then the lower rate
    best = min(two, key=float) if tied else better(two, 6, 12)[0]
    assert {x for x in rewards if len(rewards[x]) > 3} == set(four) and {
        x for x in rewards if len(rewards[x]) > 6
    } == set(two)
    script, lora, args = grpo_lora.parse([f"@{out}/best.args"])
    assert args.learning_rate == float(best) and script.tune is None and args.output_dir is None and lora.r == 2
    assert main([f"@{out}/best.args", "--output_dir", str(tmp_path / "whole")]) == 0
    drop = lambda rows: [{k: v for k, v in row.items() if k != "step_time"} for row in rows]
    assert drop(lines(tmp_path / "whole/metrics.jsonl"))[:12] == drop(lines(folders[best] / "metrics.jsonl"))
    # interrupted and resumed, it comes to the same
    before = (out / "best.args").read_text()
    shutil.rmtree(folders[best])
    assert main([*command, "--tune", "--output_dir", str(out), "--resume"]) == 0
    assert (out / "best.args").read_text() == before


def test_tuning_a_rank_too(model_dir, data, tmp_path, capsys):
    command = tuning(model_dir, data, tmp_path)
    assert main([*command, "--tune", "learning_rate,r", "--output_dir", str(tmp_path / "out")]) == 0
    _, lora, args = grpo_lora.parse([f"@{tmp_path}/out/best.args"])
    folders = [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert lora.r in (1, 2, 8) and len(folders) == 24 and "24 whole runs" in capsys.readouterr().out
    assert (tmp_path / f"out/learning_rate{args.learning_rate:g}--r{lora.r}").is_dir()


def test_tuning_drops_what_diverges_on_resuming_too(model_dir, data, tmp_path, capsys):
    command = [
        *tuning(model_dir, data, tmp_path),
        "--beta",
        "0.01",
        "--learning_rate",
        "1e20",
        "--tune",
        "--max_steps",
        "60",
    ]
    for more in ([], ["--resume"]):
        assert main([*command, "--output_dir", str(tmp_path / "out"), *more]) == 1
        assert "every candidate has a mean reward of -inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [(["--max_steps", "29"], "at least 30"), (["--warmup_steps", "1"], "at least 40"), (["--learning_rate", "0"], "above 0"),
     (["--tune", "learning_rate,r", "--adapter", "x"], "tune learning_rate alone"), (["--resume"], "needs output_dir"),
     (["--output_dir", "."], "not empty"), (["--tune", "epsilon"], "invalid choice")],
)  # fmt: skip
def test_a_tuning_that_cannot_work_is_refused(change, words, model_dir, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*grpo_lora.without(tuning(model_dir, data, tmp_path), "r"), "--tune", *change]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    return pytest.importorskip("report")


def test_the_report_shows_hostile_text_as_text_and_runs_without_tokens(report, tmp_path, capsys, monkeypatch):
    shout = lambda completions, **columns: [float("1" in text) for text in completions]
    t = trainer(reward=shout, rows=[{"prompt": "1</td><script>alert(1)</script>\u202e", "answer": "1"}] * 4, output_dir=str(tmp_path),
                log_tokens_steps=1, max_steps=3, num_iterations=3, learning_rate=0.1)  # fmt: skip
    t.train()
    page = report.report(tmp_path)
    assert "<script" not in page and "\u202e" not in page and "&lt;script&gt;" in page and "http" not in page
    assert page.count("<svg") >= 8 and page.count("<tr>") == 2 * (1 + 4) and 'class="clipped"' in page
    with pytest.raises(ValueError, match="update 2: its tokens were not recorded; there are those of 3"):
        report.report(tmp_path, [2])
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "nowhere")])
    assert report.main() == 2 and "is its folder one of a run?" in capsys.readouterr().err
    bare = tmp_path / "bare"
    trainer(output_dir=str(bare)).train()
    assert "did not record its tokens" in report.report(bare)


CLI_RUN = ["--rewards", "format,tag_count", "--prompts_per_step", "2", "--num_generations", "4"]
CLI_RUN += ["--max_completion_length", "16", "--save_steps", "3"]


def same_files(a: Path, b: Path) -> None:
    """Adapter files equal to the byte, metrics equal but for times."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (a / "adapter" / name).read_bytes() == (b / "adapter" / name).read_bytes()
    drop = lambda rows: [{k: v for k, v in row.items() if k != "step_time"} for row in rows]
    assert drop(lines(a / "metrics.jsonl")) == drop(lines(b / "metrics.jsonl"))
    assert lines(a / "completions.jsonl") == lines(b / "completions.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_says_how_to_resume(number, model_dir, data, tmp_path):
    base = [sys.executable, grpo_lora.__file__, "--model", str(model_dir), "--data", str(data), *CLI_RUN]
    command = [*base, "--max_steps", "4000", "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out
    last = lines(metrics)[-1]["step"]
    assert (tmp_path / f"run/checkpoint-{last}/manifest.json").exists()


KILLING = """
import os, random, shutil, signal, sys, time, torch
torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
import grpo_lora
kills, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]

def start(name, *more):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        os._exit(grpo_lora.main([*command, "--output_dir", f"{folder}/{name}", *more]))
    return process

begun = time.monotonic()
assert os.waitpid(start("straight"), 0)[1] == 0
whole, finished = time.monotonic() - begun, 0
while kills:
    process = start(f"killed-{finished}", "--resume")
    time.sleep(random.uniform(0, whole / 5))
    if os.waitpid(process, os.WNOHANG)[0]:  # it was done: another run
        finished += 1
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills -= 1
assert os.waitpid(start(f"killed-{finished}", "--resume"), 0)[1] == 0
print(finished + 1)
"""


def test_a_run_killed_at_twenty_random_moments_is_the_run_that_was_not(model_dir, data, tmp_path):
    command = ["--model", str(model_dir), "--data", str(data), *CLI_RUN, "--max_steps", "30"]
    kill = [sys.executable, "-c", KILLING, "20", str(tmp_path), *command]
    out = subprocess.run(kill, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
    for i in range(int(out)):
        same_files(tmp_path / "straight", tmp_path / f"killed-{i}")


# ---------------------------------------------------------------------------------------------------- several processes


def on_ranks(world: int, job, folder: Path) -> list:
    """Run a function of this file in `world` processes joined by gloo; what each returned, or its exit status."""
    code = "import sys, test_training as t; t.fork_ranks(int(sys.argv[1]), getattr(t, sys.argv[2]), sys.argv[3])"
    command = [sys.executable, "-c", code, str(world), job.__name__, str(folder)]
    subprocess.run(command, cwd=HERE, check=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    results = [folder / f"rank-{rank}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in results]


def fork_ranks(world: int, job, folder: str) -> None:
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(
                torch.get_num_threads()
            )  # a new pool, before two threads at once find the old one broken
            limit = timedelta(seconds=3 if job is parallel_silence else 60)
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit
            )
            status = 1
            try:
                torch.save(job(Path(folder)), f"{folder}/rank-{rank}.pt")
                status = 0
            finally:
                traceback.print_exc() if status else None
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


PARALLEL = {
    "dapo": {},
    "grpo, KL": {"loss_type": "grpo", "beta": 0.1},
    "batch std, entropy, twice": {"scale_rewards": "batch", "top_entropy_quantile": 0.4, "num_iterations": 2},
    "truncated out": {"mask_truncated_completions": True, "max_completion_length": 12},
    "rows of one token": {"eos": range(5, 38), "per_device_train_batch_size": 2},
    "DoRA, checkpointed": {"gradient_checkpointing": True, "use_dora": True},
}


def uneven(completions, **columns):
    """Groups differ, and some have no reward that differs."""
    return [len(rewards.completion_text(c)) % 5 if len(rewards.completion_text(c)) > 4 else 0.0 for c in completions]


def parallel_updates(folder: Path, **more) -> dict:
    """An update, and an evaluation, with each setting: gradients, weights, metrics, completions."""
    results = {}
    for name, args in PARALLEL.items():
        args = dict(args)
        model = with_adapters(tiny_model(dtype=torch.float64), use_dora=args.pop("use_dora", False))
        model.generation_config.eos_token_id = [EOS, *args.pop("eos", range(9, 20))]  # rows of many lengths
        t = trainer(model, uneven, eval_rows=ROWS[:7], prompts_per_step=6, **args | more)
        sharded = [key for key, p in model.named_parameters() if hasattr(p, "full_tensor")]
        assert len(sharded) == (18 if more else 0)  # nine tensors in each of two layers
        metrics = update(t)
        gradients = {key: p.grad.clone() for key, p in t.params.items()}
        samples = [[s["completion"], s["advantage"]] for s in t.samples]
        results[name] = [
            gradients,
            adapters_of(model),
            metrics,
            samples,
            t.evaluate(),
            [s["completion"] for s in t.samples],
        ]
    return json.loads(json.dumps(results, default=lambda x: x.tolist()))


def parallel_sharded(folder: Path) -> dict:
    return parallel_updates(folder, fsdp=True)


@pytest.fixture(scope="module")
def alone() -> dict:
    return parallel_updates(Path())


@pytest.mark.parametrize(("world", "job"), [(2, parallel_updates), (3, parallel_updates), (2, parallel_sharded)])
def test_several_processes_make_the_update_of_one(world, job, alone, tmp_path):
    ranks = on_ranks(world, job, tmp_path)
    assert all(rank == ranks[0] for rank in ranks[1:])  # gradients, weights and metrics, to the bit
    for name, (gradients, weights, metrics, samples, evaluated, texts) in ranks[0].items():
        assert samples == alone[name][3] and texts == alone[name][5]
        for theirs, ours in zip((gradients, weights), alone[name], strict=False):
            for key in ours:
                torch.testing.assert_close(torch.tensor(theirs[key]), torch.tensor(ours[key]), atol=1e-10, rtol=1e-7)
        for theirs, ours in ((metrics, alone[name][2]), (evaluated, alone[name][4])):
            assert theirs.keys() == ours.keys()
            over_all = (
                {"entropy", GAP} if job is parallel_sharded else set()
            )  # it skips no group, so that they are means over more
            for key in ours.keys() - over_all:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-6, abs=1e-9, nan_ok=True), key


def parallel_run(folder: Path) -> int:
    """Two processes: straight through; and stopped by a signal to the second alone, then resumed."""
    run(folder / "straight")
    stopped = run(folder / "resumed", stop_at=3 if dist.get_rank() == 1 else None)
    run(folder / "resumed", resume=True)
    return stopped.step


def test_processes_stop_together_and_resume_to_the_bit(tmp_path):
    assert on_ranks(2, parallel_run, tmp_path) == [3, 3]
    same_run(tmp_path / "straight", tmp_path / "resumed")


def parallel_death(folder: Path) -> str:
    t = trainer(max_steps=1000, output_dir=str(folder / "run"), save_steps=1)
    if dist.get_rank() == 1:
        original = t.update
        t.update = lambda rows: os._exit(9) if t.step == 3 else original(rows)
    started = time.monotonic()
    with pytest.raises(grpo_lora.PeerError) as error:
        t.train()
    assert time.monotonic() - started < 20
    return str(error.value)


def test_a_process_that_dies_ends_the_others_with_one_line_and_a_resumable_run(tmp_path):
    said, dead = on_ranks(2, parallel_death, tmp_path)
    assert said.startswith("process 0 of 2: another process has ended") and dead is None
    assert trainer(max_steps=4, output_dir=str(tmp_path / "run"), save_steps=1, resume=True).train()["step"] == 4


def parallel_silence(folder: Path) -> str:
    t = trainer(max_steps=1000)
    original = t.update
    t.update = lambda rows: time.sleep(8) if dist.get_rank() == 1 and t.step == 2 else original(rows)
    started = time.monotonic()
    with pytest.raises((grpo_lora.PeerError, TypeError)) as error:  # TypeError: the sleeper itself, which returns None
        t.train()
    assert dist.get_rank() == 1 or time.monotonic() - started < 7
    return str(error.value)


def test_a_process_that_falls_silent_is_given_up_after_the_time_limit(tmp_path):
    waited, _ = on_ranks(2, parallel_silence, tmp_path)
    assert waited.startswith("process 0 of 2: another process has ended or does not answer")


def test_torchrun_trains_and_a_killed_worker_ends_the_job_which_resumes(model_dir, data, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        grpo_lora.__file__,
    ]
    command = [
        *torchrun,
        "--model",
        str(model_dir),
        "--data",
        str(data),
        *CLI_RUN,
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    job = subprocess.Popen([*command, "--max_steps", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint, deadline = tmp_path / "run/checkpoint-3", time.monotonic() + 120
    while not checkpoint.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - killed < 20
    assert "error: process 0 of 2: another process has ended" in error
    done = len(lines(tmp_path / "run/metrics.jsonl")) + 3
    result = subprocess.run([*command, "--max_steps", str(done), "--resume"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == list(range(1, done + 1))


def test_more_processes_than_gpus_are_refused_in_one_line(model_dir, data, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["--model", str(model_dir), "--data", str(data)]) == 2
    assert "error: --device auto: process 2 of this machine, which has 1 GPU" in capsys.readouterr().err


def test_sharding_needs_processes_and_frozen_weights():
    with pytest.raises(ValueError, match="fsdp: spreads frozen weights over processes; start with torchrun"):
        trainer(fsdp=True)


def test_prompts_must_divide_among_processes(monkeypatch):
    monkeypatch.setattr(grpo_lora, "rank_and_world", lambda: (0, 3))
    with pytest.raises(ValueError, match="prompts_per_step = 4: must be a multiple of the 3 processes"):
        trainer()


def test_model_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\rc\u202ed\ne") == "a\\x1b[2Jb\\rc\\u202ed\ne"


# ------------------------------------------------------------------------------------------------------ the families

FAMILY_SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "init_std": 0.1,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "_experts_implementation": "eager",
}  # fmt: skip
HEAD_DIM = {"head_dim": 8}
WINDOW = {"sliding_window": 4}  # shorter than the longer prompt
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
QWEN = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
GEMMA = {**HEAD_DIM, **MIXED, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}
DEEPSEEK = {
    **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "n_mamba_heads": 8, "mamba_d_state": 4, "mamba_chunk_size": 4, "chunk_size": 4}
DELTA_NET = {
    **HEAD_DIM, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_num_value_heads": 4, "linear_value_head_dim": 8,
}  # fmt: skip

# transformers' model_type (and what sets this row apart): what its config needs besides FAMILY_SIZES
FAMILIES = {
    "llama": {},
    "qwen2": QWEN,
    "qwen3": QWEN,
    "gemma": HEAD_DIM,
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "mistral": WINDOW,
    "ministral": {**HEAD_DIM, **MIXED},
    "phi": {},
    "phi3": WINDOW,
    "gpt2": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {},
    "falcon": {},
    "falcon alibi": {"alibi": True},
    "falcon grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": MIXED,
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "granitemoe": {**EXPERTS, "logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**MIXED, "logit_scale": 0.25},
    "stablelm": {},
    "starcoder2": WINDOW,
    "gpt_bigcode": {},
    "mixtral": {**EXPERTS, **WINDOW},
    "qwen2_moe": SHARED,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "gpt_oss": {**EXPERTS, **HEAD_DIM, **MIXED},
    "phimoe": EXPERTS,  # its router is an nn.Linear that returns a tuple
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "llama4_text": {
        **EXPERTS,
        **HEAD_DIM,
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 0],
        "num_experts_per_tok": 1,
    },
    "glm": HEAD_DIM,
    "glm4": HEAD_DIM,
    "smollm3": {"no_rope_layers": [1, 0]},
    "nemotron": {},
    "persimmon": {},
    "exaone4": MIXED,
    "helium": HEAD_DIM,
    "ernie4_5": HEAD_DIM,
    "hunyuan_v1_dense": HEAD_DIM,
    "seed_oss": HEAD_DIM,
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "xglm": {"num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "modernbert-decoder": {**MIXED, "local_attention": 8},  # its head is called `decoder`
    "bart": {
        "is_decoder": True,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    },
    "openai-gpt": {"n_positions": 64},  # has no cache
    "mamba": {"state_size": 4},
    "mamba2": {**HEAD_DIM, "state_size": 4, "num_heads": 8, "n_groups": 2, "chunk_size": 4},
    "falcon_mamba": {"state_size": 4},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 4},
    "rwkv": {"context_length": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**SHARED, **DELTA_NET},
    "zamba2": {**MAMBA2, "layers_block_type": ["mamba", "hybrid"]},
}
# Adapters that nothing can train: the family reads the layer's weight and never calls it, or never runs the layer.
IDLE = {"mamba": ".dt_proj.", "falcon_mamba": ".dt_proj.", "jamba": ".dt_proj.", "bart": ".encoder_attn."}


CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # a mistake costs 0.1 and more


def family_model(family):
    config = transformers.AutoConfig.for_model(family.split()[0], **FAMILY_SIZES | FAMILIES[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_scored_as_it_is_sampled(family, tmp_path):
    """Switched off, an adapter is not there; on, sampler, both scorers and the plain model agree; so do files."""
    model, ids = family_model(family), torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        base_logits = model.requires_grad_(False)(ids).logits  # torch has another kernel for convolutions that train
    apply_lora(model.requires_grad_(True), LoRAConfig(r=2))
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in adapter.values():
            p.normal_(std=0.3)
        logits = model(ids).logits
        with lora_disabled(model):
            assert torch.equal(model(ids).logits, base_logits)
    assert (logits - base_logits).abs().max() > 0.1

    save_lora(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_lora(family_model(family), tmp_path)(ids).logits, logits)

    prompt_mask, eos, T = torch.arange(7) >= torch.tensor([[3], [0]]), range(0, 50, 4), 0.7  # prompts of 4 and 7 tokens
    rollout = generate(
        model, ids, prompt_mask, num_generations=3, max_completion_length=8, temperature=T, eos_token_ids=eos,
        pad_token_id=0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    mask, lengths = rollout.completion_mask, rollout.completion_mask.sum(dim=1)
    assert len(lengths.unique()) > 1

    def gradient(logps):
        """Of a loss on the log-probs, as one vector; nothing but adapters gets one, and all of them but the idle."""
        model.zero_grad()
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps))[mask].sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} <= adapter.keys()
        reached = {name: p.grad for name, p in adapter.items() if p.grad is not None and p.grad.any()}
        assert adapter.keys() - reached.keys() == {name for name in adapter if IDLE.get(family, "none") in name}
        return torch.cat([g.flatten() for g in reached.values()])

    rows = []  # each by itself: no padding, no cache, the family's own logits
    for i, length in enumerate(lengths):
        row = torch.cat([ids[i // 3][prompt_mask[i // 3]], rollout.completion_ids[i, :length]]).unsqueeze(0)
        log_probs = (model(row, use_cache=False).logits[0] / T).log_softmax(dim=-1)
        rows.append(log_probs[:-1].gather(1, row[0, 1:, None])[-length:, 0])
    expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    expected_gradient = gradient(expected)

    torch.testing.assert_close(rollout.logps, expected.detach(), **CLOSE)
    for share_prompt in (True, False):
        logps, _ = completion_logps(model, rollout, temperature=T, share_prompt=share_prompt)
        torch.testing.assert_close(logps, expected, **CLOSE)
        assert (gradient(logps) - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


# Families of which no decode step is recorded: transformers says that theirs may not be, or they take no positions or cache.
UNRECORDED = set(
    "gpt_neo bloom mpt bart openai-gpt mamba mamba2 falcon_mamba jamba bamba recurrent_gemma rwkv lfm2 qwen3_next zamba2".split()
)
# Families that ask the host something in a step: experts that are looped over, tensors made on the CPU.
ASKING = set("granitemoe mixtral qwen2_moe qwen3_moe olmoe gpt_oss phimoe deepseek_v2 deepseek_v3 xglm".split())
ASKING |= {"falcon", "falcon alibi", "falcon grouped"}
GPU = torch.cuda.is_available()


@pytest.fixture
def recordings(monkeypatch):
    """Decode steps are recorded: with a GPU really, else with what acts like a CUDA graph. A list of the recordings made."""
    made, record = [], grpo_lora._recorded

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
        assert len(outputs) == 2, "a first call, and the one that is recorded"
        made.extend([replay] if replay is not watched else [])
        return replay

    monkeypatch.setattr(grpo_lora, "_recorded", noted)
    monkeypatch.setattr(grpo_lora, "GRAPHS", {"cpu", "cuda"})
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_family_samples_the_same_where_decode_steps_are_recorded(family, recordings, monkeypatch):
    device = "cuda" if GPU else "cpu"
    model, ids = family_model(family).to(device), torch.arange(3, 17, device=device).view(2, 7)
    prompt_mask = torch.arange(7, device=device) >= torch.tensor([[3], [0]], device=device)

    def rollout():
        return generate(
            model, ids, prompt_mask, num_generations=4, max_completion_length=16, temperature=0.7,
            eos_token_ids=range(0, 50, 6), pad_token_id=0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    with monkeypatch.context() as patch:  # memory not written yet may hold anything
        patch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, math.nan))
        recorded = rollout()
    monkeypatch.setattr(grpo_lora, "GRAPHS", set())
    expected = rollout()
    for name in ("completion_ids", "completion_mask"):
        assert torch.equal(getattr(recorded, name), getattr(expected, name))
    torch.testing.assert_close(recorded.logps, expected.logps, atol=1e-5, rtol=1e-5)

    lengths = expected.completion_mask.sum(dim=1)
    assert lengths.unique().numel() > 1
    sizes = [8]  # of the batch, at each step: rows that ended stay until three in four have
    for t in range(1, int(lengths.max())):
        left = int((lengths > t).sum())
        sizes.append(left if left <= sizes[-1] // 4 else sizes[-1])
    assert len(recordings) == (0 if family in UNRECORDED or (GPU and family in ASKING) else len(set(sizes[1:])))


def test_no_decode_step_of_a_model_on_several_devices_or_spread_over_processes_is_recorded(monkeypatch):
    monkeypatch.setattr(grpo_lora, "GRAPHS", {"cpu"})
    model = tiny_model()
    assert CausalLM(model).records
    model.model.norm.to("meta")
    assert not CausalLM(model).records
    model = tiny_model()
    monkeypatch.setattr(type(model.model), "unshard", None, raising=False)
    assert CausalLM(model).sharded and not CausalLM(model).records
    monkeypatch.setattr(grpo_lora, "GRAPHS", {"cuda"})
    assert not CausalLM(tiny_model()).records


def test_a_decode_step_that_cannot_be_recorded_is_taken_as_it_is_and_that_is_said(monkeypatch):
    """On a GPU because the model asks the host how long the rows are (its RoPE is dynamic); else because we say so."""
    device = "cuda" if GPU else "cpu"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model, (ids, mask) = tiny_model(rope_parameters=rope).to(device), [x.to(device) for x in prompts()]
    expected = sample(model, ids, mask, max_completion_length=6, eos_token_ids=[])
    monkeypatch.setattr(grpo_lora, "GRAPHS", {"cpu", "cuda"})
    if not GPU:
        cuda = {name: mock.MagicMock() for name in ("device", "current_stream", "set_stream", "graph", "CUDAGraph")}
        cuda["device"].return_value.__exit__.return_value = None
        cuda["graph"].return_value.__exit__.return_value = None
        cuda["graph"].return_value.__enter__.side_effect = [
            RuntimeError("an error during capture\nand more of it"),
            None,
        ]
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
    with pytest.warns(UserWarning, match="no CUDA graph of a step can be recorded: .*captur.*$"):
        plain = sample(model, ids, mask, max_completion_length=6, eos_token_ids=[])
    assert torch.equal(plain.completion_ids, expected.completion_ids)
    torch.testing.assert_close(plain.logps, expected.logps)
    if GPU:  # nothing is left as it is while recording
        assert torch.rand(2, device=device).isfinite().all()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    else:
        cuda["set_stream"].assert_called_with(cuda["current_stream"].return_value)
        assert cuda["graph"].call_count == 2 and cuda["graph"].return_value.__exit__.call_count == 1


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_an_update_on_a_gpu_samples_the_same_and_has_the_gradient_of_one_on_a_cpu():
    gradients, samples = [], []
    for device in ("cpu", "cuda"):
        t = trainer(with_adapters(tiny_model()).to(device), beta=0.1)
        update(t)
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in t.params.values()]))
        samples.append(t.last_batch[0].completion_ids.cpu())
    assert torch.equal(*samples)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm() > 0


# ---------------------------------------------------------------------------------- parity with the field's libraries
#
# The same numbers as TRL 1.16 (objective, advantages, training) and PEFT 0.21 (layers, files). Every reference value comes
# from the library's own code. Skipped where they are not installed: pip install -r benchmarks/requirements.txt

PARITY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def parity_model(family="llama", seed=0, **settings):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **PARITY | settings))
    for p in model.parameters():  # the default initialisation is so small that every model says the same
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


# ------------------------------------------------------------------------------------------------ TRL: the objective


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, 32))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def trl_trainer(words, tmp_path_factory):
    """A factory of real trl.GRPOTrainers: settings -> trainer, built from TRL's own GRPOConfig, defaults and all."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def make(model=None, reward_funcs=None, dataset=None, **settings):
        settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6} | settings
        folder = str(tmp_path_factory.getbasetemp())
        args = trl.GRPOConfig(folder, report_to="none", use_cpu=True, bf16=False, save_strategy="no", **settings)
        data = datasets.Dataset.from_list(dataset or [{"prompt": "w2"}, {"prompt": "w3"}])
        funcs = reward_funcs or [lambda completions, **_: [0.0] * len(completions)]
        return trl.GRPOTrainer(model or parity_model(), funcs, args, data, processing_class=words)

    return make


@pytest.fixture(scope="module")
def objective_trainer(trl_trainer):
    """The same, kept between tests: for tests that only call its _compute_loss."""
    return functools.cache(trl_trainer)


def random_batch(seed, spread=0.3, B=8, T=6):
    """Positional arguments of grpo_loss, ref_logps and entropies; the last row has an empty mask, the first is full."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda scale: scale * torch.randn(B, T, generator=g, dtype=torch.float64)
    old = -noise(1.5).abs()
    logps, ref = old + noise(spread), old + noise(spread)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    advantages[1] = 0.0
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0], lengths[-1] = T, 0
    return (logps, old, advantages, torch.arange(T) < lengths[:, None]), ref, noise(1.0).abs().float()


@contextlib.contextmanager
def double_precision():
    """TRL's torch.where(A > 0, 1.0, 1.05) and count / (count - 1) have the default dtype: float32 would cost 5e-8."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def value_and_gradient(loss_of, logps):
    logps = logps.clone().requires_grad_()
    loss = loss_of(logps)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def trl_loss(trainer, batch, ref_logps, entropies, beta=0.0, correction=True, rows=slice(None)):
    """Value and gradient in logps of TRL's GRPOTrainer._compute_loss, for the micro-batch `rows` of a batch."""
    logps, old_logps, advantages, mask = (x[rows] for x in batch)
    ids = torch.ones(mask.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "advantages": advantages}
    inputs |= {"completion_mask": mask.long(), "old_per_token_logps": old_logps, "ref_per_token_logps": ref_logps[rows]}
    inputs["num_items_in_batch"] = batch[3].sum()
    trainer.beta, trainer.args.use_bias_correction_kl = beta, correction
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()

    def loss_of(logps):
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies[rows], None)
        with double_precision():
            return trainer._compute_loss(trainer.model, inputs)

    return value_and_gradient(loss_of, logps)


def our_loss(batch, ref_logps, rows=slice(None), **settings):
    logps, *rest = (x[rows] for x in batch)
    return value_and_gradient(lambda logps: grpo_loss(logps, *rest, ref_logps=ref_logps[rows], **settings)[0], logps)


def assert_same(ours, theirs, tolerance=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
CLIPS = [
    {"epsilon": 0.2, "epsilon_high": None, "delta": None},
    {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.5},
    {"epsilon": 3e-4, "epsilon_high": 1.2, "delta": 1.1},
]


@pytest.mark.parametrize("beta, correction", [(0.0, True), (0.3, True), (0.3, False)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_trls(objective_trainer, loss_type, level, beta, correction):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 6}
    for clip in CLIPS:
        if loss_type == "cispo" and clip["epsilon_high"] is None:
            clip = clip | {"epsilon_high": clip["epsilon"]}  # what TRL does silently; here it is an error
        trainer = objective_trainer(**settings, **clip)
        for seed, spread in itertools.product(range(3), (0.3, 3.0)):
            batch, ref, entropies = random_batch(seed, spread)
            ours = our_loss(batch, ref, beta=beta, use_bias_correction_kl=correction, **settings, **clip)
            assert_same(ours, trl_loss(trainer, batch, ref, entropies, beta, correction))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_diagnostics_are_trls(objective_trainer, loss_type):
    """At token level. With one ratio a row TRL counts rows and not tokens."""
    settings = {"loss_type": loss_type, "epsilon_high": 0.28, "max_completion_length": 6}
    trainer = objective_trainer(**settings)
    for seed in range(3):
        (logps, *rest), ref, entropies = random_batch(seed)
        _, ours = grpo_loss(logps, *rest, ref_logps=ref, beta=0.3, **settings)
        trl_loss(trainer, (logps, *rest), ref, entropies, 0.3)
        theirs = {name: trainer._metrics["train"][name][-1] for name in ours if not name.startswith("vespo")}
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_top_entropy_mask_is_trls(objective_trainer, loss_type):
    settings = {"loss_type": loss_type, "epsilon_high": 0.28, "max_completion_length": 6}
    for seed, q in itertools.product(range(3), (0.2, 0.5)):
        batch, ref, entropies = random_batch(seed)
        keep = entropies >= torch.quantile(entropies[batch[3]], 1 - q)
        ours = our_loss(batch, ref, beta=0.3, policy_mask=keep, **settings)
        assert_same(ours, trl_loss(objective_trainer(top_entropy_quantile=q, **settings), batch, ref, entropies, 0.3))


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "bnpo"])
def test_micro_batches_add_up_to_trls_accumulated_loss(objective_trainer, loss_type):
    """All but bnpo, whose token count is the micro-batch's own in TRL: there ours is the same for every split."""
    batch, ref, entropies = random_batch(0)
    settings = {"loss_type": loss_type, "epsilon_high": 0.28, "max_completion_length": 6}
    normalizer = int(batch[3].sum()) if loss_type in ("dapo", "cispo", "vespo") else len(batch[3])
    trainer = objective_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    for rows in (slice(0, 4), slice(4, 8)):
        ours = our_loss(batch, ref, rows, beta=0.3, normalizer=normalizer, **settings)
        assert_same(ours, trl_loss(trainer, batch, ref, entropies, 0.3, rows=rows))


# ----------------------------------------------------------------------------------------------- TRL: the advantages


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls_whatever_is_missing(trl_trainer, scale, aggregation):
    """P = 4 groups of G = 4, K = 2 functions; functions, rows, groups and all but one of a group without reward."""
    weights = [0.5, 2.0]
    trainer = trl_trainer(
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)] * 2, reward_weights=weights,
        scale_rewards=scale, multi_objective_aggregation=aggregation, per_device_train_batch_size=16,
    )  # fmt: skip
    trainer._generate_single_turn = lambda prompt_ids, *_: ([[2, 1]] * len(prompt_ids), None)
    g = torch.Generator().manual_seed(0)
    for holes in (0.0, 0.2, 0.6):
        rewards = torch.randn(4, 4, 2, generator=g, dtype=torch.float64)
        rewards[0] = 0.1  # all equal
        rewards[torch.rand(rewards.shape, generator=g) < holes] = math.nan
        if holes:
            rewards[1, :, 0], rewards[2, 0], rewards[3, 1:] = math.nan, math.nan, math.nan
        trainer._calculate_rewards = lambda *_: rewards.view(16, 2)  # noqa: B023  float64, where TRL's own is float32
        with double_precision():
            theirs = trainer._generate_and_score_completions([{"prompt": "w2"}] * 16)["advantages"]
        ours = multi_objective_advantages(rewards, torch.tensor(weights), aggregation=aggregation, scale=scale)
        assert_same([ours.flatten()], [theirs])


# ------------------------------------------------------------------------------------------------- TRL: the training

TABLE = {  # prompt -> its completions, as token ids; 1 is the EOS
    "w2": [[5, 6, 1], [7, 5, 5, 8, 9, 1], [10, 1], [5, 11, 12, 5, 13, 14]],
    "w3 w4 w2": [[1], [15, 5, 1], [16, 17, 18, 19, 20, 21], [5, 22, 5, 23, 1]],
}
LOGGED = ["loss", "grad_norm", "learning_rate", "reward", "frac_reward_zero_std", "num_tokens"]
LOGGED += [f"completions/{f}_{kind}length" for f in ("mean", "min", "max") for kind in ("", "terminated_")]
LOGGED += [f"rewards/{name}_reward/{f}" for name in ("count", "brevity") for f in ("mean", "std")]


def count_reward(completions, **_):
    return [float(text.split().count("w5")) for text in completions]


def brevity_reward(completions, **_):
    return [None if "w15" in text else 2.0 ** -len(text) for text in completions]


TABLE_REWARDS = [count_reward, brevity_reward]
TRAINING = {
    "num_iterations": 2, "max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 4,
    "learning_rate": 0.02, "reward_weights": [1.0, 2.0], "max_completion_length": 6,
}  # fmt: skip


def our_training(model, words, monkeypatch, settings, reference=None):
    """Train on batches of the two prompts, with the completions of TABLE. Returns the last metrics."""

    def table_rollout(model, prompt_ids, prompt_mask, **_):
        prompts = [words.decode(ids[mask]) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        ids = torch.tensor([row + [0] * (6 - len(row)) for prompt in prompts for row in TABLE[prompt]])
        return Rollout(prompt_ids, prompt_mask, ids, completion_mask(ids, [1]), torch.zeros(ids.shape))

    monkeypatch.setattr("grpo_lora.generate", table_rollout)
    args, rows = GRPOConfig(prompts_per_step=2, save_steps=0, **settings), [{"prompt": prompt} for prompt in TABLE]
    return GRPOTrainer(model, TABLE_REWARDS, args, rows, None, words, reference).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"loss_type": "grpo", "beta": 0.3, "temperature": 0.7, "delta": 1.5},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.3, "use_bias_correction_kl": False},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"loss_type": "cispo", "epsilon_high": 1.01, "multi_objective_aggregation": "normalize_then_sum"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "scale_rewards": "batch"},
        {"loss_type": "sapo"},
        {"loss_type": "vespo", "beta": 0.3},
        {"loss_type": "dapo", "top_entropy_quantile": 0.5, "per_device_train_batch_size": 8, "num_iterations": 1},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_training_moves_the_weights_as_trl_with_peft_does(trl_trainer, words, monkeypatch, settings):
    """A batch of 2 prompts, 4 completions each; 2 updates with it, in micro-batches of 4 rows: the same adapter then.

    The adapter is not new (no B is zero), so the reference is the policy at the start, which both have to find out.
    """
    ours, theirs = both(parity_model().double(), r=4, lora_alpha=8, target_modules="all-linear")
    randomise(ours, theirs)
    settings = TRAINING | settings
    trl_settings = {"gradient_accumulation_steps": 8 // settings["per_device_train_batch_size"], "logging_steps": 1}
    trl_settings |= {"shuffle_dataset": False, "lr_scheduler_type": "constant", "disable_tqdm": True}
    their_trainer = trl_trainer(theirs, TABLE_REWARDS, [{"prompt": p} for p in TABLE], **settings, **trl_settings)
    seen = defaultdict(itertools.count)

    def table_samples(prompt_ids, *_):
        prompts = words.batch_decode(prompt_ids)
        return [TABLE[prompt][next(seen[prompt]) % 4] for prompt in prompts], None

    monkeypatch.setattr(their_trainer, "_generate_single_turn", table_samples)
    with double_precision():
        their_trainer.train()
    logs = their_trainer.state.log_history[-1 - settings["num_iterations"] : -1]
    said = our_training(ours, words, monkeypatch, settings)  # of the last batch: means over its updates
    for key in LOGGED:
        values = [log[key] for log in logs if key in log]
        assert said[key] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-4), key
    theirs = adapter_of(theirs)
    for name, p in ours.named_parameters():  # 2e-5 is float32 inside RMSNorm and TRL's head; the weights move by 0.04
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=2e-5, msg=name)


def test_trainer_treats_a_peft_model_as_our_own(words, monkeypatch):
    ours, theirs = both(parity_model().double(), r=4, lora_alpha=8, target_modules="all-linear")
    randomise(ours, theirs)
    settings = TRAINING | {"beta": 0.3, "num_iterations": 2}
    said = our_training(ours, words, monkeypatch, settings, reference=lambda: lora_disabled(ours))
    assert said["kl"] > 0
    expected = our_training(theirs, words, monkeypatch, settings, reference=theirs.disable_adapter)
    assert {key: expected[key] for key in LOGGED} == {key: said[key] for key in LOGGED}
    named = adapter_of(theirs)
    for name, p in ours.named_parameters():
        assert torch.equal(p, named[name]), name


# -------------------------------------------------------------------------------------------------- PEFT: the layers


PEFT_METHODS = {
    "LoRA": lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "DoRA": lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True),
    "IA3": lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda peft: peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "LoKr": lambda peft: peft.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "VeRA": lambda peft: peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "OFT": lambda peft: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
}


def test_pefts_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="peft adapter 'default' adds virtual tokens"):
        CausalLM(peft.get_peft_model(tiny_model(), virtual))


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_trainer_runs_with_each_of_pefts_methods_and_its_file_loads_back(method, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), PEFT_METHODS[method](peft))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = adapters_of(model)
    t = trainer(model, output_dir=str(tmp_path), beta=0.1, learning_rate=0.05)
    with t.reference(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits)
    t.train()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert not all(torch.equal(before[name], p) for name, p in t.params.items())
    with t.reference(), torch.no_grad():  # still where training started
        torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)


def adapter_of(peft_model):
    """PEFT's parameters under our names (and ours as they are)."""
    rename = {".default": "", "magnitude_vector.weight": "magnitude_vector", "modules_to_save": "trained"}
    named = {}
    for name, p in peft_model.named_parameters():
        name = name.removeprefix("base_model.model.")
        named[functools.reduce(lambda name, old: name.replace(old, rename[old]), rename, name)] = p
    return named


@torch.no_grad()
def randomise(ours, theirs=None):
    """Move everything that is trained away from its initial value, in ours and in PEFT's model alike."""
    torch.manual_seed(1)
    other = adapter_of(theirs) if theirs else {}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            p.mul_(1 + 0.1 * torch.randn_like(p)).add_(0.1 * torch.randn_like(p))
            if theirs:
                other[name].copy_(p)


def both(base, **settings):
    """The same model and adapter twice: (ours, PEFT's)."""
    peft = pytest.importorskip("peft")
    ours = apply_lora(copy.deepcopy(base), LoRAConfig(**settings))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    return ours, theirs


LAYERS = {
    "linear": lambda: nn.Linear(48, 40, bias=False),
    "linear-bias": lambda: nn.Linear(48, 40),
    "conv1d": lambda: Conv1D(40, 48),
}
LAYER_VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_layer_output_and_gradients_are_pefts_to_the_bit(variant, layer, dtype, train):
    torch.manual_seed(0)
    base, results = nn.Sequential(LAYERS[layer]()).to(dtype), []
    ours, theirs = both(base, r=4, lora_alpha=6, target_modules=["0"], **LAYER_VARIANTS[variant])
    randomise(ours, theirs)
    x, seed = torch.randn(3, 5, 48).to(dtype), torch.randn(3, 5, 40).to(dtype)
    for model in (ours, theirs):
        torch.manual_seed(2)
        trained = {name: p for name, p in adapter_of(model).items() if p.requires_grad}
        inputs = x.clone().requires_grad_()
        y = model.train(train)(inputs)
        results.append({"y": y, "x": torch.autograd.grad(y, inputs, seed, retain_graph=True)[0]})
        results[-1] |= zip(trained, torch.autograd.grad(y, list(trained.values()), seed), strict=True)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(
            value, results[1][name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_pissa_starts_as_pefts(layer, variant):
    torch.manual_seed(0)
    base, x = nn.Sequential(LAYERS[layer]()), torch.randn(5, 48)
    ours, theirs = both(base, r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa", **variant)
    a, b = dict(ours.named_parameters()), adapter_of(theirs)
    close = {"rtol": 1e-5, "atol": 1e-6}
    product = lambda named: named["0.lora_B.weight"] @ named["0.lora_A.weight"]
    torch.testing.assert_close(product(a), product(b), **close)
    torch.testing.assert_close(ours(x), theirs(x), **close)
    torch.testing.assert_close(ours(x), base(x), **close)
    with torch.no_grad():  # away from the start, so that the residual weight shows
        for named in (a, b):
            named["0.lora_B.weight"].mul_(2.0)
    torch.testing.assert_close(ours(x), theirs(x), **close)
    with lora_disabled(ours):
        assert torch.equal(ours(x), base(x))


ALL_LINEAR = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "mistral": {}, "phi": {}, "phi3": {},
    "gpt2": {}, "gpt_neox": {}, "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24}, "bloom": {}, "falcon": {},
    "cohere": {}, "stablelm": {}, "starcoder2": {}, "gptj": {"rotary_dim": 4},
}  # fmt: skip


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


@pytest.mark.parametrize("family", ALL_LINEAR)
def test_all_linear_adapts_pefts_modules_and_merges_to_pefts_weights(family):
    base = parity_model(family, **ALL_LINEAR[family])
    ours, theirs = both(base, target_modules="all-linear")
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in adapter_of(theirs).items() if p.requires_grad
    }
    randomise(ours, theirs)
    ids = torch.arange(2, 14).view(2, 6)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert_same_weights(merge_and_unload(ours), theirs.merge_and_unload())


def test_all_linear_leaves_out_fused_experts_and_refuses_pefts_files_with_them(tmp_path):
    base = parity_model("mixtral", num_local_experts=2)
    ours, theirs = both(base, target_modules="all-linear")
    a, b = ({n for n in adapter_of(model) if "lora_" in n} for model in (ours, theirs))
    assert a < b and all(".experts." in name or ".gate." in name for name in b - a)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target_parameters"):
        load_lora(base, tmp_path)


MERGES = [({"use_dora": True}, {}), ({"init_lora_weights": "pissa"}, {}), ({"modules_to_save": ["lm_head"]}, {})]
MERGES += [({"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings, model", MERGES, ids=str)
def test_other_variants_merge_to_pefts_weights(settings, model, dtype):
    ours, theirs = both(parity_model(**model).to(dtype), target_modules="all-linear", **settings)
    randomise(ours, theirs)
    merged, expected = merge_and_unload(ours), theirs.merge_and_unload()
    assert_same_weights(merged, expected)
    assert merged.config.tie_word_embeddings == expected.config.tie_word_embeddings


PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3, r"^model\.layers\.0\.self_attn\.v_proj": 5, "k.*": 6},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3, ".*mlp.*": 5, "v_proj": 7},
}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_give_each_module_pefts_rank_and_scale(use_rslora):
    ours, theirs = both(parity_model(), target_modules="all-linear", use_rslora=use_rslora, **PATTERNS)
    a, b = dict(ours.named_parameters()), adapter_of(theirs)
    assert {n: p.shape for n, p in a.items() if "lora_" in n} == {n: p.shape for n, p in b.items() if "lora_" in n}
    randomise(ours, theirs)
    ids = torch.arange(2, 14).view(2, 6)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_param_groups_are_pefts_lora_plus(settings):
    peft_optimizers = pytest.importorskip("peft.optimizers")
    ours, theirs = both(parity_model(), target_modules="all-linear", **settings)
    optimizer = peft_optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)

    def rates(groups, named):
        names = {id(p): name for name, p in named}
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    expected = rates(optimizer.param_groups, adapter_of(theirs).items())
    assert rates(param_groups(ours, 1e-3, lora_plus_ratio=16.0), ours.named_parameters()) == expected


# --------------------------------------------------------------------------------------------------- PEFT: the files

FILE_CASES = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "patterns": PATTERNS,
    "names": {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "head-copy": {"modules_to_save": ["lm_head"]},
    "head-and-embedding-copies": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head-adapted": {"target_modules": ["q_proj", "lm_head"]},
    "embedding-copy": {"modules_to_save": ["embed_tokens"]},
    "norm-copies": {"modules_to_save": ["norm", "input_layernorm"]},
}
FILE_MODELS = {"llama": {}, "tied": {"tie_word_embeddings": True}, "many": {"num_hidden_layers": 4}}
FILE_TESTS = [(case, "llama", torch.float32) for case in FILE_CASES]
FILE_TESTS += [
    (case, "tied", torch.float32)
    for case in ("plain", "head-copy", "head-adapted", "embedding-copy", "head-and-embedding-copies")
]
FILE_TESTS += [(case, "llama", torch.bfloat16) for case in ("plain", "dora", "pissa", "head-copy")]
FILE_TESTS += [
    ("plain", "many", torch.float32),
    *((case, "gpt2", torch.float32) for case in ("plain", "dora", "pissa")),
]


@pytest.fixture(params=FILE_TESTS, ids=lambda p: "-".join(map(str, p)))
def file_case(request):
    case, model, dtype = request.param
    base = parity_model("gpt2" if model == "gpt2" else "llama", **FILE_MODELS.get(model, {})).to(dtype)
    return base, {"target_modules": "all-linear"} | FILE_CASES[case]


IDS = torch.arange(2, 14).view(2, 6)


def assert_same_outputs(a, b, base):
    x, y, z = (model.eval()(IDS).logits for model in (a, b, base))
    torch.testing.assert_close(x, y)
    assert (x - z).abs().max() > 0.05, "the adapter does nothing"


def test_peft_reads_what_we_write(file_case, tmp_path):
    peft = pytest.importorskip("peft")
    base, settings = file_case
    ours = apply_lora(copy.deepcopy(base), LoRAConfig(**settings))
    randomise(ours)
    save_lora(ours, tmp_path)
    assert_same_outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), ours, base)


def test_we_read_what_peft_writes_and_train_on(file_case, tmp_path):
    peft = pytest.importorskip("peft")
    base, settings = file_case
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(copy.deepcopy(base), tmp_path)
    assert_same_outputs(ours, theirs, base)

    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trainable) == sum(p.requires_grad for p in theirs.parameters())
    ours.train()(IDS, labels=IDS).loss.backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None and p.grad.any()} == trainable


# ---------------------------------------------------------------------------------------------------------- the gallery


class Bug(NamedTuple):
    """A bug that was really made, where, and a patch that puts it back in, which the test named must notice."""

    number: int  # of the list in README
    what: str
    seen: str
    file: str
    right: str
    wrong: str
    test: str


ENDS = "return (is_eos.cumsum(dim=1) - is_eos.long()) == 0"
WEIGHTED = "return torch.where(rewards.isnan().all(dim=-1), math.nan, (rewards * weights).nansum(dim=-1))"
MATCH = "return answer is not None and gold is not None and canonical_answer(answer) == canonical_answer(gold)"
CLIP = "-torch.min(bounded * A, ratio.clamp(1 - epsilon, 1 + high) * A)"
LOG_PROBS = "log_probs = (lm.logits(hidden) / temperature).log_softmax(dim=-1)  # (n, V)"
RESTORE = "    try:\n        yield\n    finally:\n        for module in adapters:\n            module.disabled -= 1"
# fmt: off
GALLERY = [
    Bug(1, "mask made from token values: with pad == eos the emitted EOS is never trained", "huggingface/trl#6357", "grpo_lora.py",
        "mask = completion_mask(completion_ids, eos_token_ids)\n", "mask = completion_ids != pad_token_id\n",
        "test_rows_end_with_their_first_eos_and_are_padded_after_it"),
    Bug(2, "the stop token is masked out, so stopping is never reinforced", "rasbt/reasoning-from-scratch#185", "grpo_lora.py",
        ENDS, "return is_eos.cumsum(dim=1) == 0", "test_mask_ends_with_the_first_eos_whatever_the_padding"),
    Bug(3, "log-probs off by one against the tokens", "lucidrains/PaLM-rlhf-pytorch#31", "grpo_lora.py",
        "rollout.completion_ids[mask]  # (n, H)", "rollout.completion_ids.roll(1, 1)[mask]  # (n, H)",
        "test_the_sampler_and_the_scorer_agree_at_any_temperature"),
    Bug(3, "prompt tokens in the divisor", "CarperAI/trlx#509", "grpo_lora.py",
        "int(rollout.completion_mask.sum()) if per_token", "int(rollout.completion_mask.sum() + rollout.prompt_mask.sum()) if per_token",
        "test_the_update_is_the_sum_over_rows_of_minus_a_grad_logp_under_the_normaliser"),
    Bug(4, "the log-prob function changes its inputs", "OpenGVLab/InternVL#1053", "grpo_lora.py",
        "    rows = []\n    for block in", "    rows = [rollout.completion_ids.masked_fill_(~mask, 3)][:0]\n    for block in", "test_scoring_changes_no_input"),
    Bug(5, "equal rewards do not give exactly zero", "NVIDIA-NeMo/RL#4161", "grpo_lora.py",
        "torch.where(valid & (low < high), centred, 0.0)", "torch.where(valid, centred, 0.0)", "test_equal_rewards_give_exactly_zero"),
    Bug(6, "std with ddof 0", "a common slip", "grpo_lora.py",
        "/ (n - 1)).sqrt()", "/ n).sqrt()", "test_advantages_have_mean_zero_and_std_s_over_s_plus_eps"),
    Bug(6, "std over the batch where the group was meant", "XU-YIJIE/grpo-flat#2", "grpo_lora.py",
        "(_nanstd(rewards, dim=1) + eps)", "(_nanstd(rewards.flatten(), dim=0) + eps)",
        "test_advantages_have_mean_zero_and_std_s_over_s_plus_eps"),
    Bug(6, "normalised before what has no reward is dropped", "huggingface/trl#5902", "grpo_lora.py",
        "    valid = ~rewards.isnan()\n", "    valid, rewards = ~rewards.isnan(), rewards.nan_to_num(0.0)\n",
        "test_a_missing_reward_leaves_the_statistics_and_gets_zero"),
    Bug(7, "clip written as max where the advantage is negative", "jvmncs/safe-grid-agents#28", "grpo_lora.py",
        CLIP, CLIP.replace("torch.min(", "torch.where(A < 0, torch.max(bounded * A, ratio.clamp(1 - epsilon, 1 + high) * A), torch.min(") + ")",
        "test_clip_stops_the_gradient_only_where_the_ratio_already_went_too_far"),
    Bug(8, "k1 as a loss, whose expected gradient is zero", "NVIDIA-NeMo/RL#2506", "grpo_lora.py",
        "return d.expm1() - d", "return -d", "test_kl_gradients_by_enumeration"),
    Bug(8, "the gradient of the KL correction is cut", "huggingface/trl#6503", "grpo_lora.py",
        "kl = kl * ratio", "kl = kl * ratio.detach()", "test_corrected_k3_has_the_gradient_of_k2"),
    Bug(9, "the arguments of the KL swapped", "lucidrains/PaLM-rlhf-pytorch#43", "grpo_lora.py",
        "d = ref_logps - logps", "d = logps - ref_logps", "test_kl_estimators_by_hand"),
    Bug(9, "KL subtracted, and so maximised", "Unakar/Logic-RL#58", "grpo_lora.py", "loss = loss + beta * kl", "loss = loss - beta * kl",
        "test_kl_term_is_masked_averaged_and_corrected_like_the_rest_and_by_nothing_else"),
    Bug(9, "KL dropped by a mask that is not its own", "a close sibling", "grpo_lora.py",
        "loss = loss + beta * kl", "loss = loss + beta * kl * (1 if policy_mask is None else policy_mask)",
        "test_kl_term_is_masked_averaged_and_corrected_like_the_rest_and_by_nothing_else"),
    Bug(10, "temperature at sampling, not at scoring", "huggingface/trl#3029", "grpo_lora.py",
        "_TokenLogps.apply(h, y, lm.logits, temperature, chunk_size)", "_TokenLogps.apply(h, y, lm.logits, 1.0, chunk_size)",
        "test_the_sampler_and_the_scorer_agree_at_any_temperature"),
    Bug(10, "top-k of the model's generation config left on", "OpenPipe/ART#140", "grpo_lora.py", LOG_PROBS,
        "z = lm.logits(hidden) / temperature\n        k = lm.core.generation_config.top_k or z.shape[1]\n"
        "        log_probs = z.masked_fill(z < z.topk(k).values[:, -1:], -math.inf).log_softmax(dim=-1)",
        "test_the_models_own_generation_config_has_no_say"),
    Bug(11, "left padding without position_ids", "huggingface/trl#6800", "grpo_lora.py",
        "        if self.takes_positions:\n", "        if False:\n", "test_left_padding_moves_no_position"),
    Bug(12, "completions tiled where prompts were repeated: the wrong answer is graded", "StarsfieldAI/R1-V#146", "grpo_lora.py",
        "rows = [row for row in rows for _ in range(G)]", "rows = [row for _ in range(G) for row in rows]",
        "test_each_completion_is_graded_with_its_own_row"),
    Bug(13, "means of micro-batches averaged", "allenai/open-instruct#1161", "grpo_lora.py",
        "normalizer=normalizer,", "normalizer=None,", "test_the_update_does_not_depend_on_the_micro_batch_split"),
    Bug(14, "one function's reward counted twice", "a common slip", "grpo_lora.py",
        WEIGHTED, WEIGHTED + " + rewards[..., 0].nan_to_num()", "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(14, "weights ignored", "a common slip", "grpo_lora.py",
        WEIGHTED, WEIGHTED.replace("rewards * weights", "rewards"), "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(14, "a None treated as 0", "huggingface/trl#5902", "grpo_lora.py",
        WEIGHTED, "return (rewards * weights).nansum(dim=-1)", "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(14, "None == None graded correct", "huggingface/open-r1#566", "rewards.py", MATCH, "return canonical_answer(answer) == canonical_answer(gold)",
        "test_a_missing_answer_equals_nothing_not_even_another"),
    Bug(15, "0/0 where everything is masked", "huggingface/trl#3248", "grpo_lora.py",
        "tokens = loss * m, m.sum().clamp(min=1)", "tokens = loss * m, m.sum()", "test_an_empty_batch_has_loss_zero_and_gradient_zero"),
    Bug(15, "0/0 on an empty completion", "unslothai/unsloth-zoo#1286", "grpo_lora.py",
        "lengths = m.sum(dim=1, keepdim=True).clamp(min=1)", "lengths = m.sum(dim=1, keepdim=True)",
        "test_an_empty_batch_has_loss_zero_and_gradient_zero"),
    Bug(16, "log-softmax in bf16", "OpenRLHF/OpenRLHF#634", "grpo_lora.py",
        "return logits.to(torch.promote_types(logits.dtype, torch.float32))", "return logits",
        "test_half_precision_models_are_scored_in_float32"),
    Bug(17, "base weights trainable", "microsoft/aurora#167", "lora.py",
        "    model.requires_grad_(False)\n", "    pass\n", "test_training_reaches_adapters_only_and_the_base_stays_bit_equal"),
    Bug(17, "merge and unmerge in place, which drifts", "huggingface/trl#6688", "lora.py",
        "hooks.callback(layer.lora_B.weight.register_hook(refuse).remove)\n            yield\n",
        "hooks.callback(layer.lora_B.weight.register_hook(refuse).remove)\n"
        "                layer.base_layer.weight.data += layer.merged_weight().data - layer.base_layer.weight\n            yield\n",
        "test_merging_a_thousand_times_leaves_every_bit_of_the_base"),
    Bug(18, "adapter-off not restored after an exception", "huggingface/peft#367", "lora.py",
        RESTORE, RESTORE.replace("    try:\n        yield\n    finally:\n    ", "    yield\n    if True:\n    "),
        "test_adapters_off_is_the_base_model_to_the_bit_through_nesting_and_exceptions"),
    Bug(18, "an inner disable re-enables too early", "huggingface/peft#3507", "lora.py", "module.disabled -= 1", "module.disabled = 0",
        "test_adapters_off_is_the_base_model_to_the_bit_through_nesting_and_exceptions"),
    Bug(19, "A initialised with the wrong fan-in", "a common slip", "lora.py",
        "kaiming_uniform_(A, a=math.sqrt(5))", 'kaiming_uniform_(A, a=math.sqrt(5), mode="fan_out")',
        "test_initialisations_have_the_distributions_they_name"),
    Bug(19, "A and B both zero", "huggingface/peft#3449", "lora.py",
        "nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "nn.init.zeros_(A)", "test_initialisations_have_the_distributions_they_name"),
    Bug(19, "scaling applied twice", "huggingface/peft#3473", "lora.py",
        ").mul_(self.scaling)\n", ").mul_(self.scaling**2)\n", "test_lora_adds_s_b_a_and_nothing_else"),
    Bug(19, "alpha/r where alpha/sqrt(r) was asked for", "Blaizzy/mlx-vlm#846", "lora.py",
        "alpha / math.sqrt(r) if config.use_rslora else alpha / r", "alpha / r", "test_lora_adds_s_b_a_and_nothing_else"),
    Bug(20, "an adapter bound to no module: reward flat, no error", "huggingface/peft#3533", "lora.py",
        "if not targets or (want", "if False and (want", "test_a_lora_config_that_cannot_work_is_refused_in_one_line_that_says_what_would"),
    Bug(21, "reentrant checkpointing over frozen embeddings: no gradient reaches the adapter", "huggingface/transformers#26221", "grpo_lora.py",
        'lm.core.activation_checkpointing_enable({"use_reentrant": False})',
        'lm.core.activation_checkpointing_enable({"use_reentrant": True})\n            lm.core.disable_input_require_grads()',
        "test_training_with_activation_checkpointing_moves_every_adapter"),
    Bug(21, "the cache silently dropped under checkpointing", "huggingface/trl#3683", "grpo_lora.py",
        "lm.takes_cache and not (checkpointed and torch.is_grad_enabled())", "lm.takes_cache",
        "test_activation_checkpointing_reaches_adapters_over_frozen_embeddings_and_changes_no_gradient"),
    Bug(22, "dropout active in the rollout", "Human-Agent-Society/reef#536", "grpo_lora.py",
        "    ids, logps = [], []\n    with evaluating(model):", "    ids, logps = [], []\n    with contextlib.nullcontext():",
        "test_generation_leaves_the_model_as_it_was_and_acts_in_eval_mode"),
    Bug(23, "merging an adapted head moves the tied embedding", "huggingface/peft#2018", "lora.py",
        "module.base_layer.weight = nn.Parameter(module.merged_weight())", "module.base_layer.weight.data.copy_(module.merged_weight())",
        "test_merging_an_adapted_head_leaves_the_tied_embedding_alone"),
    Bug(24, "resuming with a fresh adapter", "huggingface/lerobot#3459", "grpo_lora.py",
        "parameter.copy_(trainable[name])", "pass", "test_several_iterations_and_a_reference_resume_to_the_bit"),
    Bug(24, "resuming with a fresh optimiser", "a common slip", "grpo_lora.py",
        'trainer.optimizer.load_state_dict(optimizer["optimizer"])', "pass", "test_several_iterations_and_a_reference_resume_to_the_bit"),
    Bug(24, "resuming at the start of the data", "a common slip", "grpo_lora.py",
        "order[position % n]", "order[(position - index * size) % n]", "test_data_order_is_a_permutation_each_epoch_and_a_function_of_the_seed"),
    Bug(25, "the base model as reference of a continued adapter", "huggingface/trl#4723", "grpo_lora.py",
        "    return lora_snapshot(model)\n", "    return lambda: lora_disabled(model)\n",
        "test_the_reference_is_the_policy_that_training_starts_from"),
    Bug(26, "of several EOS ids only the first honoured", "huggingface/trl#7039", "grpo_lora.py",
        "for i in dict.fromkeys([tokenizer.eos_token_id, *configured])", "for i in [tokenizer.eos_token_id]",
        "test_every_eos_id_of_the_tokenizer_and_the_generation_config_counts"),
    Bug(26, "and so in the rollout", "huggingface/trl#7039", "grpo_lora.py",
        "torch.tensor(list(eos_token_ids), dtype=torch.long, device=prompt_ids.device)",
        "torch.tensor(list(eos_token_ids)[:1], dtype=torch.long, device=prompt_ids.device)",
        "test_rows_end_with_their_first_eos_and_are_padded_after_it"),
    Bug(27, "an evaluator that runs model text", "Jiayi-Pan/TinyZero, countdown.py", "rewards.py",
        "    match = _NUMBER.fullmatch(text)", "    if set(text) <= set('0123456789*+-'):\n        return Fraction(eval(text))\n    match = _NUMBER.fullmatch(text)",
        "test_answers_match_examples"),
    Bug(27, "a substring taken for a match", "a common slip", "rewards.py",
        MATCH, MATCH.replace("canonical_answer(answer) == canonical_answer(gold)", "str(answer) in str(gold)"), "test_answers_match_examples"),
    Bug(28, "the loss of the last micro-batch reported", "allenai/allennlp#4706", "grpo_lora.py",
        "total += loss.item()", "total = loss.item()", "test_the_logged_loss_is_that_of_the_whole_batch"),
    Bug(28, "grad norm read after zero_grad", "Lightning-AI/pytorch-lightning#272", "grpo_lora.py",
        "        return loss, nn.utils.clip_grad_norm_(self.params.values(), self.args.max_grad_norm).item()\n",
        "        nn.utils.clip_grad_norm_(self.params.values(), self.args.max_grad_norm)\n        self.optimizer.zero_grad()\n        return loss, 0.0\n",
        "test_the_logged_loss_is_that_of_the_whole_batch"),
    Bug(29, "the sampler's log-probs compared with those of a policy that has moved since", "this project", "grpo_lora.py",
        "gap = (old_logps - batch.rollout.logps)", "gap = (logps.detach() - batch.rollout.logps)",
        "test_the_gap_compares_sampler_and_scorer_of_one_policy"),
    Bug(30, "old checkpoints counted from a damaged later one, so that the new one is deleted", "this project", "grpo_lora.py",
        'mine = [p for p in _checkpoints(root) if int(p.name.removeprefix("checkpoint-")) <= trainer.step]', "mine = _checkpoints(root)",
        "test_old_checkpoints_are_counted_from_the_present_update"),
    Bug(31, "what a reward logs replaces the trainer's own metric of that name", "this project", "grpo_lora.py",
        "metrics = own | metrics | own", "metrics = own | metrics", "test_names_that_rewards_log_do_not_stand_in_for_ours"),
    Bug(32, "a file named like the script is read as settings, unasked", "this project", "grpo_lora.py",
        ", look_for_args_file=False", "", "test_no_file_beside_the_script_is_read_unasked"),
    Bug(33, "a NaN policy goes unnoticed where all rewards are equal", "this project", "grpo_lora.py",
        "total = 0.0 if rollout.logps.isfinite().all() else math.nan", "total = 0.0",
        "test_a_policy_that_is_nan_is_noticed_where_no_group_has_an_advantage"),
    Bug(34, "a library renames the cache, and every model takes the slow path unnoticed", "this project", "grpo_lora.py",
        'names = ("cache", "past_key_values")', 'names = ("past_key_value",)',
        "test_prompts_go_through_together_only_where_left_padding_is_safe"),
]
# fmt: on
HERE = Path(__file__).parent


@contextlib.contextmanager
def source_patched(file: str = "", right: str = "", wrong: str = ""):
    """The project's modules and tests, loaded anew from their sources, one of them changed; yields every test by name."""
    names = ["lora", "rewards", "grpo_lora", "test_math", "test_training"]
    saved = {name: sys.modules.pop(name, None) for name in names}
    tests: dict = {}
    try:
        for name in names:
            source = (HERE / f"{name}.py").read_text(encoding="utf-8")
            if file == f"{name}.py":
                assert source.count(right) == 1, (
                    f"the patch no longer applies: {right!r} is there {source.count(right)} times"
                )
                source = source.replace(right, wrong)
            module = sys.modules[name] = types.ModuleType(name)
            module.__file__ = str(HERE / f"{name}.py")
            exec(compile(source, module.__file__, "exec"), vars(module))
            if name.startswith("test_"):
                tests |= {key: value for key, value in vars(module).items() if key.startswith("test_")}
        yield tests
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def run_test(function) -> None:
    """Call a test as pytest would, with each of its parameters; it may use no fixture but tmp_path."""
    choices = [[{}]]
    for mark in getattr(function, "pytestmark", []):
        names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else list(mark.args[0])
        values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
        choices.append([dict(zip(names, value, strict=True)) for value in values])
    for combination in itertools.product(*choices):
        arguments = {key: value for part in combination for key, value in part.items()}
        with tempfile.TemporaryDirectory() as folder:
            if "tmp_path" in inspect.signature(function).parameters:
                arguments["tmp_path"] = Path(folder)
            function(**arguments)


@pytest.mark.parametrize("bug", GALLERY, ids=[f"{b.number}-{b.what[:40].replace(' ', '_')}" for b in GALLERY])
def test_gallery_every_known_bug_is_noticed_when_put_back_in(bug, monkeypatch):
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "gallery")
    with source_patched(bug.file, bug.right, bug.wrong) as tests:
        noticed = (AssertionError, ValueError, RuntimeError, IndexError, pytest.fail.Exception)
        with pytest.raises(noticed) as failure:
            run_test(tests[bug.test])
    assert not isinstance(failure.value, NotImplementedError | NameError)


def test_gallery_covers_all_bugs_and_readme_lists_them():
    assert {bug.number for bug in GALLERY} == set(range(1, 35))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(f"| {bug.number} | {bug.what} | {bug.seen} | `{bug.test}` |" in readme for bug in GALLERY)
