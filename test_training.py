"""The truths of training, on tiny models: whole trainers, models and files.

rollout                the sampler draws from the policy that is scored, row by row
log-probabilities      they and their gradients are those of the plainest computation there is
LoRA in whole models   the base stays bit-equal; merging, snapshots and files lose nothing
the update             its gradient is the loss's; steps, schedule and references are as they say
training runs          every kind of model trains, and a reward that can be learnt rises
rewards and data       each completion meets its own row's columns; draws, order, EOS

The formulas themselves are in test_math.py; what a trainer takes and refuses is in checks/. What
stands before the first section is shared: the tests in checks/ import it.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig

import grpo_lora
import rewards
from grpo_lora import (
    AGGREGATION,
    SAMPLER_GAP,
    CausalLM,
    GRPOConfig,
    GRPOTrainer,
    Rollout,
    completion_logps,
    completion_mask,
    evaluating,
    group_advantages,
    grpo_loss,
)
from lora import (
    LoRAConfig,
    LoRALinear,
    TrainedCopy,
    apply_lora,
    default_reference,
    load_lora,
    lora_disabled,
    lora_merged,
    lora_snapshot,
    merge_and_unload,
    save_lora,
)
from runner import demo, fast

for profile, phases in (
    ("default", tuple(hypothesis.Phase)),
    ("gallery", (hypothesis.Phase.explicit, hypothesis.Phase.generate)),
):
    seeded = bool(os.environ.get("CI")) or profile == "gallery"
    settings.register_profile(
        profile, deadline=None, derandomize=seeded, phases=phases, database=None, max_examples=20
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)  # tiny models only get slower with more
TOKENIZER = demo.demo_tokenizer()
VOCAB, EOS, PAD = len(TOKENIZER), TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
ROWS = demo.sum_problems()[:40]


def tiny_model(seed: int = 0, config: type | None = None, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    if config is None:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config((config or LlamaConfig)(**sizes | kwargs))
    return model.to(dtype).eval()


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
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, n in enumerate(lengths):
        ids[row, -n:], mask[row, -n:] = torch.randint(5, VOCAB, (n,), generator=g), True
    return ids, mask


def sample(model, ids, mask, seed: int = 0, engine=grpo_lora, **kwargs) -> Rollout:
    options = {"num_generations": 3, "max_completion_length": 8, "temperature": 0.7}
    options |= {"eos_token_ids": [EOS, 7, 9], "pad_token_id": PAD}
    options |= {"generator": torch.Generator().manual_seed(seed)}
    return engine.generate(model, ids, mask, **options | kwargs)


def one_by_one(model, rollout: Rollout, temperature: float = 0.7) -> torch.Tensor:
    """The log-probs again, the simplest way there is: each row alone, without padding or cache,
    from the model's own logits."""
    G, out = rollout.num_generations, torch.zeros(rollout.completion_ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for row, mask in enumerate(rollout.completion_mask):
            prompt = rollout.prompt_ids[row // G][rollout.prompt_mask[row // G]]
            tokens = rollout.completion_ids[row][mask]  # (n,)
            whole = torch.cat([prompt, tokens]).unsqueeze(0)
            logits = model(input_ids=whole).logits[0].double() / temperature
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # (n, V)
            out[row, : len(tokens)] = logps.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return out


def gradients(model, loss) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def digits(completions, **columns):
    """A reward that tells random completions apart: how many characters are digits."""
    return [sum(c.isdigit() for c in rewards.completion_text(text)) / 4 for text in completions]


def trainer(
    model=None, reward=digits, rows=ROWS, eval_rows=None, engine=None, callbacks=(), **args
) -> GRPOTrainer:
    settings = {"max_steps": 2, "prompts_per_step": 4, "num_generations": 4}
    settings |= {"max_completion_length": 8, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 4}
    model = with_adapters(tiny_model(), random=False) if model is None else model
    options = {"processing_class": TOKENIZER, "callbacks": callbacks, "engine": engine}
    return GRPOTrainer(model, reward, GRPOConfig(**settings | args), rows, eval_rows, **options)


def update(t: GRPOTrainer, index: int = 0) -> dict:
    t.seed("update", index)
    return t.update(t.batch(index))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------ rollout


def test_rows_end_with_their_first_eos_and_are_padded_after_it():
    model, (ids, mask) = tiny_model(), prompts()
    rollout = sample(model, ids, mask, num_generations=8, max_completion_length=12)
    assert torch.equal(
        rollout.completion_mask, completion_mask(rollout.completion_ids, [EOS, 7, 9])
    )
    lengths = rollout.completion_mask.sum(1)
    assert lengths.max() == rollout.completion_ids.shape[1] and len(lengths.unique()) > 2
    ends = {
        int(row[n - 1]) for row, n in zip(rollout.completion_ids, lengths, strict=True) if n < 12
    }
    assert len(ends) > 1 and ends <= {EOS, 7, 9}  # each of several EOS ids ends a row
    assert (rollout.completion_ids[~rollout.completion_mask] == PAD).all()
    assert (rollout.logps[~rollout.completion_mask] == 0).all() and (
        rollout.logps[rollout.completion_mask] < 0
    ).all()
    pad_is_eos = sample(
        model, ids, mask, num_generations=8, max_completion_length=12, pad_token_id=EOS
    )
    # the chosen EOS stays inside
    assert torch.equal(pad_is_eos.completion_mask, rollout.completion_mask)
    endless = sample(model, ids, mask, eos_token_ids=[])
    assert endless.completion_ids.shape == (6, 8) and endless.completion_mask.all()
    short = sample(model, ids, mask, eos_token_ids=range(5, 36), max_completion_length=20)
    assert short.completion_mask.any(dim=0).all()  # no token more once all rows have ended


def test_tokens_are_drawn_with_the_probabilities_of_the_tempered_softmax():
    model, (ids, mask) = tiny_model(), prompts((3,))
    rollout = sample(
        model, ids, mask, num_generations=20000, max_completion_length=1, temperature=0.5
    )
    p = (model(input_ids=ids).logits[0, -1].double() / 0.5).softmax(-1)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=VOCAB).double()
    chi2 = ((counts - 20000 * p) ** 2 / (20000 * p)).sum().item()
    assert chi2 < VOCAB - 1 + 5 * math.sqrt(2 * VOCAB)  # five sigma
    torch.testing.assert_close(
        rollout.logps[:, 0].double(), p.log()[rollout.completion_ids[:, 0]], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("split", [1, 2])
def test_what_a_row_draws_depends_on_no_other_row(split):
    model, (ids, mask) = tiny_model(dtype=torch.float64), prompts((4, 7, 5, 2))
    together, generator, parts = sample(model, ids, mask), torch.Generator().manual_seed(0), []
    for i in range(0, 4, split):
        parts.append(sample(model, ids[i : i + split], mask[i : i + split], generator=generator))
    rows = [
        row[m]
        for part in parts
        for row, m in zip(part.completion_ids, part.completion_mask, strict=True)
    ]
    for row, m, own in zip(together.completion_ids, together.completion_mask, rows, strict=True):
        assert torch.equal(row[m], own)


def test_draws_need_no_generator_and_one_that_rounds_to_one_gives_the_last_token(monkeypatch):
    model, (ids, mask) = tiny_model(), prompts()
    torch.manual_seed(0)
    first = sample(model, ids, mask, generator=None)
    torch.manual_seed(0)
    assert torch.equal(
        first.completion_ids, sample(model, ids, mask, generator=None).completion_ids
    )
    monkeypatch.setattr(
        torch, "rand", lambda *size, **options: torch.ones(size, dtype=torch.float64)
    )
    assert (sample(model, ids, mask, eos_token_ids=[]).completion_ids == VOCAB - 1).all()


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
    torch.testing.assert_close(
        rollout.logps.double(), one_by_one(model.eval(), rollout), atol=1e-5, rtol=0
    )


def test_the_models_own_generation_config_has_no_say():
    model, (ids, mask) = tiny_model(), prompts()
    before = sample(model, ids, mask)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1
    )
    assert torch.equal(sample(model, ids, mask).completion_ids, before.completion_ids)


def test_a_completion_of_t_tokens_takes_t_forwards_of_one_token_each_but_the_first():
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


def test_prompts_go_through_together_only_where_left_padding_is_safe():
    ids, mask = prompts((2, 4, 3))

    def rows(model, together=True):
        batches = list(CausalLM(model).prompt_batches(ids, mask, 2, together))
        for prompt, seen, of in batches:  # without the padding that only other prompts need
            assert prompt.shape == seen.shape == (len(range(6)[of]) // 2, int(seen.sum(1).max()))
        return [of for *_, of in batches]

    alone = [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert rows(tiny_model()) == [slice(0, 6)] and rows(tiny_model(), together=False) == alone
    mamba = tiny_model(config=MambaConfig, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not CausalLM(mamba).takes_cache and rows(mamba) == alone
    sliding = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    sliding |= {"head_dim": 8, "hidden_size": 32, "num_hidden_layers": 2}
    assert CausalLM(tiny_model(config=transformers.Gemma3TextConfig, **sliding)).takes_cache
    for dtype, attention, together in [
        ("float64", "eager", False),
        ("float64", "sdpa", True),
        ("float32", "eager", True),
    ]:
        model = tiny_model(dtype=getattr(torch, dtype), attn_implementation=attention)
        assert rows(model) == ([slice(0, 6)] if together else alone)


def test_merged_and_unmerged_rollouts_are_the_same():
    model, (ids, mask) = with_adapters(tiny_model(dtype=torch.float64)), prompts()
    plain = sample(model, ids, mask)
    with lora_merged(model):
        merged = sample(model, ids, mask)
    assert torch.equal(plain.completion_ids, merged.completion_ids)
    torch.testing.assert_close(plain.logps, merged.logps)


# -------------------------------------------------------------------------------- log-probabilities


def test_left_padding_moves_no_position():
    model = tiny_model(
        config=GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    rollout = sample(model, *prompts((2, 9)))
    torch.testing.assert_close(
        rollout.logps.double(), one_by_one(model, rollout), atol=1e-4, rtol=0
    )
    logps, _ = completion_logps(model, rollout, temperature=0.7)
    torch.testing.assert_close(logps.double(), one_by_one(model, rollout), atol=1e-4, rtol=0)


def test_half_precision_models_are_scored_in_float32():
    model = with_adapters(tiny_model(dtype=torch.bfloat16))
    rollout = sample(model, *prompts())
    logps, entropies = completion_logps(model, rollout, temperature=0.7)
    assert logps.dtype == entropies.dtype == rollout.logps.dtype == torch.float32
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(CausalLM(model).logits(hidden), model.lm_head(hidden).float())


@given(
    seed=st.integers(0, 99),
    chunk=st.integers(1, 20),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
@settings(max_examples=10)
def test_log_probs_ignore_chunking_sharing_and_padding(seed, chunk, left, right):
    model = with_adapters(tiny_model(dtype=torch.float64))
    ids, mask = prompts((2, 6), seed)
    rollout = sample(model, ids, mask, seed)
    weights = torch.randn(
        rollout.logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    plain, entropies = completion_logps(model, rollout, temperature=0.7, share_prompt=False)
    pad = nn.functional.pad
    wider = Rollout(
        pad(ids, (left, 0), value=3),
        pad(mask, (left, 0)),
        pad(rollout.completion_ids, (0, right), value=5),
        pad(rollout.completion_mask, (0, right)),
        pad(rollout.logps, (0, right)),
    )
    logps, entropies2 = completion_logps(model, wider, temperature=0.7, chunk_size=chunk)
    T = plain.shape[1]
    torch.testing.assert_close(logps[:, :T], plain)
    torch.testing.assert_close(entropies2[:, :T], entropies)
    assert not logps[:, T:].any() and (logps[~wider.completion_mask] == 0).all()
    wanted, got = (
        gradients(model, (plain * weights).sum()),
        gradients(model, (logps[:, :T] * weights).sum()),
    )
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
    for row, (ids, mask) in enumerate(
        zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ):
        prompt = rollout.prompt_ids[row // 3][rollout.prompt_mask[row // 3]]
        logits = model(input_ids=torch.cat([prompt, ids[mask]]).unsqueeze(0)).logits[0] / 0.7
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[mask].unsqueeze(1))
        plain = plain + (row + 1) * own.sum()
    weights = torch.arange(1, 7).unsqueeze(1)
    wanted, got = gradients(model, plain), gradients(model, (logps * weights).sum())
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_reaches_adapters_over_frozen_embeddings_and_changes_no_gradient(
    training,
):
    model = with_adapters(tiny_model(dtype=torch.float64))
    rollout = sample(model, *prompts())
    wanted = gradients(model, completion_logps(model, rollout, temperature=0.7)[0].sum())
    model.activation_checkpointing_enable({"use_reentrant": False})
    if training:
        model.train()
    with evaluating(model, adapter_dropout=True) if not training else contextlib.nullcontext():
        logps, _ = completion_logps(model, rollout, temperature=0.7)
        got = gradients(model, logps.sum())
    torch.testing.assert_close(logps.detach(), one_by_one(model.eval(), rollout), atol=1e-9, rtol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_one_step_of_a_whole_lora_model_by_finite_differences():
    model = with_adapters(
        tiny_model(
            config=GPT2Config, dtype=torch.float64, n_embd=16, n_layer=2, n_head=2, n_positions=32
        )
    )
    rollout = sample(model, *prompts())
    A = group_advantages(
        torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).flatten()
    old = completion_logps(model, rollout, temperature=0.7)[0].detach() + 0.05
    ref = old - 0.1

    def loss():
        logps, _ = completion_logps(model, rollout, temperature=0.7)
        return grpo_loss(
            logps, old, A, rollout.completion_mask, ref_logps=ref, beta=0.1, loss_type="grpo"
        )[0]

    got = gradients(model, loss())
    for name, p in list(model.named_parameters()):
        if p.requires_grad:
            direction = torch.randn(
                p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
            with torch.no_grad():
                p += 1e-6 * direction
                up = loss()
                p -= 2e-6 * direction
                down = loss()
                p += 1e-6 * direction
            slope = ((up - down) / 2e-6).item()
            assert (got[name] * direction).sum().item() == pytest.approx(
                slope, rel=1e-4, abs=1e-7
            ), name


def test_no_tensor_has_the_size_of_completion_times_vocabulary():
    """With a vocabulary of 262,144, scoring 64 tokens a few at a time never holds 64 rows of
    logits."""
    model = tiny_model(
        vocab_size=262_144,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = with_adapters(model)
    ids = torch.randint(5, 1000, (1, 4))
    completions = torch.randint(5, 1000, (4, 16))
    rollout = Rollout(
        ids,
        torch.ones_like(ids).bool(),
        completions,
        torch.ones_like(completions).bool(),
        torch.zeros(4, 16),
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


def test_scoring_changes_no_input():
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts())
    before = copy.deepcopy(rollout)
    for share in (True, False):
        logps, _ = completion_logps(model, rollout, temperature=0.7, share_prompt=share)
        logps.sum().backward()
    for f in dataclasses.fields(Rollout):
        assert torch.equal(getattr(rollout, f.name), getattr(before, f.name))


def test_masks_of_numbers_are_masks():
    model, (ids, mask) = with_adapters(tiny_model()), prompts()
    rollout = sample(model, ids, mask.long())
    numbers = Rollout(
        ids, mask.long(), rollout.completion_ids, rollout.completion_mask.float(), rollout.logps
    )
    assert torch.equal(
        *(completion_logps(model, r, temperature=0.7)[0] for r in (rollout, numbers))
    )


def test_a_group_that_is_masked_whole_keeps_one_column():
    rollout = sample(tiny_model(), *prompts())
    rollout.completion_mask[:3] = False
    assert rollout.select([0]).completion_ids.shape == (3, 1)


def test_a_rollout_without_tokens_to_train_has_zero_gradient():
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts())
    rollout.completion_mask = torch.zeros_like(rollout.completion_mask)
    logps, _ = completion_logps(model, rollout, temperature=1.0)
    assert not logps.any() and not any(g.any() for g in gradients(model, logps.sum()).values())


# ----------------------------------------------------------------------------- LoRA in whole models


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
    model = with_adapters(
        tiny_model(dtype=dtype, tie_word_embeddings=True), target_modules=["lm_head", "q_proj"]
    )
    ids = torch.randint(0, VOCAB, (2, 5))
    state, out = copy.deepcopy(model.state_dict()), model(ids).logits
    with torch.no_grad():
        for _ in range(1000):
            with lora_merged(model):
                pass
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(
        model(ids).logits, out
    )


def test_merging_an_adapted_head_leaves_the_tied_embedding_alone(tmp_path):
    model = with_adapters(
        tiny_model(tie_word_embeddings=True), target_modules=["lm_head", "v_proj"]
    )
    ids, embedding = torch.randint(0, VOCAB, (2, 5)), model.get_input_embeddings().weight.clone()
    out = model(ids).logits
    with torch.no_grad(), lora_merged(model):
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        torch.testing.assert_close(model(ids).logits, out)
    plain = merge_and_unload(model)
    assert (
        torch.equal(plain.get_input_embeddings().weight, embedding)
        and not plain.config.tie_word_embeddings
    )
    assert not any(isinstance(m, LoRALinear) for m in plain.modules())
    assert all(p.requires_grad for p in plain.parameters()) and not hasattr(plain, "lora_config")
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, out)
    assert torch.equal(again(ids).logits, plain(ids).logits)


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


def test_a_merged_and_unloaded_model_is_trainable_tied_as_before_and_the_file_names_its_base(
    tmp_path,
):
    model = with_adapters(tiny_model(tie_word_embeddings=True))
    model.config._name_or_path = "some/base"
    save_lora(model, tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/base"
    )
    merged = merge_and_unload(model)
    assert all(p.requires_grad for p in merged.parameters()) and merged.config.tie_word_embeddings
    assert not hasattr(merged, "lora_config")


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
    merged = with_adapters(tiny_model())
    before, snapshot = merged(ids).logits, lora_snapshot(merged)
    with torch.no_grad():
        merged.model.layers[0].mlp.up_proj.lora_B.weight += 0.1
        with lora_merged(merged), snapshot():  # merged weights are of the policy that has moved on
            assert torch.equal(merged(ids).logits, before)


def test_a_merged_and_unloaded_model_keeps_what_was_trained_in_full():
    model = with_adapters(tiny_model(), modules_to_save=["lm_head"], target_modules=["q_proj"])
    ids, trained = torch.randint(0, VOCAB, (2, 5)), model.lm_head.trained
    out = model(ids).logits
    # as the weight of a quantised layer that was not adapted
    model.model.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    plain = merge_and_unload(model)
    assert [n for n, p in plain.named_parameters() if not p.requires_grad] == ["model.packed"]
    assert plain.lm_head is trained and not any(isinstance(m, TrainedCopy) for m in plain.modules())
    torch.testing.assert_close(plain(ids).logits, out)


def test_in_the_loss_forward_adapter_dropout_acts_and_no_other():
    model = with_adapters(tiny_model(attention_dropout=0.5), lora_dropout=0.5)
    with evaluating(model, adapter_dropout=True):
        acting = {name for name, m in model.named_modules() if m.training}
    assert (
        acting == {name for name, m in model.named_modules() if name.endswith("lora_dropout")}
        and len(acting) == 14
    )


ADAPTERS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*.up_proj": 3}},
    "patterns in order": {"alpha_pattern": {"up_proj": 80, ".*": 3}},  # the first that fits counts
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "saved among all": {"modules_to_save": ["mlp"]},  # all-linear then leaves out what is inside
    "nested": {"modules_to_save": ["mlp", "down_proj"], "target_modules": ["q_proj"]},
    "norms": {
        "modules_to_save": ["norm"],
        "target_modules": ["q_proj"],
    },  # PEFT's rule: every name that ends so
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
    assert config["peft_type"] == "LORA" and config["inference_mode"]
    assert isinstance(config["target_modules"], list)
    assert not any("residual" in key for key in model.state_dict())
    if kind == "plain":  # settings of other files that change nothing here
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
        idle = {"lora_bias": False, "megatron_core": "megatron.core", "qalora_group_size": 16}
        for init in (False, "orthogonal"):
            text = json.dumps(config | idle | {"init_lora_weights": init})
            (tmp_path / "adapter_config.json").write_text(text)
            assert torch.equal(load_lora(tiny_model(), tmp_path)(ids).logits, model(ids).logits)


# --------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_the_update_is_the_sum_over_rows_of_minus_a_grad_logp_under_the_normaliser(loss_type):
    """Groups without advantage are skipped and micro-batches split, yet the gradient is that of the
    whole batch."""
    # two of the four groups have equal rewards
    pattern = [1.0, 0.0, 0.0, 0.5] * 2 + [1.0] * 4 + [0.0] * 4
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
    weight = {
        "dapo": 1 / m.sum(),
        "grpo": 1 / (m.sum(1, keepdim=True) * 16),
        "dr_grpo": 1 / (16 * 8),
        "luspo": 1 / 16,
    }[loss_type]
    wanted = gradients(before, -(A.unsqueeze(1) * logps * weight).sum())
    for name, p in t.params.items():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "args",
    [{}, {"loss_type": "grpo", "beta": 0.1}, {"loss_type": "dr_grpo", "top_entropy_quantile": 0.3}],
)
def test_the_update_does_not_depend_on_the_micro_batch_split(args):
    seen = []
    for size in (4, 8, 16):
        t = trainer(
            with_adapters(tiny_model(dtype=torch.float64)), per_device_train_batch_size=size, **args
        )
        metrics = update(t)
        seen.append(({name: p.grad.clone() for name, p in t.params.items()}, metrics))
    for grads, metrics in seen[1:]:
        for name in grads:
            torch.testing.assert_close(grads[name], seen[0][0][name], atol=1e-6, rtol=1e-5)
        for key in ("loss", "entropy", "grad_norm", "reward", SAMPLER_GAP):
            assert metrics[key] == pytest.approx(seen[0][1][key], rel=1e-5, abs=1e-9), key


@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_what_is_skipped_has_no_gradient_in_later_updates_either(loss_type):
    pattern, seen = [1.0, 0.0, 0.0, 0.5] * 2 + [1.0] * 4 + [0.0] * 4, []
    for whole in (False, True):
        t = trainer(
            with_adapters(tiny_model(dtype=torch.float64)), loss_type=loss_type, num_iterations=2,
            reward=lambda completions, **_: pattern, learning_rate=0.05, epsilon_high=0.3,
        )  # fmt: skip
        t.sharded = whole  # then no group is skipped
        update(t)
        seen.append({name: p.grad.clone() for name, p in t.params.items()})
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, seen[1][name], atol=1e-9, rtol=1e-7)


def test_a_batch_without_advantage_has_zero_gradients_and_is_still_a_step():
    t = trainer(reward=lambda completions, **columns: [1.0] * len(completions))
    metrics = update(t)
    assert all(p.grad is not None and not p.grad.any() for p in t.params.values())
    assert (
        metrics["frac_reward_zero_std"] == 1 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    )
    assert t.step == 1


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
        t = trainer(
            num_iterations=2, per_device_train_batch_size=16, loss_type="grpo", learning_rate=0.05
        )
        metrics = update(t)
    assert len(ratios) == 2 and (ratios[0] == 1).all() and (ratios[1] - 1).abs().max() > 1e-3
    assert metrics["clip_ratio/region_mean"] > 0 and t.step == 2


def test_the_sampler_and_the_scorer_agree_at_any_temperature():
    for temperature in (0.5, 1.0, 1.7):
        metrics = update(
            trainer(with_adapters(tiny_model(), lora_dropout=0.0), temperature=temperature)
        )
        assert metrics[SAMPLER_GAP] < 1e-5


def test_the_gap_compares_sampler_and_scorer_of_one_policy():
    assert update(trainer(num_iterations=2, learning_rate=0.3))[SAMPLER_GAP] < 1e-5


def test_the_reference_is_the_policy_that_training_starts_from(tmp_path):
    fresh = with_adapters(tiny_model(), random=False)
    assert not isinstance(default_reference(fresh), lora_snapshot)  # adapter off is exactly that
    save_lora(with_adapters(tiny_model()), tmp_path)
    for model in (
        load_lora(
            tiny_model(), tmp_path
        ),  # a continued adapter: adapter off would be the base model
        with_adapters(tiny_model(), random=False, init_lora_weights="pissa"),
        tiny_model(),  # full fine-tuning
    ):
        assert isinstance(default_reference(model), lora_snapshot)
    mixed = with_adapters(tiny_model(), random=False)
    # trainable, but not switched off with the adapters
    mixed.model.norm.weight.requires_grad_(True)
    assert isinstance(default_reference(mixed), lora_snapshot)
    below = with_adapters(tiny_model(), random=False)
    adapted = below.model.layers[0].mlp.up_proj.base_layer
    adapted.weight.requires_grad_(True)  # nor is what an adapter lies beside
    assert isinstance(default_reference(below), lora_snapshot)
    for model in (fresh, load_lora(tiny_model(), tmp_path), tiny_model(), mixed, below):
        t = trainer(model, beta=0.1, learning_rate=1e-3)
        first = update(t)
        assert first["kl"] == pytest.approx(0, abs=1e-7)
        assert update(t, 1)["kl"] > 1e-9


def test_truncated_rows_can_be_left_out_and_keep_their_place_in_the_statistics():
    t = trainer(
        mask_truncated_completions=True, max_completion_length=3, model=with_adapters(tiny_model())
    )
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = grpo_loss
        patch.setattr(
            grpo_lora, "grpo_loss", lambda *a, **k: calls.append((a, k)) or original(*a, **k)
        )
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


def test_tokens_as_uncertain_as_the_threshold_count():
    t = trainer(top_entropy_quantile=0.5)
    rollout = sample(t.model, *prompts(), eos_token_ids=[])
    batches = [grpo_lora.MicroBatch([p], rollout.select([p]), torch.zeros(3)) for p in (0, 1)]

    def counted(entropies):  # (6, 8), three rows in each micro-batch
        parts = iter(entropies.split(3))
        t.logps = lambda rollout: (None, next(parts))
        t.mark_uncertain_tokens(batches)
        return torch.cat([batch.uncertain for batch in batches])

    assert counted(torch.full((6, 8), 0.3)).all()  # all as uncertain: none is left out
    levels = torch.tensor([1.0, 2.0, 3.0]).repeat(16).view(6, 8)
    for numbers in (levels, levels.double() / 3):
        assert torch.equal(counted(numbers), levels >= 2)  # the median, and a third have it


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
    assert len(losses) > 1 and metrics["loss"] == pytest.approx(
        sum(loss.item() for loss, _ in losses)
    )
    assert metrics["grad_norm"] > 0


def test_a_policy_that_is_nan_is_noticed_where_no_group_has_an_advantage():
    t = trainer(reward=lambda completions, **columns: [1.0] * len(completions))
    assert update(t)["skipped_updates"] == 0
    next(p for name, p in t.params.items() if "lora_B" in name).detach().fill_(math.nan)
    assert update(t)["skipped_updates"] == 1


def test_a_skipped_update_leaves_the_weights_and_still_counts_in_the_schedule():
    t = trainer(max_steps=4, lr_scheduler_type="linear", learning_rate=0.1)
    factor = {0: 1.0, 1: math.nan, 2: 1.0}
    next(iter(t.params.values())).register_hook(lambda gradient: gradient * factor[index])
    for index, rate in enumerate((0.1, 0.075, 0.05)):
        before = adapters_of(t.model)
        metrics = update(t, index)
        assert metrics["learning_rate"] == pytest.approx(rate)
        assert metrics["skipped_updates"] == (index == 1)
        same = all(torch.equal(before[name], p) for name, p in t.params.items())
        assert same == (index == 1)


def changes(**args) -> dict[str, torch.Tensor]:
    """What one update does to each trained tensor of a model with random adapters and a copy."""
    model = with_adapters(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    before, t = adapters_of(model), trainer(model, **args)
    update(t)
    return {name: p.detach() - before[name] for name, p in t.params.items()}


def test_weight_decay_takes_its_share_of_each_weight_off_besides_the_step():
    model = with_adapters(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain, decayed = changes(), changes(weight_decay=0.5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(decayed[name], plain[name] - 1e-2 * 0.5 * p.detach())


def test_lora_plus_ratio_multiplies_the_step_of_b_and_of_nothing_else():
    plain, plus = changes(), changes(lora_plus_ratio=4.0)
    for name, change in plain.items():
        ratio = 4.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(plus[name], ratio * change, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------ training runs


@pytest.mark.parametrize(
    "kind",
    ["full", "mixed", "dora+", "pissa", "bf16", "checkpointed", "gpt2", "mamba", "two rewards"],
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
            tiny_model(config=GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64),
            random=False,
        )
    elif kind == "mamba":
        model = with_adapters(
            tiny_model(config=MambaConfig, hidden_size=32, num_hidden_layers=2, state_size=4),
            random=False,
        )
    else:
        model = with_adapters(tiny_model(), random=False)
        args |= {"gradient_checkpointing": kind == "checkpointed"}
        reward = [digits, digits] if kind == "two rewards" else digits
    before = adapters_of(model)
    metrics = trainer(model, reward, **args).train()
    gap = 0.05 if kind in ("bf16", "dora+") else 1e-4  # rounding, dropout
    assert metrics["grad_norm"] > 0 and metrics[SAMPLER_GAP] < gap
    assert (
        sum(not torch.equal(before[name], p) for name, p in adapters_of(model).items())
        >= len(before) / 2
    )
    if kind == "two rewards":
        assert metrics["reward"] == pytest.approx(
            metrics["rewards/digits_0/mean"] + metrics["rewards/digits_1/mean"]
        )


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


# --------------------------------------------------------------------------------- rewards and data


def test_each_completion_is_graded_with_its_own_row():
    rows = [{"prompt": f"{a}+1+1=?", "answer": str(a), "note": a} for a in range(8)]
    seen = {}

    def check(
        prompts,
        completions,
        completion_ids,
        answer,
        note,
        trainer_state,
        log_extra,
        log_metric,
        **columns,
    ):
        assert all(
            p == f"{n}+1+1=?" and a == str(n) for p, a, n in zip(prompts, answer, note, strict=True)
        )
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
    assert metrics["rewards/check/mean"] == pytest.approx(
        sum(int(p[0]) for p in seen["prompts"]) / 16
    )
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


@pytest.mark.parametrize("engine", [None, fast])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_half_precision_keeps_a_gradient_that_is_divided_by_a_million_tokens(
    monkeypatch, loss_type, engine
):
    """As if other processes held the rest of a batch of 2^20 tokens, in 2^10 rows or 2^20."""

    def gradient(dtype, processes):
        model = with_adapters(tiny_model(dtype=dtype))
        t = trainer(model, engine=engine, loss_type=loss_type, max_grad_norm=1e9)
        rollout = t.sample(t.batch(0), 4)
        t.sample = lambda *args: rollout
        t.seed("update", 0)
        whole = lambda value: [value] * (processes if isinstance(value, int) else 1)
        monkeypatch.setattr(grpo_lora, "gather", whole)
        t.update(t.batch(0))
        return torch.cat([p.grad.flatten() for p in t.params.values()])

    big = gradient(torch.float16, 2**14)
    exact = gradient(torch.float32, 2**14)
    assert torch.cosine_similarity(big, exact, dim=0) > 0.999
    assert big.norm().item() == pytest.approx(exact.norm().item(), rel=0.05)


def test_the_tokens_that_count_in_an_update_are_the_uncertain_ones():
    t = trainer(top_entropy_quantile=0.4)
    update(t)
    rollout, batches = t.last_batch
    marked = sum(int((b.uncertain & b.rollout.completion_mask).sum()) for b in batches)
    assert marked == pytest.approx(0.4 * int(rollout.completion_mask.sum()), abs=1)


def test_a_process_draws_what_comes_after_the_draws_of_lower_ranks():
    t = trainer()
    t.seed("update", 0)
    whole = t.sample(ROWS[:2], 4)
    t.seed("update", 0)
    t.rank = 1
    assert torch.equal(t.sample(ROWS[1:2], 4).completion_ids, whole.select([1]).completion_ids)


def test_a_trainer_weighs_tokens_by_policy_over_sampler_where_it_is_asked_to():
    mask = torch.tensor([[True, True]])
    rollout = Rollout(
        torch.zeros(1, 2), mask, torch.zeros(1, 2), mask, torch.tensor([[-1.0, -2.0]])
    )
    batch = grpo_lora.MicroBatch([0], rollout, torch.ones(1))
    old = torch.tensor([[-1.0, 1.0]])  # ratios 1 and e³
    weights = lambda **args: trainer(**args).token_weights(batch, old, old).tolist()
    assert weights() == [[1, 1]]
    assert weights(sampler_correction="token_truncate", sampler_correction_clip_max=2) == [[1, 2]]
    assert weights(sampler_correction="token_mask", sampler_correction_clip_max=2) == [[1, 0]]


def test_an_evaluation_takes_the_same_draws_every_time_and_comes_as_often_as_asked():
    t = trainer(with_adapters(tiny_model()), eval_rows=ROWS[:6], max_steps=4)
    assert t.evaluate() == t.evaluate()
    for every, steps in ((1, [0, 1, 2, 3, 4]), (3, [0, 3, 4]), (None, [0, 4])):
        seen = []
        note = lambda t, metrics, seen=seen: seen.extend([t.step] * ("eval_reward" in metrics))
        trainer(eval_rows=ROWS[:2], max_steps=4, eval_steps=every, callbacks=[note]).train()
        assert seen == steps


def test_an_update_depends_on_no_random_state_but_its_seed(tmp_path):
    gradients = []
    for state in (1, 2):
        t = trainer(with_adapters(tiny_model(), lora_dropout=0.5), output_dir=str(tmp_path / "run"))
        torch.manual_seed(state)
        update(t)
        gradients.append(torch.cat([p.grad.flatten() for p in t.params.values()]))
    assert torch.equal(*gradients)
    t.train()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_the_kl_penalty_acts_in_groups_without_advantage():
    for beta in (0.0, 0.5):
        equal = lambda completions, **columns: [1.0] * len(completions)
        t = trainer(with_adapters(tiny_model()), reward=equal, beta=beta)
        t.reference = lambda model=t.model: lora_disabled(model)
        update(t)
        assert any(p.grad.any() for p in t.params.values()) == (beta > 0)


def test_rollouts_are_merged_where_that_is_exact_or_asked_for():
    half = lambda: with_adapters(tiny_model(dtype=torch.bfloat16))
    asked = {"merge_half_precision": True, "sampler_correction": "token_truncate"}
    assert trainer().merges and not trainer(half()).merges and trainer(half(), **asked).merges
    assert not trainer(tiny_model()).merges  # there is no adapter


def test_rows_that_the_policy_has_left_lose_their_weight_and_no_others():
    t = trainer(off_policy_mask_threshold=0.5)
    rows = [  # its advantage, the nats that each token lost, and whether it is kept
        (-1.0, (0.4, 0.7), False), (-1.0, (0.25, 0.75), True), (-1.0, (0.4, None), True),
        (-1.0, (0.6, None), False), (0.5, (9.0, 9.0), True), (0.0, (9.0, 9.0), True),
    ]  # fmt: skip
    A, lost, kept = zip(*rows, strict=True)
    mask = torch.tensor([[x is not None for x in row] for row in lost])
    logps = -torch.tensor([[9.0 if x is None else x for x in row] for row in lost])
    ids, sampled = torch.zeros(6, 2).long(), torch.zeros(6, 2).masked_fill(~mask, 9.0)
    rollout = Rollout(ids[:1], mask[:1], ids, mask, sampled)
    batch = grpo_lora.MicroBatch([0], rollout, torch.tensor(A))
    assert t.token_weights(batch, logps, logps).tolist() == [[float(k)] * 2 for k in kept]


def test_every_eos_id_of_the_tokenizer_and_the_generation_config_counts():
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, 7, 9]
    t = trainer(with_adapters(model))
    assert t.eos_token_ids == [EOS, 7, 9]
    update(t)
    ends = [i for i, s in enumerate(t.samples) if s["ended"] and s["length"] < 8]
    assert ends and all(s["ended"] or s["length"] == 8 for s in t.samples)


def test_data_order_is_a_permutation_each_epoch_and_a_function_of_the_seed():
    t = trainer(rows=ROWS[:10], prompts_per_step=4)
    key = lambda rows: [row["prompt"][0]["content"] for row in rows]
    order = [k for i in range(5) for k in key(t.batch(i))]
    assert (
        sorted(order[:10]) == sorted(order[10:]) == sorted(key(ROWS[:10]))
        and order[:10] != order[10:]
    )
    assert (
        key(trainer(rows=ROWS[:10]).batch(3))
        == key(t.batch(3))
        != key(trainer(rows=ROWS[:10], seed=1).batch(3))
    )
