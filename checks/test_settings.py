"""Every setting acts as its help says, and a setting that is ignored is noticed.

ENTRIES has a value for each field of the three dataclasses of settings, other than its default, and
a function that shows what the value does. It is called with {field: value} and must pass. It is
called with {field: default}, which is what a program that ignores the field would do, and must
fail. A new field without an entry fails too.
"""

import collections
import copy
import dataclasses
import functools
import inspect
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from checks.helpers import lines
from grpo_lora import (
    AGGREGATION,
    SAMPLER_GAP,
    GRPOConfig,
    GRPOTrainer,
    completion_logps,
    grpo_loss,
    multi_objective_advantages,
    sampler_weights,
)
from lora import LoRAConfig, LoRALinear, TrainedCopy, apply_lora, save_lora
from runner import cli, processes
from test_training import (
    ROWS,
    TOKENIZER,
    VOCAB,
    adapters_of,
    changes,
    gradients,
    one_by_one,
    tiny_model,
    trainer,
    update,
    with_adapters,
)

KINDS = (GRPOConfig, LoRAConfig, cli.RunConfig)
FIELDS = {f.name: f for kind in KINDS for f in dataclasses.fields(kind)}
Given = dict[str, Any]  # the one setting that an entry's function is called with


class Entry(NamedTuple):
    value: Any
    shows: Callable[..., None]  # the setting, then fixtures by name


ENTRIES: dict[str, Entry] = {}


def acts(**fields: Any) -> Callable[..., Any]:
    """A decorator: the function shows what these fields do at these values."""

    def enter(shows: Callable[..., None]) -> Callable[..., None]:
        assert not fields.keys() & ENTRIES.keys()
        ENTRIES.update({name: Entry(value, shows) for name, value in fields.items()})
        return shows

    return enter


def default_of(name: str) -> Any:
    f = FIELDS[name]
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def show(name: str, value: Any, request: pytest.FixtureRequest) -> None:
    shows = ENTRIES[name].shows
    _, *others = inspect.signature(shows).parameters.values()
    fixtures = [p.name for p in others if p.default is p.empty]
    shows({name: value}, **{fixture: request.getfixturevalue(fixture) for fixture in fixtures})


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ramp(completions, **columns) -> list[float]:
    """No two rewards are equal, so that every group has advantages."""
    return [float(i) for i in range(len(completions))]


# -------------------------------------------------------------------------- the run and its batches


@acts(output_dir="run")
def files_are_written_there(given: Given) -> None:
    trainer(**given).train()
    names = {path.name for path in Path().glob("*/*")}
    assert names == {"metrics.jsonl", "completions.jsonl", "adapter"} and Path("run").is_dir()


@acts(seed=7)
def order_draws_and_adapter_follow_from_the_seed(given: Given, start) -> None:
    zero, same, other = start(), start(seed=0), start(**given)
    rows = zero.batch(0)

    def drawn(t: GRPOTrainer) -> list:  # of one and the same prompts
        t.seed("update", 0)
        return t.sample(rows, 8).completion_ids.tolist()

    for t, equal in ((same, True), (other, False)):
        assert (t.batch(0) == rows) == equal
        assert (drawn(t) == drawn(zero)) == equal
        A = [name for name in t.params if "lora_A" in name]
        assert all(torch.equal(t.params[name], zero.params[name]) for name in A) == equal


@acts(max_steps=3)
def that_many_updates_are_made(given: Given) -> None:
    t = trainer(max_completion_length=1, prompts_per_step=1, output_dir="run", **given)
    t.train()
    assert [row["step"] for row in lines(Path("run/metrics.jsonl"))] == [1, 2, 3] and t.step == 3


@acts(eval_steps=2)
def an_evaluation_every_so_many_updates_too(given: Given) -> None:
    trainer(eval_rows=ROWS[:2], max_steps=5, output_dir="run", **given).train()
    rows = lines(Path("run/metrics.jsonl"))
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 4, 5]


@acts(prompts_per_step=3)
def so_many_prompts_in_a_batch(given: Given) -> None:
    update(t := trainer(**given))
    assert collections.Counter(s["group"] for s in t.samples) == {0: 4, 1: 4, 2: 4}
    assert len({str(s["prompt"]) for s in t.samples}) == 3


@acts(num_generations=5)
def so_many_completions_of_each_prompt(given: Given) -> None:
    update(t := trainer(**given))
    assert collections.Counter(str(s["prompt"]) for s in t.samples).most_common()[-1][1] == 5
    assert len(t.samples) == 4 * 5


@acts(per_device_train_batch_size=12)
def rows_of_a_micro_batch_which_change_no_gradient(given: Given) -> None:
    whole = trainer(reward=ramp, per_device_train_batch_size=16)
    for t in (whole, split := trainer(reward=ramp, **given)):
        update(t)
    assert [len(batch.advantages) for batch in whole.last_batch[1]] == [16]
    assert [len(batch.advantages) for batch in split.last_batch[1]] == [12, 4]
    for name, p in split.params.items():
        torch.testing.assert_close(p.grad, whole.params[name].grad)


@acts(max_completion_length=5)
def the_longest_completion(given: Given) -> None:
    model = with_adapters(tiny_model(max_position_embeddings=512), random=False)
    t = trainer(model, prompts_per_step=1, **given)
    t.eos_token_ids = [VOCAB + 1]  # no completion ends of itself
    update(t)
    assert [s["length"] for s in t.samples] == [5] * 4


@acts(temperature=0.5)
def the_policy_that_samples_and_is_scored_is_tempered(given: Given) -> None:
    t = trainer(**given)
    before = copy.deepcopy(t.model)
    metrics = update(t)
    rollout = t.last_batch[0]
    wanted = one_by_one(before, rollout, temperature=0.5)
    torch.testing.assert_close(rollout.logps.double(), wanted, atol=1e-5, rtol=0)
    assert metrics[SAMPLER_GAP] < 1e-5


@acts(system_prompt="3")
def it_stands_before_every_prompt(given: Given) -> None:
    for rows in (ROWS[:1], [{"prompt": "1+2", "answer": "3"}]):
        update(t := trainer(rows=rows, prompts_per_step=1, **given))
        text = TOKENIZER.decode(t.last_batch[0].prompt_ids[0])
        assert "3<end><user>" in text.replace(" ", "") and text.endswith("<assistant>")


@acts(chat_template_kwargs={"words": "1+1"})
def the_template_gets_these_words(given: Given) -> None:
    t = trainer(**given)
    t.tokenizer = copy.deepcopy(TOKENIZER)
    t.tokenizer.chat_template += "{{ words }}"
    assert TOKENIZER.decode(t.encode(ROWS[0])).endswith("<assistant>1+1")


@acts(mask_truncated_completions=True)
def rows_without_an_eos_leave_the_loss(given: Given) -> None:
    model = with_adapters(tiny_model())
    model.generation_config.eos_token_id = [*range(9, 20)]  # some end, and some do not
    update(t := trainer(model, max_completion_length=3, **given))
    ended = torch.tensor([s["ended"] for s in t.samples])
    assert ended.any() and not ended.all()
    assert torch.equal(t.last_batch[0].completion_mask.any(dim=1), ended)


# ------------------------------------------------------------------------------------ the objective


def the_gradient_is_that_of_the_loss_with_it(given: Given, wanted: Given, needs: Given) -> None:
    """The second update with a batch, where ratios are not 1: its gradient is that of grpo_loss
    with the wanted setting, on log-probs computed once more."""
    model = with_adapters(tiny_model(dtype=torch.float64))
    options = {"num_iterations": 2, "learning_rate": 0.05, "max_grad_norm": 1e9}
    t = trainer(model, reward=ramp, **options, **needs, **given)
    before, moved = copy.deepcopy(model), []
    t.optimizer.register_step_post_hook(lambda *_: moved.append(copy.deepcopy(model)))
    update(t)
    (rollout, batches), policy = t.last_batch, moved[0]  # p.grad is that of the second update
    settings = {"loss_type": "dapo", **needs, **wanted}
    share = settings.pop("top_entropy_quantile", 1)
    logps = functools.partial(completion_logps, temperature=1.0, share_prompt=False)
    entropies = torch.cat([logps(policy, b.rollout)[1][b.rollout.completion_mask] for b in batches])
    per_token = AGGREGATION[settings["loss_type"]] == "token"
    normalizer = int(rollout.completion_mask.sum()) if per_token else len(rollout.completion_ids)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        now, entropy = logps(policy, batch.rollout)
        old = logps(before, batch.rollout)[0].detach()
        loss = loss + grpo_loss(
            now, old, batch.advantages, batch.rollout.completion_mask, ref_logps=old,
            token_weights=entropy >= entropies.quantile(1 - share), normalizer=normalizer, **settings,
        )[0]  # fmt: skip
    for name, gradient in gradients(policy, loss).items():
        torch.testing.assert_close(t.params[name].grad, gradient, atol=1e-5, rtol=1e-4)


SAPO, KL = {"loss_type": "sapo"}, {"beta": 0.5}
OBJECTIVE: dict[str, tuple[Any, Given]] = {  # field -> its value, and what else it needs to matter
    "loss_type": ("grpo", {}),
    "importance_sampling_level": ("sequence", {}),
    "epsilon": (0.05, {}),
    "epsilon_high": (0.6, {}),
    "delta": (1.3, {}),
    "sapo_temperature_pos": (3.0, SAPO),
    "sapo_temperature_neg": (3.0, SAPO),
    "beta": (0.5, {}),
    "kl_estimator": ("k2", KL),
    "use_bias_correction_kl": (False, KL),
    "top_entropy_quantile": (0.3, {}),
    "opmd_tau": (5.0, {"loss_type": "opmd"}),
}
for _name, (_value, _needs) in OBJECTIVE.items():
    _shows = functools.partial(
        the_gradient_is_that_of_the_loss_with_it, wanted={_name: _value}, needs=_needs
    )
    acts(**{_name: _value})(_shows)


def gradient_of_a_mismatched_sampler(**given: Any) -> Any:
    """An update whose completions came from a policy with other adapters: its gradient, and its
    rollout, log-probs and micro-batches."""
    model = with_adapters(tiny_model(dtype=torch.float64))
    t = trainer(model, reward=ramp, max_grad_norm=1e9, **given)
    sampler = with_adapters(tiny_model(dtype=torch.float64), seed=5)
    t.seed("update", 0)
    other = trainer(sampler, reward=ramp)
    other.seed("update", 0)
    rollout = other.sample(t.batch(0), 4)
    t.sample = lambda *args: rollout
    before = copy.deepcopy(model)
    t.update(t.batch(0))
    return t, before


def weights_act(given: Given, mode: str = "none", low=0.0, high=3.0, threshold=None) -> None:
    """The gradient is that of the loss with these weights."""
    needs = {} if mode == "none" else {"sampler_correction": mode}
    t, before = gradient_of_a_mismatched_sampler(**needs | given)
    loss, seen = torch.zeros((), dtype=torch.float64), []
    for batch in t.last_batch[1]:
        mask, sampled = batch.rollout.completion_mask, batch.rollout.logps
        logps, _ = completion_logps(before, batch.rollout, temperature=1.0)
        old = logps.detach()
        weights = torch.ones_like(old)
        if mode != "none":
            weights = sampler_weights(old, sampled, mask, mode, low, high)
        if threshold:
            gap = torch.where(mask, sampled - old, 0.0).sum(1) / mask.sum(1)
            weights = weights * ~((batch.advantages < 0) & (gap > threshold)).unsqueeze(1)
        seen += weights[mask].tolist()
        N = int(t.last_batch[0].completion_mask.sum())
        A = batch.advantages
        loss = loss + grpo_loss(logps, old, A, mask, token_weights=weights, normalizer=N)[0]
    assert len(set(seen)) > 1
    for name, gradient in gradients(before, loss).items():
        torch.testing.assert_close(t.params[name].grad, gradient, atol=1e-6, rtol=1e-4)


@acts(sampler_correction="sequence_truncate")
def tokens_are_weighed_by_policy_over_sampler(given: Given) -> None:
    weights_act(given, "sequence_truncate")


@acts(sampler_correction_clip_min=0.8)
def small_weights_are_dropped(given: Given) -> None:
    weights_act(given, "token_mask", low=0.8)


@acts(sampler_correction_clip_max=1.1)
def large_weights_are_dropped(given: Given) -> None:
    weights_act(given, "token_mask", high=1.1)


@acts(off_policy_mask_threshold=0.05)
def bad_rows_of_another_policy_are_dropped(given: Given) -> None:
    weights_act(given, threshold=0.05)


@acts(merge_half_precision=True)
def half_precision_weights_are_merged_for_rollouts(given: Given) -> None:
    model = lambda: with_adapters(tiny_model(dtype=torch.bfloat16))
    correction = {"sampler_correction": "token_truncate"}
    merged, plain = trainer(model(), **correction, **given), trainer(model(), **correction)
    assert merged.merges and not plain.merges
    assert update(merged)[SAMPLER_GAP] > 0 and trainer(**correction).merges
    with pytest.raises(ValueError, match="needs sampler_correction"):
        trainer(model(), **given)


def advantages_and_rewards(reward: Any, **args: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(P, G) and (P, G, K), and the metrics, of one update."""
    metrics = update(t := trainer(reward=reward, **args))
    names = [f"rewards/{name}" for name in t.reward_names]
    rewards = torch.tensor([[s[name] for name in names] for s in t.samples], dtype=torch.float64)
    advantages = torch.tensor([s["advantage"] for s in t.samples], dtype=torch.float64)
    return advantages.view(4, 4), rewards.view(4, 4, -1), metrics


def steep(completions, **columns) -> list[float]:
    return [float(i**2 % 7) for i in range(len(completions))]


@acts(scale_rewards="batch")
def the_std_of_the_batch_divides_advantages(given: Given) -> None:
    advantages, rewards, _ = advantages_and_rewards(steep, **given)
    R = rewards.squeeze(2)
    wanted = (R - R.mean(dim=1, keepdim=True)) / (R.std() + 1e-4)
    torch.testing.assert_close(advantages, wanted)


@acts(reward_weights=[0.5, 2.0])
def rewards_are_summed_by_weight(given: Given) -> None:
    advantages, rewards, metrics = advantages_and_rewards([ramp, steep], **given)
    R = 0.5 * rewards[..., 0] + 2 * rewards[..., 1]
    assert metrics["reward"] == pytest.approx(R.mean().item())
    wanted = (R - R.mean(dim=1, keepdim=True)) / (R.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages, wanted)


@acts(multi_objective_aggregation="normalize_then_sum")
def each_reward_is_normalised_before_they_are_summed(given: Given) -> None:
    advantages, rewards, _ = advantages_and_rewards([ramp, steep], **given)
    options = {"weights": torch.ones(2), "aggregation": "normalize_then_sum"}
    torch.testing.assert_close(advantages, multi_objective_advantages(rewards, **options))


# ------------------------------------------------------------------------------------ the optimiser


@acts(num_iterations=2)
def so_many_updates_with_each_batch_of_completions(given: Given) -> None:
    t, steps, rollouts = trainer(max_steps=4, output_dir="run", **given), [], []
    t.optimizer.register_step_post_hook(lambda *_: steps.append(len(rollouts)))
    original = t.sample
    t.sample = lambda *args: rollouts.append(args) or original(*args)
    t.train()
    assert steps == [1, 1, 2, 2] and len(rollouts) == 2
    assert [row["step"] for row in lines(Path("run/metrics.jsonl"))] == [2, 4]


def farthest(**given: Any) -> dict[str, float]:
    """How far the first update moves a number of A, of B, and of a module trained in full. Adam's
    first step is the rate itself, in the direction of the gradient's sign."""
    found: dict[str, float] = {}
    for name, change in changes(**given).items():
        kind = next((kind for kind in ("lora_A", "lora_B") if kind in name), "full")
        found[kind] = max(found.get(kind, 0.0), change.abs().max().item())
    return found


@acts(learning_rate=3e-4)
def the_first_step_is_as_long_as_the_rate(given: Given) -> None:
    rates = {"lora_A": 3e-4, "lora_B": 3e-4, "full": 3e-4}
    assert farthest(**given) == pytest.approx(rates, rel=0.01)


@acts(lora_plus_ratio=5.0)
def the_step_of_b_is_so_many_times_that_of_a(given: Given) -> None:
    rates = {"lora_A": 0.01, "lora_B": 0.05, "full": 0.01}
    assert farthest(**given) == pytest.approx(rates, rel=0.01)


@acts(modules_to_save_learning_rate=2e-4)
def what_is_trained_in_full_has_a_rate_of_its_own(given: Given) -> None:
    rates = {"lora_A": 0.01, "lora_B": 0.01, "full": 2e-4}
    assert farthest(**given) == pytest.approx(rates, rel=0.01)


def rates(**given: Any) -> list[float]:
    trainer(max_steps=4, output_dir="run", **given).train()
    return [row["learning_rate"] for row in lines(Path("run/metrics.jsonl"))]


@acts(lr_scheduler_type="linear")
def the_rate_falls_as_it_says(given: Given) -> None:
    assert rates(**given) == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@acts(warmup_steps=2)
def the_rate_rises_over_so_many_updates(given: Given) -> None:
    assert rates(**given) == pytest.approx([0, 0.005, 0.01, 0.01])


@acts(weight_decay=0.5)
def adamw_takes_a_share_of_the_weights_off(given: Given) -> None:
    model = with_adapters(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain, decayed = changes(), changes(**given)
    for name, p in adapters_of(model).items():
        torch.testing.assert_close(decayed[name], plain[name] - 0.01 * 0.5 * p)


@acts(max_grad_norm=1e-3)
def gradients_are_scaled_down_to_it(given: Given) -> None:
    metrics = update(t := trainer(**given))
    norm = torch.cat([p.grad.flatten() for p in t.params.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=0.01) and metrics["grad_norm"] > 0.01


@acts(gradient_checkpointing=True)
def fewer_numbers_are_kept_for_the_backward_pass(given: Given) -> None:
    kept: collections.Counter[bool] = collections.Counter()
    trainers = {False: trainer(), True: trainer(**given)}
    for which, t in trainers.items():

        def count(tensor, which=which):
            kept[which] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            update(t)
    assert kept[True] < kept[False] / 2
    for name, p in trainers[True].params.items():
        torch.testing.assert_close(p.grad, trainers[False].params[name].grad, atol=1e-6, rtol=1e-4)


# -------------------------------------------------------------------------------------- the adapter


def adapted(given: Given, random: bool = True) -> dict[str, LoRALinear]:
    """The layers of a tiny model with adapters, by name."""
    torch.manual_seed(0)
    model = apply_lora(tiny_model(), LoRAConfig(**given))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    for layer in layers.values() if random else ():
        torch.nn.init.normal_(layer.lora_B.weight)
    return layers


@torch.no_grad()
def weight(layer: Callable[..., torch.Tensor], width: int) -> torch.Tensor:
    """(out, in): what a linear layer does, whatever it is made of."""
    return layer(torch.eye(width)).T


def adds(given: Given, scales: dict[str, float], rank: int = 8) -> None:
    """Asserts what layers add to W: the scale given, or that of the others, times B A."""
    for name, layer in adapted(given).items():
        width = layer.in_features
        change = weight(layer, width) - weight(layer.base_layer, width)
        s = next((s for part, s in scales.items() if part in name), scales[""])
        product = layer.lora_B.weight @ layer.lora_A.weight
        torch.testing.assert_close(change, s * product.detach(), atol=1e-4, rtol=1e-4)


@acts(r=3)
def the_update_has_this_rank(given: Given) -> None:
    for layer in adapted(given).values():
        change = weight(layer, layer.in_features) - layer.base_layer.weight
        assert layer.lora_A.out_features == torch.linalg.matrix_rank(change, atol=1e-3) == 3
    adds(given, {"": 8 / 3})


@acts(lora_alpha=24)
def the_update_is_scaled_by_alpha_over_r(given: Given) -> None:
    adds(given, {"": 3.0})


@acts(use_rslora=True)
def the_update_is_scaled_by_alpha_over_the_root_of_r(given: Given) -> None:
    adds(given, {"": 8**0.5})


@acts(alpha_pattern={"q_proj": 80.0})
def a_module_has_an_alpha_of_its_own(given: Given) -> None:
    adds(given, {"q_proj": 10.0, "": 1.0})


@acts(rank_pattern={"q_proj": 2})
def a_module_has_a_rank_of_its_own(given: Given) -> None:
    for name, layer in adapted(given).items():
        assert layer.lora_A.out_features == (2 if "q_proj" in name else 8)
    adds(given, {"q_proj": 4.0, "": 1.0})


@acts(lora_dropout=0.5)
def the_adapters_input_is_dropped_in_training_only(given: Given) -> None:
    layer = adapted(given)["model.layers.0.self_attn.q_proj"]
    x = torch.ones(1, layer.in_features)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    dropped = layer.lora_dropout(torch.ones(10_000)) == 0
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(layer(x), layer(x))


@acts(target_modules=["q_proj"])
def these_modules_are_adapted(given: Given) -> None:
    assert {name.rpartition(".")[2] for name in adapted(given)} == {"q_proj"}


@acts(modules_to_save=["lm_head"])
def of_these_modules_a_full_copy_is_trained(given: Given) -> None:
    model = apply_lora(tiny_model(), LoRAConfig(**given))
    copies = [name for name, m in model.named_modules() if isinstance(m, TrainedCopy)]
    trained = {name for name in adapters_of(model) if "lora_" not in name}
    assert copies == ["lm_head"] and trained == {"lm_head.trained.weight"}


@acts(bias="all")
def biases_stay_frozen_and_anything_else_is_refused(given: Given) -> None:
    model = apply_lora(tiny_model(attention_bias=True), LoRAConfig())
    assert not [name for name in adapters_of(model) if name.endswith("bias")]
    with pytest.raises(ValueError, match=r"bias: 'all' is unknown .*; or use modules_to_save"):
        LoRAConfig(**given)


@acts(use_dora=True)
def the_length_of_each_row_is_trained_by_itself(given: Given) -> None:
    for layer in adapted(given).values():
        assert layer.lora_magnitude_vector is not None
        lengths = layer.lora_magnitude_vector.detach()
        torch.testing.assert_close(weight(layer, layer.in_features).norm(dim=1), lengths)
        product = (layer.lora_B.weight @ layer.lora_A.weight).detach()
        rows = torch.nn.functional.normalize(layer.base_layer.weight + product, dim=1)
        torch.testing.assert_close(weight(layer, layer.in_features), rows * lengths.unsqueeze(1))


@acts(init_lora_weights="pissa")
def the_adapter_starts_with_the_largest_directions_of_w(given: Given) -> None:
    for layer in adapted(given, random=False).values():
        W = layer.base_layer.weight
        U, S, Vh = torch.linalg.svd(W)
        product = (layer.lora_B.weight @ layer.lora_A.weight).detach()
        torch.testing.assert_close(product, U[:, :8] * S[:8] @ Vh[:8], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weight(layer, layer.in_features), W, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------- the runner


@pytest.fixture
def start(model_dir, data) -> Callable[..., GRPOTrainer]:
    """Brings a run up to its first update, as the command line does."""
    defaults = {"model": str(model_dir), "data": str(data), "prompts_per_step": 2}
    defaults |= {"num_generations": 4, "max_completion_length": 6, "max_steps": 2}

    def prepare(**settings: Any) -> GRPOTrainer:
        values = defaults | settings
        pick = lambda kind: kind(
            **{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
        )
        return cli.prepare(pick(cli.RunConfig), pick(LoRAConfig), pick(GRPOConfig))

    return prepare


def write_rows(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@acts(model="other")
def this_model_is_trained_and_none_is_the_demos(given: Given, start) -> None:
    for seed, folder in ((5, "other"), (6, "runs/demo-base-model")):
        tiny_model(seed).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    ours = start(**given).model.get_input_embeddings().weight
    assert torch.equal(ours, tiny_model(5).get_input_embeddings().weight)
    demos = start(model=None).model.get_input_embeddings().weight
    assert torch.equal(demos, tiny_model(6).get_input_embeddings().weight)


@acts(data="other.jsonl")
def these_rows_are_trained_on(given: Given, start) -> None:
    write_rows("other.jsonl", ROWS[:3])
    assert start(**given).train_dataset == ROWS[:3]


@acts(prompt_column="question")
def another_column_is_the_prompt(given: Given, start) -> None:
    rows = [{"question": row["prompt"], "answer": row["answer"]} for row in ROWS]
    write_rows("questions.jsonl", rows)
    t = start(data="questions.jsonl", **given)
    assert t.train_dataset == [{k: row[k] for k in ("answer", "prompt")} for row in ROWS]


@acts(eval_data="held-out.jsonl")
def these_rows_are_held_out(given: Given, start) -> None:
    write_rows("held-out.jsonl", ROWS[:3])
    t = start(**given)
    assert t.eval_dataset == ROWS[:3] and t.train_dataset == ROWS


@acts(eval_size=5)
def so_many_of_the_last_rows_are_held_out(given: Given, start) -> None:
    t = start(**given)
    assert t.eval_dataset == ROWS[-5:] and t.train_dataset == ROWS[:-5]


@acts(rewards="format, tag_count,mine.py:half")
def these_rewards_are_called(given: Given, start) -> None:
    Path("mine.py").write_text("half = lambda completions, **c: [0.5 for _ in completions]\n")
    metrics = update(start(**given))
    found = {name.split("/")[1] for name in metrics if name.startswith("rewards/")}
    assert found == {"format_reward", "tag_count_reward", "<lambda>"}
    assert metrics["rewards/<lambda>/mean"] == 0.5


@acts(dtype="bfloat16")
def base_weights_are_of_this_type_and_adapters_float32(given: Given, start) -> None:
    parameters = start(**given).model.parameters()
    found = {(p.dtype, p.requires_grad) for p in parameters}
    assert found == {(torch.bfloat16, False), (torch.float32, True)}


@acts(load_in_4bit=True, load_in_8bit=True)
def base_weights_are_in_so_many_bits(given: Given, start) -> None:
    pytest.importorskip("bitsandbytes")
    t = start(**given)
    kind = "Linear4bit" if "load_in_4bit" in given else "Linear8bitLt"
    assert type(t.model.model.layers[0].mlp.up_proj.base_layer).__name__ == kind
    assert math.isfinite(update(t)["loss"])


@acts(device="cpu")
def the_model_is_on_this_device(given: Given, start, monkeypatch) -> None:
    if not torch.cuda.is_available():  # then "auto" would come to the same
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert start(**given).device.type == "cpu"


@acts(adapter="saved")
def this_adapter_is_trained_on(given: Given, start) -> None:
    saved = with_adapters(tiny_model(), r=2)
    save_lora(saved, "saved")
    ours = adapters_of(start(**given).model)
    for name, p in adapters_of(saved).items():
        assert torch.equal(ours[name], p)


@acts(variant="gspo")
def a_papers_settings_which_flags_override(given: Given) -> None:
    flag = [] if given["variant"] is None else ["--variant", given["variant"]]
    *_, args = cli.parse(["--model", "m", "--data", "d", *flag, "--epsilon_high", "0.5"])
    assert args.importance_sampling_level == "sequence" and args.loss_type == "grpo"
    assert (args.epsilon, args.epsilon_high) == (3e-4, 0.5)


@acts(tune="learning_rate")
def short_runs_find_it_instead_of_one_run(given: Given, model_dir, data) -> None:
    tiny = "--prompts_per_step 1 --num_generations 2 --max_completion_length 1 --max_steps 30"
    flag = [] if given["tune"] is None else ["--tune", given["tune"]]
    command = ["--model", str(model_dir), "--data", str(data), "--rewards", "r.py:first"]
    first = "first = lambda completion_ids, **columns: [ids[0] / 40 for ids in completion_ids]\n"
    Path("r.py").write_text(first)  # rewards that hardly ever tie
    assert cli.main([*command, *tiny.split(), *flag, "--output_dir", "run"]) == 0
    assert len(list(Path("run").glob("learning_rate*"))) == 8
    assert "--learning_rate" in Path("run/best.args").read_text()
    assert not Path("run/adapter").exists()


@acts(resume=True)
def the_run_goes_on_from_its_newest_checkpoint(given: Given, start) -> None:
    start(output_dir="run", save_steps=1, max_steps=1).train()
    t = start(output_dir="run", save_steps=1, **given)
    t.train()
    assert [row["step"] for row in lines(Path("run/metrics.jsonl"))] == [1, 2] and t.step == 2


def checkpoints(start, **settings: Any) -> list[str]:
    start(output_dir="run", max_steps=4, **settings).train()
    return sorted(path.name for path in Path("run").glob("checkpoint-*"))


@acts(save_steps=2)
def a_checkpoint_every_so_many_updates(given: Given, start) -> None:
    assert checkpoints(start, **given) == ["checkpoint-2", "checkpoint-4"]


@acts(save_total_limit=1)
def so_many_checkpoints_are_kept(given: Given, start) -> None:
    assert checkpoints(start, save_steps=1, **given) == ["checkpoint-4"]


@acts(num_completions_to_log=3)
def so_many_rows_of_a_batch_are_recorded(given: Given, start) -> None:
    start(output_dir="run", prompts_per_step=3, **given).train()
    steps = [row["step"] for row in lines(Path("run/completions.jsonl"))]
    assert steps == [1, 1, 1, 2, 2, 2]


@acts(log_tokens_steps=2)
def what_an_update_did_to_tokens_is_recorded_every_so_often(given: Given, start) -> None:
    start(output_dir="run", max_steps=4, **given).train()
    rows = lines(Path("run/completions.jsonl"))
    assert {row["step"] for row in rows if "logps_after" in row} == {2, 4}


@acts(reward_timeout=0.1)
def a_reward_that_takes_longer_ends_the_process(given: Given, start, monkeypatch, capsys) -> None:
    Path("slow.py").write_text(
        "import time\n"
        "def slow(completions, **columns): return time.sleep(0.4) or [0.0 for _ in completions]\n"
    )
    status: list[int] = []
    monkeypatch.setattr(os, "_exit", status.append)
    started = time.monotonic()
    update(start(rewards="slow.py:slow", **given))
    assert status == [1] and time.monotonic() - started < 60
    assert "reward slow took longer than reward_timeout = 0.1 s" in capsys.readouterr().err


@acts(ddp_timeout=7.0)
def so_many_seconds_one_process_waits_for_the_others(given: Given, start, monkeypatch) -> None:
    waits: list[float] = []
    join = lambda backend, timeout: waits.append(timeout.total_seconds())
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", join)
    start(**given)
    assert waits == [7.0]


@acts(fsdp=True)
def frozen_weights_are_spread_over_the_processes(given: Given, start, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    join = {"init_method": f"file://{Path('meet').absolute()}", "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **join)
    try:
        t = start(**given)
        named = dict(t.model.named_parameters())
        spread = {name for name, p in named.items() if hasattr(p, "full_tensor")}
        layers = {n for n, p in named.items() if ".layers." in n and not p.requires_grad}
        assert spread == layers and len(spread) == 18
        assert isinstance(t.engine, processes.InStep)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- the tests


def test_every_setting_has_an_entry_and_every_name_is_one_setting_alone():
    assert ENTRIES.keys() == FIELDS.keys()
    assert len(FIELDS) == sum(len(dataclasses.fields(kind)) for kind in KINDS)
    for name, entry in ENTRIES.items():
        assert entry.value != default_of(name), name


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_acts_as_its_help_says(name, request):
    show(name, ENTRIES[name].value, request)


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_that_is_ignored_is_noticed(name, request):
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        show(name, default_of(name), request)


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_can_be_given_on_the_command_line(name):
    value = ENTRIES[name].value
    words = [json.dumps(value)] if isinstance(value, dict) else [str(value)]
    if isinstance(value, list):
        words = [",".join(value)] if name == "target_modules" else [str(x) for x in value]
    command = ["--model", "m", "--data", "d", f"--{name}", *words]
    command += ["--sampler_correction", "token_mask"] if name.startswith("merge") else []
    command += ["--eval_size", "1"] if name == "eval_steps" else []
    if name == "bias":
        with pytest.raises(ValueError, match="--bias: invalid choice: 'all'"):
            cli.parse(command)
        return
    found = {key: v for settings in cli.parse(command) for key, v in vars(settings).items()}
    assert found[name] == value
