"""The same numbers as TRL 1.16: objective, advantages, whole training runs."""

import contextlib
import functools
import itertools
import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers

import rewards
from checks.parity import adapter_of, both, parity_model, randomise
from grpo_lora import (
    GRPOConfig,
    GRPOTrainer,
    MicroBatch,
    Rollout,
    completion_mask,
    grpo_loss,
    multi_objective_advantages,
)
from lora import lora_disabled
from test_training import ROWS, digits, trainer, update

# ------------------------------------------------------------------------------- TRL: the objective


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, 32))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="module")
def trl_trainer(words, tmp_path_factory):
    """A factory of real trl.GRPOTrainers: settings -> trainer, built from TRL's own GRPOConfig, defaults and all."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def make(model=None, reward_funcs=None, dataset=None, **settings):
        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
        } | settings
        folder = str(tmp_path_factory.getbasetemp())
        args = trl.GRPOConfig(
            folder, report_to="none", use_cpu=True, bf16=False, save_strategy="no", **settings
        )
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
    return (
        (logps, old, advantages, torch.arange(T) < lengths[:, None]),
        ref,
        noise(1.0).abs().float(),
    )


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
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "advantages": advantages,
    }
    inputs |= {
        "completion_mask": mask.long(),
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps[rows],
    }
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
    return value_and_gradient(
        lambda logps: grpo_loss(logps, *rest, ref_logps=ref_logps[rows], **settings)[0], logps
    )


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
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "max_completion_length": 6,
    }
    for clip in CLIPS:
        if loss_type == "cispo" and clip["epsilon_high"] is None:
            clip = clip | {
                "epsilon_high": clip["epsilon"]
            }  # what TRL does silently; here it is an error
        trainer = objective_trainer(**settings, **clip)
        for seed, spread in itertools.product(range(3), (0.3, 3.0)):
            batch, ref, entropies = random_batch(seed, spread)
            ours = our_loss(
                batch, ref, beta=beta, use_bias_correction_kl=correction, **settings, **clip
            )
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
        theirs = {
            name: trainer._metrics["train"][name][-1]
            for name in ours
            if not name.startswith("vespo")
        }
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_top_entropy_mask_is_trls(objective_trainer, loss_type):
    settings = {"loss_type": loss_type, "epsilon_high": 0.28, "max_completion_length": 6}
    for seed, q in itertools.product(range(3), (0.2, 0.5)):
        batch, ref, entropies = random_batch(seed)
        keep = entropies >= torch.quantile(entropies[batch[3]], 1 - q)
        ours = our_loss(batch, ref, beta=0.3, token_weights=keep, **settings)
        assert_same(
            ours,
            trl_loss(
                objective_trainer(top_entropy_quantile=q, **settings), batch, ref, entropies, 0.3
            ),
        )


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "bnpo"])
def test_micro_batches_add_up_to_trls_accumulated_loss(objective_trainer, loss_type):
    """All but bnpo, whose token count is the micro-batch's own in TRL: there ours is the same for every split."""
    batch, ref, entropies = random_batch(0)
    settings = {"loss_type": loss_type, "epsilon_high": 0.28, "max_completion_length": 6}
    normalizer = int(batch[3].sum()) if loss_type in ("dapo", "cispo", "vespo") else len(batch[3])
    trainer = objective_trainer(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings
    )
    for rows in (slice(0, 4), slice(4, 8)):
        ours = our_loss(batch, ref, rows, beta=0.3, normalizer=normalizer, **settings)
        assert_same(ours, trl_loss(trainer, batch, ref, entropies, 0.3, rows=rows))


# ------------------------------------------------------------------------------ TRL: the advantages


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
        ours = multi_objective_advantages(
            rewards, torch.tensor(weights), aggregation=aggregation, scale=scale
        )
        assert_same([ours.flatten()], [theirs])


# -------------------------------------------------------------------------------- TRL: the training

TABLE = {  # prompt -> its completions, as token ids; 1 is the EOS
    "w2": [[5, 6, 1], [7, 5, 5, 8, 9, 1], [10, 1], [5, 11, 12, 5, 13, 14]],
    "w3 w4 w2": [[1], [15, 5, 1], [16, 17, 18, 19, 20, 21], [5, 22, 5, 23, 1]],
}
LOGGED = ["loss", "grad_norm", "learning_rate", "reward", "frac_reward_zero_std", "num_tokens"]
LOGGED += [
    f"completions/{f}_{kind}length" for f in ("mean", "min", "max") for kind in ("", "terminated_")
]
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
        prompts = [
            words.decode(ids[mask]) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)
        ]
        ids = torch.tensor(
            [row + [0] * (6 - len(row)) for prompt in prompts for row in TABLE[prompt]]
        )
        return Rollout(
            prompt_ids, prompt_mask, ids, completion_mask(ids, [1]), torch.zeros(ids.shape)
        )

    monkeypatch.setattr("grpo_lora.generate", table_rollout)
    args, rows = (
        GRPOConfig(prompts_per_step=2, **settings),
        [{"prompt": prompt} for prompt in TABLE],
    )
    return GRPOTrainer(model, TABLE_REWARDS, args, rows, None, words, reference).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"loss_type": "grpo", "beta": 0.3, "temperature": 0.7, "delta": 1.5},
        {
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "beta": 0.3,
            "use_bias_correction_kl": False,
        },
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        {
            "loss_type": "cispo",
            "epsilon_high": 1.01,
            "multi_objective_aggregation": "normalize_then_sum",
        },
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "scale_rewards": "batch"},
        {"loss_type": "sapo"},
        {"loss_type": "vespo", "beta": 0.3},
        {
            "loss_type": "dapo",
            "top_entropy_quantile": 0.5,
            "per_device_train_batch_size": 8,
            "num_iterations": 1,
        },
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_training_moves_the_weights_as_trl_with_peft_does(
    trl_trainer, words, monkeypatch, settings
):
    """A batch of 2 prompts, 4 completions each; 2 updates with it, in micro-batches of 4 rows: the same adapter then.

    The adapter is not new (no B is zero), so the reference is the policy at the start, which both have to find out.
    """
    ours, theirs = both(parity_model().double(), r=4, lora_alpha=8, target_modules="all-linear")
    randomise(ours, theirs)
    settings = TRAINING | settings
    trl_settings = {
        "gradient_accumulation_steps": 8 // settings["per_device_train_batch_size"],
        "logging_steps": 1,
    }
    trl_settings |= {
        "shuffle_dataset": False,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
    }
    their_trainer = trl_trainer(
        theirs, TABLE_REWARDS, [{"prompt": p} for p in TABLE], **settings, **trl_settings
    )
    seen = defaultdict(itertools.count)

    def table_samples(prompt_ids, *_):
        prompts = words.batch_decode(prompt_ids)
        return [TABLE[prompt][next(seen[prompt]) % 4] for prompt in prompts], None

    monkeypatch.setattr(their_trainer, "_generate_single_turn", table_samples)
    with double_precision():
        their_trainer.train()
    logs = their_trainer.state.log_history[-1 - settings["num_iterations"] : -1]
    said = our_training(
        ours, words, monkeypatch, settings
    )  # of the last batch: means over its updates
    for key in LOGGED:
        values = [log[key] for log in logs if key in log]
        assert said[key] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-4), key
    theirs = adapter_of(theirs)
    for (
        name,
        p,
    ) in (
        ours.named_parameters()
    ):  # 2e-5 is float32 inside RMSNorm and TRL's head; the weights move by 0.04
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


def test_math_verify_is_trls_accuracy_reward(monkeypatch):
    math_verify = pytest.importorskip("math_verify")
    from trl.rewards import accuracy_reward as theirs

    golds = [r"\frac{1}{3}", "72", r"so it is \boxed{(1,2)}", "no number", "$x^2+2x+1$", "0.5"]
    answers = [r"\boxed{1/3}", r"\boxed{72}", "72", r"\boxed{(1, 2)}", r"\boxed{(x+1)^2}", ""]
    answers += [r"\boxed{\frac{1}{2}}", r"\boxed{50\%}", r"$\frac{2}{6}$", "$x = 72$"]
    answers += [
        r"$71$, or \boxed{72}",
        r"$71$, then $72$",
        r"\boxed{72\text{ cm}}",
        "$72$, or $71$",
    ]
    answers += [r"\boxed{)} or $72$", r"\boxed{1 < x < 2}"]
    golds += ["$x = 72$", r"$72\text{ cm}$", "$1 < x < 2$"]
    pairs = [(answer, gold) for answer in answers for gold in golds]
    chats = [[{"role": "assistant", "content": answer}] for answer, _ in pairs]
    expected = theirs(chats, solution=[gold for _, gold in pairs])
    ours = {"prompts": None, "completions": chats, "answer": [gold for _, gold in pairs]}
    assert rewards.math_verify_reward(**ours) == expected and {0.0, 1.0, None} <= {*expected}
    assert rewards.math_verify_reward(None, [answers[0]], [None]) == [None]
    with ThreadPoolExecutor(1) as thread:  # alarms can only be set in the main one
        assert thread.submit(rewards.math_verify_reward, **ours).result() == expected
    limits = []
    for name, limit in (("parse", "parsing_timeout"), ("verify", "timeout_seconds")):
        original = getattr(math_verify, name)
        spy = lambda *args, f=original, at=limit, **options: (
            limits.append(options.get(at)) or f(*args, **options)
        )
        monkeypatch.setattr(math_verify, name, spy)
    rewards.math_verify_reward(None, answers[:1], golds[:1])
    assert limits == [10, 10, 10]
    # where theirs reads the first number alone, or nothing, of a gold in bare TeX
    bare = [r"2\sqrt{3}", r"10\pi", "9x^2", "[0,1)", r"\pi", r"\{1,2\}", "x^2+1"]
    for gold, wrong in zip(bare, ["2", "10", "9", "(0,1)", "3", r"\{1,3\}", "x^2"], strict=True):
        said = rf"\boxed{{{gold}}}", rf"\boxed{{{wrong}}}"
        assert rewards.math_verify_reward(None, said, [gold] * 2) == [1.0, 0.0], gold


@pytest.mark.parametrize("seed", range(3))
def test_the_off_policy_mask_is_trls(seed):
    trl = pytest.importorskip("trl")
    (logps, old, A, mask), _, _ = random_batch(seed, 0.3)
    sampled = old + 3.0 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
    A = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    theirs = trl.GRPOTrainer.get_off_policy_mask(
        A.unsqueeze(1), logps, sampled, mask.double(), 1e-6
    )
    rollout = SimpleNamespace(completion_mask=mask, logps=sampled)
    part = MicroBatch([], rollout, A)
    settings = {"sampler_correction": "none", "off_policy_mask_threshold": 1e-6}
    trainer = SimpleNamespace(args=SimpleNamespace(**settings))
    ours = GRPOTrainer.token_weights(trainer, part, logps.detach(), old)
    assert torch.equal(ours, theirs.expand_as(ours)) and 0 < ours.mean() < 1


def test_rows_may_be_a_data_set_of_the_datasets_library():
    datasets = pytest.importorskip("datasets")
    t = trainer(rows=datasets.Dataset.from_list(ROWS[:8]), reward=[digits, "accuracy"])
    assert math.isfinite(update(t)["loss"])
    split = datasets.DatasetDict(train=t.train_dataset)
    for rows, kind in [
        (split, "DatasetDict"),
        (t.train_dataset.to_iterable_dataset(), "IterableDataset"),
        (t.train_dataset.to_pandas(), "DataFrame"),
    ]:
        with pytest.raises(ValueError, match=f"the data set is a {kind}: must be rows"):
            trainer(rows=rows)
