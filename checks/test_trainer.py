"""What users bring: a trainer takes all that can work, and refuses the rest in one line.

models, adapters and their files   what cannot be right is refused; what is refused stays as it was
settings and records               bounds, choices, what does not go together; one folder a run
reward functions                   async, silent, failing, logging, changing what they get
prompts and templates              text, chats, tags that a template opens, tokens that are special
"""

import asyncio
import contextlib
import copy
import dataclasses
import gc
import importlib
import inspect
import json
import math
import re
import sys
import textwrap
import time
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

import grpo_lora
import lora
import rewards
from grpo_lora import CausalLM, GRPOConfig, GRPOTrainer, Rollout, encode_prompt, grpo_loss
from lora import (
    LoRAConfig,
    LoRALinear,
    TrainedCopy,
    apply_lora,
    load_lora,
    lora_disabled,
    save_lora,
)
from rewards import REWARDS, RewardError, answers_match
from runner import fast
from test_math import Toy, toy
from test_training import (
    EOS,
    ROWS,
    TOKENIZER,
    VOCAB,
    adapters_of,
    digits,
    gradients,
    lines,
    one_by_one,
    prompts,
    sample,
    tiny_model,
    trainer,
    update,
    with_adapters,
)

# ---------------------------------------------------------------- models, adapters and their files


def test_models_that_cannot_be_right_are_refused():
    empty = tiny_model()
    empty.forward = lambda **kwargs: None
    with pytest.raises(ValueError, match="LlamaForCausalLM calls no LlamaModel"):
        CausalLM(empty).logits(torch.zeros(1, 32))
    for kind in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        with pytest.raises(ValueError, match=f"{kind.__name__} has no head for the next token"):
            CausalLM(kind(tiny_model().config))
    with pytest.raises(ValueError, match="encoder-decoder"):
        CausalLM(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
                )
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


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c, t: t.pop(next(iter(t))), "is missing"),
        (
            lambda c, t: t.update(
                {"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(1)}
            ),
            "layers.9.x",
        ),
        (lambda c, t: c.update(r=5), "another rank"),
        (lambda c, t: c.update(peft_type="IA3"), "IA3"),
        (lambda c, t: c.update(layers_to_transform=[0]), "layers_to_transform"),
        (lambda c, t: c.update(target_parameters=["experts"]), "target_parameters"),
        (lambda c, t: c.update(bias="all"), "bias"),
        (lambda c, t: c.update(target_modules=["nope"]), "no linear layer matches 'nope'"),
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


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_weight_that_peft_writes_for_an_adapted_head_must_be_the_models(tied, tmp_path):
    from safetensors.torch import load_file, save_file

    build = lambda: tiny_model(tie_word_embeddings=tied)
    model = with_adapters(build(), target_modules=["lm_head"])
    save_lora(model, tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    own = load_file(file)
    for weight, fits in ((model.lm_head.base_layer.weight, True), (torch.zeros(VOCAB, 32), False)):
        save_file(own | {key: weight.detach().clone()}, file)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=key):
            loaded = load_lora(build(), tmp_path)
    assert torch.equal(loaded.lm_head.lora_B.weight, model.lm_head.lora_B.weight)


def test_a_name_in_a_file_may_match_no_module_if_another_does(tmp_path):
    model = with_adapters(tiny_model(), target_modules=["q_proj", "v_proj"])
    save_lora(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    more = {"target_modules": ["q_proj", "c_attn", "v_proj"], "rank_pattern": {"k_proj": 3}}
    more |= {"alpha_pattern": {"fc1": 2}, "modules_to_save": ["classifier"]}
    file.write_text(json.dumps(config | more))
    loaded, ids = load_lora(tiny_model(), tmp_path), torch.arange(5, 9).view(1, 4)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="c_attn"):
        apply_lora(tiny_model(), LoRAConfig(target_modules=["q_proj", "c_attn"]))


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    save_lora(with_adapters(tiny_model(), r=2), tmp_path / "right")
    save_lora(with_adapters(tiny_model(hidden_size=16)), tmp_path / "wrong")
    model, (ids, _) = tiny_model(), prompts()
    out, flags = model(ids).logits, [p.requires_grad for p in model.parameters()]
    for refused in (
        lambda: load_lora(model, tmp_path / "wrong"),
        lambda: apply_lora(
            model, LoRAConfig(r=20, init_lora_weights="pissa", rank_pattern={"q_proj": 4})
        ),
    ):
        with pytest.raises(ValueError):
            refused()
        assert torch.equal(model(ids).logits, out) and flags == [
            p.requires_grad for p in model.parameters()
        ]
    load_lora(model, tmp_path / "right")


def test_a_file_says_whether_weights_are_transposed(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    for model, transposed in (
        (with_adapters(tiny_model(), modules_to_save=["lm_head"]), False),
        (with_adapters(tiny_model(config=GPT2Config, **sizes)), True),
    ):
        save_lora(model, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] is transposed


def test_modules_to_save_are_not_adapted_inside():
    model = with_adapters(tiny_model(), modules_to_save=["mlp"])
    assert not [
        name for name, m in model.named_modules() if isinstance(m, LoRALinear) and "mlp" in name
    ]
    attention = with_adapters(tiny_model(), modules_to_save=["self_attn"])  # called by keyword
    assert attention(torch.tensor([[3, 4]])).logits.isfinite().all()
    copies = [name for name, m in model.named_modules() if isinstance(m, TrainedCopy)]
    assert len(copies) == 2 and model.lora_config.modules_to_save == copies


@pytest.mark.parametrize("engine", [None, fast])
@pytest.mark.parametrize("training", [False, True])
def test_layers_computed_again_in_the_backward_pass_are_in_the_mode_of_the_forward(
    engine, training
):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    drops = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.5)
    gradients = []
    for checkpointed in (False, True):  # in neither does the base model's own dropout act
        model = with_adapters(tiny_model(config=GPT2Config, **sizes, **drops)).train(training)
        t = trainer(model, engine=engine, gradient_checkpointing=checkpointed)
        update(t)
        gradients.append(torch.cat([p.grad.flatten() for p in t.params.values()]))
        assert all(module.training == training for module in model.modules())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    model = with_adapters(tiny_model(), lora_dropout=0.5).train(training)
    assert update(trainer(model, engine=engine, gradient_checkpointing=True))["grad_norm"] > 0


def test_a_dropout_rate_that_layers_hold_as_a_number_does_not_act_under_checkpointing():
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4}
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model(config=OPTConfig, num_hidden_layers=2, dropout=0.5, **sizes)
        t = trainer(with_adapters(model), gradient_checkpointing=checkpointed)
        update(t)
        gradients.append(torch.cat([p.grad.flatten() for p in t.params.values()]))
        assert {0.5} <= {getattr(module, "dropout", None) for module in model.modules()}
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("engine", [None, fast])
def test_a_half_precision_base_trains_under_activation_checkpointing(engine):
    model = with_adapters(tiny_model(dtype=torch.bfloat16), random=False)
    t = trainer(model, engine=engine, gradient_checkpointing=True)
    assert update(t)["grad_norm"] > 0


def test_a_state_brings_its_reference_to_a_trainer_of_an_adapter_that_was_trained(tmp_path):
    """The reference of a fresh adapter is the base: no snapshot of the adapter as it was loaded."""
    first = trainer(with_adapters(tiny_model(), random=False), beta=0.5, max_steps=4)
    first.train(until=2)
    save_lora(first.model, tmp_path)
    second = trainer(load_lora(tiny_model(), tmp_path), beta=0.5, max_steps=4)
    second.load_state_dict(first.state_dict())
    last = [t.train() for t in (first, second)]
    assert last[0]["kl"] == last[1]["kl"] > 0
    torch.testing.assert_close(*(adapters_of(t.model) for t in (first, second)), rtol=0, atol=0)


def test_a_mask_with_holes_keeps_what_comes_after_them():
    model = with_adapters(tiny_model())
    rollout = sample(model, *prompts(), eos_token_ids=[])
    rollout.completion_mask[:, 1:3] = False  # what a tool wrote, say
    rollout.completion_mask[:3, -1] = False
    for prompt, T in (
        (0, rollout.completion_ids.shape[1] - 1),
        (1, rollout.completion_ids.shape[1]),
    ):
        part, rows = rollout.select([prompt]), slice(3 * prompt, 3 * prompt + 3)
        assert torch.equal(part.completion_mask, rollout.completion_mask[rows, :T])
        assert torch.equal(part.completion_ids, rollout.completion_ids[rows, :T])


def test_training_bfloat16_parameters_is_warned_of_and_adapters_on_them_are_not():
    with pytest.warns(UserWarning, match="bfloat16 parameters round small updates away"):
        trainer(tiny_model(dtype=torch.bfloat16).requires_grad_(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(with_adapters(tiny_model(dtype=torch.bfloat16), random=False))


class Repacking(nn.Module):
    """A linear layer of another library. Like bitsandbytes' Linear4bit on some CPUs, in eval mode it
    repacks its weight for a product that has no gradient, and never unpacks it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, None, False
        self.in_features, self.out_features = linear.in_features, linear.out_features
        setattr(self, lora.REPACKS, True)

    def forward(self, x):
        wanted = getattr(self, lora.REPACKS) and not self.training and not x.requires_grad
        self.packed = self.packed or wanted
        return nn.functional.linear(x.detach() if self.packed else x, self.weight)


def repacking_model():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = Repacking(layer.mlp.down_proj)
    return model.eval()


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("engine", [grpo_lora, fast])
def test_a_layer_that_would_repack_itself_in_eval_mode_keeps_its_gradient(ours, engine):
    model = repacking_model()
    if ours:
        apply_lora(model, LoRAConfig(target_modules=["up_proj", "down_proj"]))
        adapted = model.model.layers[1].mlp.down_proj
        assert isinstance(adapted, LoRALinear) and not getattr(adapted.base_layer, lora.REPACKS)
    rollout = sample(model, *prompts(), engine=engine)
    logps, _ = engine.completion_logps(model, rollout, temperature=1.0)
    assert gradients(model, logps.sum())
    layers = [m for m in model.modules() if isinstance(m, Repacking)]
    assert len(layers) == 2 and not any(layer.packed for layer in layers)
    assert all(getattr(layer, lora.REPACKS) is not ours for layer in layers)  # as it was, or off


def test_a_layer_that_passes_no_gradient_cannot_be_adapted():
    model = repacking_model()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))  # repacks
    assert model.model.layers[0].mlp.down_proj.packed
    with pytest.raises(ValueError, match="no linear layer matches 'down_proj'"):
        apply_lora(model, LoRAConfig(target_modules=["down_proj"]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["lm_head", "q_proj"]])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_engine_has_the_plain_gradients_with_dropout_and_checkpointing(
    checkpointing, targets, use_dora, monkeypatch
):
    monkeypatch.setattr(fast, "MANY", 1)
    config = {"target_modules": targets, "use_dora": use_dora, "lora_dropout": 0.2}
    model = with_adapters(tiny_model(), **config)
    rollout, found = sample(model, *prompts((3, 6))), []
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for engine in (grpo_lora, fast):
        torch.manual_seed(0)  # the same dropout
        with grpo_lora.evaluating(model, adapter_dropout=True):
            logps, _ = engine.completion_logps(model, rollout, temperature=0.7)
            slope = torch.linspace(-1, 1, logps.numel()).view_as(logps)
            found.append(gradients(model, (logps * slope).sum()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_default_learning_rate_follows_width_alpha_and_method():
    rate = lambda width=32, **config: grpo_lora.default_learning_rate(
        with_adapters(tiny_model(hidden_size=width), random=False, **config)
    )
    assert rate(lora_alpha=32) == pytest.approx(1.25e-4 * (2000 / 32) ** 0.78, rel=0.05)
    assert rate(lora_alpha=8) == pytest.approx(4 * rate(lora_alpha=32), rel=0.05)
    assert rate(r=1) == rate(r=16)  # s = α/r: the rank cancels
    assert rate(r=16, use_rslora=True) == pytest.approx(rate(r=4, use_rslora=True) / 2, rel=0.05)
    assert rate(width=64) == pytest.approx(rate(width=32) / 2**0.78, rel=0.05)
    assert grpo_lora.default_learning_rate(tiny_model()) == pytest.approx(
        rate(lora_alpha=32) / 10, rel=0.05
    )
    half = tiny_model()  # trained without adapters of ours: as peft's, if it is less than half
    for name, p in half.named_parameters():
        p.requires_grad_("layers.0" in name)
    few = sum(p.numel() for p in half.parameters() if p.requires_grad)
    assert few * 3 > sum(p.numel() for p in half.parameters()) > few * 2
    for width in (32, 64, 96, 160):
        half.config.hidden_size = width
        assert grpo_lora.default_learning_rate(half) == rate(width=width, lora_alpha=32)
    t = trainer(learning_rate=None)
    assert t.args.learning_rate == t.optimizer.param_groups[0]["lr"] == rate()
    model = tiny_model(config=GPT2Config, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    names = {ours: own for ours, own in model.config.attribute_map.items() if own != "n_embd"}
    model.config.attribute_map = names  # its width has another name
    with pytest.raises(ValueError, match="learning_rate: give one"):
        grpo_lora.default_learning_rate(model)


def test_a_token_of_a_probability_that_float32_cannot_add_has_its_share():
    log_probs = torch.tensor([[0.5, 1e-9, 0.5]]).log()
    p = log_probs.exp().double()
    middle = (p[0, 0] + p[0, 1] / 2) / p.sum()
    assert grpo_lora.draw_tokens(log_probs, middle.unsqueeze(0)).tolist() == [1]


def test_tokens_are_drawn_in_float32_where_there_is_no_float64(monkeypatch):
    assert grpo_lora.widest(torch.device("mps")) == torch.float32
    assert grpo_lora.widest(torch.device("cpu")) == torch.float64
    asked = []
    monkeypatch.setattr(grpo_lora, "widest", lambda device: asked.append(device) or torch.float32)
    model, (ids, mask) = tiny_model(), prompts()
    rollout = sample(model, ids, mask)
    assert asked and rollout.completion_mask.any()
    assert torch.allclose(rollout.logps, one_by_one(model, rollout).float(), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["q_proj"]}, ["q_proj", "mix, out, up"]),
        ({"target_modules": "layers.*"}, ["layers", "up"]),
        ({"target_modules": ["up", "nope"]}, ["nope"]),
        ({"target_modules": ["embed"]}, ["embed", "no linear layer"]),
        ({"target_modules": []}, ["no linear layer", "mix, out, up"]),
        ({"target_modules": None}, ["no linear layer", "mix, out, up"]),
        ({"rank_pattern": {"(?i)up": 4}}, ["'(?i)up'", "not a regular expression"]),
        ({"modules_to_save": ["score"]}, ["modules_to_save", "score", "out"]),
        ({"rank_pattern": {"gate": 4}}, ["gate"]),
        ({"r": 9, "init_lora_weights": "pissa"}, ["up", "r = 9", "PiSSA"]),
        ({"r": 0}, ["r = 0"]),
        ({"r": 2.5}, ["r = 2.5"]),
        ({"rank_pattern": {"up": -1}}, ["rank_pattern", "-1"]),
        ({"rank_pattern": ["up"]}, ["rank_pattern", "must map"]),
        ({"lora_alpha": "8"}, ["lora_alpha", "'8'"]),
        ({"lora_alpha": 0}, ["lora_alpha = 0"]),
        ({"alpha_pattern": {"up": math.inf}}, ["alpha_pattern", "'up'] = inf"]),
        ({"target_modules": "up("}, ["'up('", "not a regular expression"]),
        ({"lora_dropout": 1.0}, ["lora_dropout = 1.0", "below 1"]),
        ({"lora_dropout": -0.1}, ["lora_dropout = -0.1", "at least 0"]),
        ({"r": True}, ["r = True", "whole"]),
        ({"bias": "all"}, ["bias", "modules_to_save"]),
        ({"init_lora_weights": "olora"}, ["olora", "pissa"]),
    ],
)
def test_a_lora_config_that_cannot_work_is_refused_in_one_line_that_says_what_would(config, words):
    with pytest.raises(ValueError) as refusal:
        apply_lora(Toy(), LoRAConfig(**config))
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


def test_a_refused_target_hears_of_the_names_that_would_do_and_of_no_other_reason():
    layers = {"fc1": nn.Linear(4, 3), "head": nn.Linear(3, 2), "0": nn.Linear(2, 2)}
    config = LoRAConfig(target_modules=["nope"], modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"no linear layer matches 'nope'; there are fc1$"):
        apply_lora(nn.ModuleDict(layers), config)
    bare = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="no linear layer"):
        apply_lora(bare, LoRAConfig())
    assert bare.weight.requires_grad  # a model that is refused is left as it was


@pytest.mark.parametrize(
    ("output", "adapted"),
    [
        (lambda layer, x: nn.functional.linear(x, layer.weight), True),
        (lambda layer, x: nn.functional.linear(x, layer.weight) + 0.5, False),
        (lambda layer, x: nn.functional.linear(x, layer.weight) * 1.5, False),
        (lambda layer, x: (nn.functional.linear(x, layer.weight), None), False),
        (lambda layer, x: layer.no_such_thing, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_of_linear_is_adapted_where_it_acts_as_one(output, adapted, dtype):
    RoutedLinear = type("RoutedLinear", (nn.Linear,), {"forward": output})
    routed = RoutedLinear(4, 3, bias=False, dtype=dtype)
    nn.init.constant_(routed.weight, 0.25)
    model = nn.ModuleDict({"routed": routed, "plain": nn.Linear(4, 3)})
    if not adapted:
        with pytest.raises(ValueError, match=r"no linear layer \(RoutedLinear cannot be adapted\)"):
            apply_lora(model, LoRAConfig(target_modules=["routed"]))
    apply_lora(model, LoRAConfig(r=1))
    assert isinstance(model["routed"], LoRALinear) == adapted and isinstance(
        model["plain"], LoRALinear
    )


def test_the_sections_that_the_readme_names_can_be_copied_by_themselves():
    source = inspect.getsource(grpo_lora)
    head, *parts = re.split(r"^# -+ (.+)$", source, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    imports = re.sub(r"^from (lora|rewards) import.*$", "", head, flags=re.MULTILINE)
    imports += "from collections.abc import Iterable"  # of check_choice
    copy_of = lambda *texts: exec("\n".join([imports, *texts]), made := {}) or made

    mine = copy_of(inspect.getsource(lora.check_choice), sections["the objective"])
    A = mine["multi_objective_advantages"](
        torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 3.0]]]), torch.ones(2),
        aggregation="normalize_then_sum",
    )  # fmt: skip
    logps, ours = torch.randn(3, 2), mine["grpo_loss"]
    options = {"loss_type": "gmpo", "ref_logps": logps * 0.9, "beta": 0.1}
    options["importance_sampling_level"] = "sequence"
    losses = [f(logps, logps * 1.1, A[0], logps < 0, **options)[0] for f in (ours, grpo_loss)]
    assert torch.equal(*losses)

    names = list(sections)
    several = names[names.index("rollout") : names.index("the model, seen as two parts") + 1]
    others = Rollout, grpo_lora.completion_mask, grpo_lora.evaluating
    needed = [inspect.getsource(one) for one in others]
    mine, model = copy_of(*needed, *(sections[name] for name in several)), tiny_model()
    rollout = sample(model, *prompts(), engine=types.SimpleNamespace(**mine))
    whole = sample(model, *prompts())
    assert torch.equal(rollout.completion_ids, whole.completion_ids)
    logps, _ = mine["completion_logps"](model, rollout, temperature=1.0)
    assert torch.equal(logps, grpo_lora.completion_logps(model, whole, temperature=1.0)[0])


def test_a_small_alpha_and_a_rank_of_one_will_do():
    model, base, ids = toy(LoRAConfig(r=1, lora_alpha=0.5))
    assert model.up.lora_A.weight.shape == (1, 6) and not torch.equal(model(ids), base(ids))
    adapted = apply_lora(Toy(), LoRAConfig(rank_pattern={"up": 1}, alpha_pattern={"up": 0.5}))
    assert adapted.up.scaling == 0.5 and adapted.up.lora_A.out_features == 1


def test_a_saved_module_that_is_off_shows_the_originals_attributes():
    """Mamba's mixers read conv1d.weight, and do not call the module."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "state_size": 4,
        "expand": 1,
        "num_heads": 4,
    }
    config = {"config": transformers.Mamba2Config, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    model, ids = tiny_model(**config | sizes), torch.arange(3, 11).view(1, 8)
    with torch.no_grad():
        before = model(ids).logits
        apply_lora(model, LoRAConfig(target_modules=["in_proj"], modules_to_save=["conv1d"]))
        model.backbone.layers[0].mixer.conv1d.trained.weight += 1
        assert not torch.equal(model(ids).logits, before)
        with lora_disabled(model):
            assert torch.equal(model(ids).logits, before)


def test_an_encoder_of_bert_generation_is_refused_and_its_decoder_taken():
    config = {"config": transformers.BertGenerationConfig, "intermediate_size": 48}
    with pytest.raises(ValueError, match="is an encoder, whose tokens see later ones"):
        CausalLM(tiny_model(**config))
    CausalLM(tiny_model(**config, is_decoder=True))


def test_settings_may_be_numbers_of_numpy(tmp_path):
    numpy = pytest.importorskip("numpy")
    settings = {
        "r": numpy.int64(2),
        "lora_alpha": numpy.float32(4),
        "lora_dropout": numpy.float64(0),
    }
    save_lora(with_adapters(tiny_model(), **settings), tmp_path)
    assert load_lora(tiny_model(), tmp_path).lora_config.r == 2


def test_a_model_of_peft_gets_no_second_adapter():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    for targets in ("all-linear", ["v_proj"]):
        with pytest.raises(ValueError, match="already carries a LoRA adapter"):
            apply_lora(model, LoRAConfig(target_modules=targets))


# ---------------------------------------------------------------------------- settings and records


PROSE = "Natalia sold 24 clips in May. Altogether she sold 72 clips in April and May."


@pytest.mark.parametrize("engine", [None, fast])
def test_a_model_goes_with_its_trainer(engine):
    gc.collect()
    gc.disable()  # memory is freed at once, or not until garbage is collected
    try:
        t = trainer(engine=engine)
        t.train()
        model = weakref.ref(t.model)
        del t
        assert model() is None
    finally:
        gc.enable()


def test_a_state_is_a_copy_and_fits_its_trainer_alone():
    first, second = trainer(max_steps=4), trainer(max_steps=4)
    numbers = lambda state: (state["step"], state["trainable"], state["optimizer"]["state"])
    same = lambda a, b: torch.testing.assert_close(numbers(a), numbers(b), rtol=0, atol=0)
    first.train(2)
    state = first.state_dict()
    second.load_state_dict(state)
    kept = copy.deepcopy(state)
    for t in (first, second):  # neither moves the other, or the state
        t.train(3)
    same(first.state_dict(), second.state_dict())
    same(state, kept)
    first.load_state_dict(state)
    same(first.state_dict(), kept)
    first.train(3)
    same(first.state_dict(), second.state_dict())
    wide = trainer(with_adapters(tiny_model(), r=3))
    with pytest.raises(RuntimeError, match="shape"):
        trainer(with_adapters(tiny_model(), r=1)).load_state_dict(wide.state_dict())
    narrow = trainer(with_adapters(tiny_model(), r=1)).state_dict()
    with pytest.raises(RuntimeError, match="shape"):
        wide.load_state_dict(narrow)


def test_a_setting_of_the_loss_may_change_between_updates():
    changed, constant = trainer(num_iterations=1), trainer(loss_type="grpo", beta=0.5)
    assert changed.objective()["beta"] == 0
    changed.args.loss_type, changed.args.beta = "grpo", 0.5
    for name in ("loss", "grad_norm", "kl"):
        assert update(changed)[name] == pytest.approx(update(constant)[name], nan_ok=True)


def test_float16_parameters_are_not_trained():
    with pytest.raises(ValueError, match="float16 parameters cannot be trained: load them as"):
        trainer(tiny_model(dtype=torch.float16))


def test_groups_of_equal_rewards_are_counted_by_their_rewards():
    below = lambda completion_ids, **_: [-1.0 - len(set(ids)) for ids in completion_ids]
    metrics = update(trainer(reward=below, scale_rewards="mean"))
    assert metrics["reward_std"] > 0 and metrics["frac_reward_zero_std"] < 1
    same = lambda completions, **_: [-1.0 for _ in completions]
    assert update(trainer(reward=same, scale_rewards="mean"))["frac_reward_zero_std"] == 1


def test_the_readme_s_recipe_adds_an_objective(tmp_path, monkeypatch):
    here = Path(grpo_lora.__file__)
    readme = here.with_name("README.md").read_text(encoding="utf-8")
    code = readme.partition("**A new objective**")[2].split("```")[1]
    aggregation, branch = code.removeprefix("python\n").split("\n\n")
    source = here.read_text(encoding="utf-8")
    after = "AGGREGATION = {.*\n", "    elif loss_type == .opmd.:\n.*\n"
    for line, added in zip(after, (aggregation, branch), strict=True):
        added = textwrap.indent(added + "\n", "    ")
        source, times = re.subn(line, lambda found, added=added: found[0] + added, source)
        assert times == 1, line
    (tmp_path / "with_mine.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("with_mine")
    del sys.modules["with_mine"]

    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    old, A, mask = torch.full((2, 2), -1.5), torch.tensor([1.0, -2.0]), torch.ones(2, 2).bool()
    loss, _ = mine.grpo_loss(logps, old, A, mask, loss_type="mine")
    loss.backward()
    weighted = -A[:, None] * (logps.detach() - old).exp()
    torch.testing.assert_close(loss.detach(), weighted.mean())
    torch.testing.assert_close(logps.grad, weighted / 4)
    assert mine.GRPOConfig(loss_type="mine").loss_type == "mine"


def test_a_module_that_only_holds_dropouts_drops_nothing():
    model = with_adapters(tiny_model())
    model.add_module("lora_dropout", nn.ModuleDict())  # as peft has it
    assert trainer(model, num_iterations=2).args.num_iterations == 2


def test_a_line_of_json_has_null_for_what_json_lacks_and_text_for_what_else():
    value = {"a": math.nan, "b": [-math.inf, 1.5], "c": torch.device("cpu")}
    assert grpo_lora.to_json(value) == '{"a": null, "b": [null, 1.5], "c": "cpu"}'


def test_a_trainer_that_cannot_work_says_so(monkeypatch):
    def of_three():
        with monkeypatch.context() as patch:
            patch.setattr(grpo_lora, "rank_and_world", lambda: (0, 3))
            trainer()

    for words, make in [
        ("no trainable parameter", lambda: trainer(tiny_model().requires_grad_(False))),
        (
            "lora_dropout",
            lambda: trainer(with_adapters(tiny_model(), lora_dropout=0.1), num_iterations=2),
        ),
        ("reward_weights", lambda: trainer(reward_weights=[1.0, 2.0])),
        ("reward_weights: 0.5: 1 finite", lambda: trainer(reward_weights=0.5)),
        ("reward_weights: .nan.: 1 finite", lambda: trainer(reward_weights=[math.nan])),
        (
            "the model comes from no folder; pass its tokenizer",
            lambda: GRPOTrainer(with_adapters(tiny_model()), digits, GRPOConfig(), ROWS),
        ),
        (
            "no completion could end",
            lambda: GRPOTrainer(
                with_adapters(tiny_model(eos_token_id=None)),
                digits,
                GRPOConfig(),
                ROWS,
                processing_class=types.SimpleNamespace(eos_token_id=None),
            ),
        ),
        ("output_dir: a record needs a folder", lambda: grpo_lora.Record().begin(trainer())),
        ("prompts_per_step = 4: must be a multiple of the 3 processes", of_three),
        ("at least one reward", lambda: trainer(reward=[])),
        ("row 1: 'prompt'", lambda: trainer(rows=[ROWS[0], {"answer": "3"}])),
        (
            "row 0: reward accuracy_reward: missing a required.*'answer'",
            lambda: trainer(reward="accuracy", rows=[{"prompt": "1"}]),
        ),
        (
            "row 0: the prompt has 80 tokens; 1 to 56 fit",
            lambda: trainer(rows=[{"prompt": "1+" * 40}]),
        ),
        ("data set is empty", lambda: trainer(rows=[])),
        (
            "row 0: 'prompt' is missing .*the row has question, answer",
            lambda: trainer(rows=[{"question": "1", "answer": "#### 1"}]),
        ),
        (
            "row 0: column 'tools' has a meaning in TRL",
            lambda: trainer(rows=[ROWS[0] | {"tools": 1}]),
        ),
        ("data set is a dict: must be rows", lambda: trainer(rows={"train": ROWS})),
        ("data set is a generator: must be rows", lambda: trainer(rows=iter(r for r in ROWS))),
        (
            "model: load it: .*'some/model'",
            lambda: GRPOTrainer("some/model", digits, GRPOConfig(), ROWS),
        ),
        (
            "row 0: token 10 is beyond the model's 10 embeddings",
            lambda: trainer(
                with_adapters(tiny_model(vocab_size=10)),
                rows=[{"prompt": [{"role": "user", "content": "1"}]}],
            ),
        ),
        (
            "row 1: no completion can match the gold answer Natalia sold.*give the answer alone",
            lambda: trainer(reward="accuracy", rows=[ROWS[0], {"prompt": "1", "answer": PROSE}]),
        ),
        (
            "row 0: no completion can match the gold answer .*1.*2.*: give",
            lambda: trainer(reward="accuracy", rows=[{"prompt": "1", "answer": ["1", "2"]}]),
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    title = "The Lord of the Rings: The Fellowship of the Ring"  # long, and can be matched
    for answer in (title, "It is so. The answer is five"):  # or seven words
        trainer(reward="accuracy", rows=[{"prompt": "1", "answer": answer}])
    assert rewards.accuracy_reward(None, [rf"\boxed{{{title}}}"], [title]) == [1.0]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"max_steps": "9"}, "max_steps = '9': must be a whole number at least 0"),
        ({"prompts_per_step": 2.0}, "prompts_per_step = 2.0: must be a whole number"),
        ({"max_steps": -1}, "max_steps = -1: must be a whole number at least 0"),
        ({"temperature": 0.0}, "temperature = 0.0: must be a finite number above 0"),
        ({"seed": 2**32}, "seed = 4294967296: must be a whole number at least 0 and at most 42"),
        (
            {"top_entropy_quantile": 1.5},
            "top_entropy_quantile = 1.5: must be a finite number above 0 and at most 1",
        ),
        ({"num_generations": 1}, "an advantage compares completions of one prompt"),
        ({"loss_type": "dapoo"}, "loss_type: 'dapoo' is unknown, did you mean 'dapo'"),
        ({"merge_half_precision": True}, "merge_half_precision: needs sampler_correction"),
        ({"epsilon": 1.5}, "epsilon = 1.5: at most 1"),
        ({"loss_type": "cispo"}, "epsilon_high: cispo needs its cap on the ratio"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta: has no meaning with loss_type 'sapo'"),
        ({"scale_rewards": "grup"}, "scale_rewards: 'grup' is unknown"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type: 'step' is unknown"),
        ({"sampler_correction": "tis"}, "sampler_correction: 'tis' is unknown"),
        ({"kl_estimator": "k4"}, "kl_estimator: 'k4' is unknown"),
        ({"max_steps": 3, "num_iterations": 2}, "max_steps: not a multiple of num_iterations = 2"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation: 'sum' is unknown"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level: 'row' is unknown"),
        (
            {"use_bias_correction_kl": "false"},
            "use_bias_correction_kl: 'false' is unknown, did you mean 'False'",
        ),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        GRPOConfig(**setting)


def test_a_marked_gold_answer_may_have_many_words():
    fruit = ", ".join(["apple", "banana", "cherry", "date"] * 4)
    with pytest.raises(ValueError, match="no completion can match the gold answer apple, banana"):
        rewards.check_row(rewards.accuracy_reward, {"prompt": "", "answer": fruit})
    for marked in (f"\\boxed{{{fruit}}}", f"#### {fruit}"):
        rewards.check_row(rewards.accuracy_reward, {"prompt": "", "answer": marked})
        assert rewards.accuracy_reward(None, [marked], [marked]) == [1.0]


def test_a_gold_answer_may_be_an_array_of_one_and_not_of_two():
    import numpy

    score = lambda gold: rewards.accuracy_reward(None, ["#### 5"], [gold])
    for gold in (numpy.array(["5"]), numpy.array([5]), torch.tensor(5), numpy.int64(5)):
        rewards.check_row(rewards.accuracy_reward, {"prompt": "", "answer": gold})
        assert score(gold) == [1.0]
    for gold in (numpy.array(["5", "6"]), b"5", {"5"}):
        with pytest.raises(ValueError, match="no completion can match the gold answer"):
            rewards.check_row(rewards.accuracy_reward, {"prompt": "", "answer": gold})


def test_a_reward_may_log_by_trls_names_of_the_arguments():
    def logs(completions, log_metric, log_extra, **columns):
        log_metric(name="mean_len", value=3.0)
        log_extra(column="n", values=[torch.tensor(0.5)] * len(completions))
        return [0.0] * len(completions)

    t = trainer(reward=logs, max_steps=1)
    assert t.train()["mean_len"] == 3.0
    assert json.loads(grpo_lora.to_json(t.samples[0]))["n"] == 0.5


def test_an_evaluation_s_samples_are_known_as_such_whatever_a_reward_logs(tmp_path):
    def logs(completions, log_extra, **columns):
        log_extra("split", ["train"] * len(completions))
        return [0.0] * len(completions)

    t = trainer(reward=logs, max_steps=1, eval_rows=ROWS[:2])
    t.evaluate()
    assert {sample["split"] for sample in t.eval_samples} == {"eval"}


@pytest.mark.parametrize("engine", [grpo_lora, fast])
@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 0, 0, 0], []])
def test_prompts_that_are_not_padded_on_the_left_are_refused(mask, engine):
    mask = torch.tensor([[1] * len(mask), mask])
    with pytest.raises(ValueError, match="prompt_mask: a prompt is empty, or not padded on the le"):
        sample(tiny_model(), mask + 5, mask, engine=engine)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_sampled_and_scored_uncompiled(in_place):
    model, (ids, mask) = with_adapters(tiny_model()), prompts()
    plain = sample(model, ids, mask)
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    for engine in (grpo_lora, fast):
        rollout = sample(model, ids, mask, engine=engine)
        assert torch.equal(rollout.completion_ids, plain.completion_ids)
        logps, _ = engine.completion_logps(model, rollout, temperature=0.7)
        torch.testing.assert_close(logps, rollout.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_the_adapter_of_a_compiled_model_is_saved_by_its_own_names(compiled_first, tmp_path):
    model = tiny_model()
    if compiled_first:
        model = torch.compile(model, backend="eager")
    model = with_adapters(model)
    if not compiled_first:
        model = torch.compile(model, backend="eager")
    lora.save_lora(model, tmp_path)
    again = lora.load_lora(tiny_model(), tmp_path)
    ids = torch.arange(5, 12).unsqueeze(0)
    assert torch.equal(again(ids).logits, getattr(model, "_orig_mod", model)(ids).logits)
    assert (again(ids).logits - tiny_model()(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["roberta", "camembert", "data2vec-text"])
def test_a_decoder_whose_positions_have_an_offset_counts_them_itself(name):
    config = transformers.AutoConfig.for_model(
        name, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, is_decoder=True, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, (ids, mask) = AutoModelForCausalLM.from_config(config).eval(), prompts()
    ids = ids.masked_fill(ids < 2, 5)
    for engine in (grpo_lora, fast):
        rollout = sample(model, ids, mask, engine=engine, eos_token_ids=[])
        for i, logps in enumerate(rollout.logps):
            prompt, completion = ids[i // 3][mask[i // 3]], rollout.completion_ids[i]
            whole = torch.cat([prompt, completion]).unsqueeze(0)
            log_probs = (model(whole, use_cache=False).logits[0] / 0.7).log_softmax(dim=-1)
            own = log_probs[len(prompt) - 1 : -1].gather(1, completion.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(logps, own, atol=1e-5, rtol=1e-5)


def test_what_is_no_function_is_refused_before_anything_is_sampled():
    class Callback(transformers.TrainerCallback):
        pass

    words = "rewards and callbacks must be plain functions here"
    for wrong in (
        {"callbacks": [Callback()]},
        {"reward": tiny_model()},
        {"reward": [digits, None]},
    ):
        with pytest.raises(ValueError, match=words):
            trainer(**wrong)
    for args in (None, types.SimpleNamespace(max_steps=1)):
        with pytest.raises(ValueError, match=r"args: must be grpo_lora.GRPOConfig, not "):
            GRPOTrainer(with_adapters(tiny_model()), digits, args, ROWS, None, TOKENIZER)


@pytest.mark.parametrize("engine", [grpo_lora, fast])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_sampling_without_a_temperature_is_refused(temperature, engine):
    words = "temperature = .*: must be above 0"
    with pytest.raises(ValueError, match=words):
        sample(tiny_model(), *prompts(), temperature=temperature, engine=engine)


def test_a_gold_answer_in_prose_is_refused_and_a_long_title_is_not():
    check = lambda gold: rewards.check_row(rewards.accuracy_reward, {"prompt": "", "answer": gold})
    words = "one two three four. Five six seven eight".split()
    for right, wrong in ((words[:7], words), (["word"] * 15, ["word"] * 16)):
        check(" ".join(right))
        with pytest.raises(ValueError, match="no completion can match the gold answer"):
            check(" ".join(wrong))


def test_a_reward_that_nothing_goes_by_is_refused_with_all_that_there_are():
    with pytest.raises(ValueError, match=r"rewards: 'acuracy' is unknown \(all: accuracy, math_v"):
        rewards.reward_function("acuracy")
    assert rewards.reward_function("accuracy_reward") is rewards.accuracy_reward


def test_a_trainer_takes_over_the_reference_of_another():
    one, other = (trainer(with_adapters(tiny_model(), seed=seed), beta=0.1) for seed in (1, 2))
    other.load_state_dict(one.state_dict())
    for name, tensor in one.reference.tensors.items():
        assert torch.equal(tensor, other.reference.tensors[name])


def test_what_is_reported_of_an_update_by_hand():
    tenth = lambda completions, **columns: [None, 0.1, 0.3, 0.2] * (len(completions) // 4)
    t = trainer(reward=tenth, loss_type="luspo", per_device_train_batch_size=4)
    t.train(until=1)
    metrics = t.train()
    assert metrics["step"] == 2 and metrics["epoch"] == 2 * 4 / len(ROWS)
    assert 0 < metrics["step_time"] < 600
    assert metrics["reward"] == pytest.approx(0.2, abs=1e-12)
    # the group's mean is 0.2, its std 0.1: what has no reward has no advantage, and counts nowhere
    A = [sample["advantage"] for sample in t.samples[:4]]
    assert [0.0, *(pytest.approx(x / (0.1 + 1e-4), abs=1e-9) for x in (-0.1, 0.1, 0.0))] == A
    assert len(t.last_batch[1]) == 4  # one group at a time
    assert [sample["group"] for sample in t.samples] == [i // 4 for i in range(16)]
    ended = [sample["length"] for sample in t.samples if sample["ended"]]
    assert metrics["completions/clipped_ratio"] == 1 - len(ended) / 16 and 0 < len(ended) < 16
    mean = sum(ended) / len(ended)
    assert metrics["completions/mean_terminated_length"] == pytest.approx(mean, rel=1e-6)
    t = trainer()
    t.eos_token_ids = [VOCAB + 1]  # nothing ends
    metrics = update(t)
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/max_terminated_length"] == 0
    t = trainer()
    lengths = [s["prompt_length"] + s["length"] for _ in (0, 1) for s in (update(t), t.samples)[1]]
    assert t.tokens == sum(lengths)
    with pytest.raises(ValueError, match="evaluate needs an eval_dataset"):
        t.evaluate()


def test_the_scale_of_the_loss_changes_no_bit_of_the_gradient(monkeypatch):
    seen = []
    for log2 in (math.log2, lambda x: 0.0, lambda x: 9.0):
        monkeypatch.setattr(grpo_lora.math, "log2", log2)
        t = trainer(with_adapters(tiny_model()))
        update(t)
        seen.append([p.grad for p in t.params.values()])
    assert all(map(torch.equal, seen[0], seen[1])) and all(map(torch.equal, seen[0], seen[2]))


def test_each_batch_has_a_seed_of_its_own_and_each_process_its_own_rows():
    t, seeds = trainer(), set()
    for index in range(200):
        t.seed("update", index)
        seeds.add((torch.initial_seed(), t.generator.initial_seed()))
    assert len({a for a, _ in seeds}) == len({b for _, b in seeds}) == 200
    t.world, shares = 3, []
    for t.rank in range(3):
        shares.append(t.share([1, 2, 3, 4]))
    assert shares == [[1, 2], [3, 4], [4, 4]]


def test_no_number_below_its_bound_is_taken():
    GRPOConfig(epsilon=1.0, seed=2**32 - 1)
    above_0 = "eval_steps temperature epsilon_high delta sapo_temperature_pos sapo_temperature_neg"
    above_0 += " opmd_tau top_entropy_quantile sampler_correction_clip_max max_grad_norm"
    above_0 += " off_policy_mask_threshold modules_to_save_learning_rate"
    least_1 = "prompts_per_step per_device_train_batch_size max_completion_length num_iterations"
    numbers = {int, float, int | None, float | None}
    for field in dataclasses.fields(GRPOConfig):
        if field.type in numbers and field.name != "seed":
            refused = [-1, 0] if field.name in f"{above_0} {least_1}".split() else [-1]
            for value in refused:
                with pytest.raises(
                    ValueError, match=f"{field.name} = {value}: must be a (finite|whole) number"
                ):
                    GRPOConfig(**{field.name: value})
            if field.name in least_1.split():
                GRPOConfig(**{field.name: 1})
            elif field.type in (float, float | None):
                GRPOConfig(**{field.name: 0.01})


def test_a_ratio_of_sequences_weighed_by_their_length_is_pointed_out():
    for loss_type in ("dapo", "bnpo", "dr_grpo", "cispo"):
        with pytest.warns(UserWarning, match=f"{loss_type}' weighs a row by its length"):
            GRPOConfig(loss_type=loss_type, importance_sampling_level="sequence", epsilon_high=1.0)
    for loss_type in ("vespo", "gmpo", "opmd"):
        with pytest.warns(UserWarning, match=f"{loss_type}' acts in the KL alone"):
            GRPOConfig(loss_type=loss_type, importance_sampling_level="sequence")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPOConfig(loss_type="grpo", importance_sampling_level="sequence")


def test_a_record_is_of_one_run_and_one_share_of_groups_is_dead(tmp_path):
    only_first = lambda prompts, completions, **_: [
        float(prompt == prompts[0]) * len(completion[0]["content"])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    t = trainer(reward=only_first, output_dir=str(tmp_path / "a" / "run"), max_steps=1)
    assert t.train()["frac_reward_zero_std"] == 0.75
    assert (tmp_path / "a/run/completions.jsonl").read_text().count("\n") == 8
    with pytest.raises(ValueError, match=r"output_dir: .*run holds another run; name a new"):
        trainer(output_dir=str(tmp_path / "a" / "run")).train()
    weights = [0.1, 0.7]
    assert trainer(reward=[digits] * 2, reward_weights=weights).reward_weights.tolist() == weights
    rollout = sample(t.model, *prompts(), eos_token_ids=range(0, VOCAB, 3))
    masks = torch.tensor([[True] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
    three = Rollout(masks.long(), masks, masks.long(), masks, masks.float())
    assert three.select([2, 1]).prompt_ids.tolist() == [[1, 1, 1], [0, 1, 1]]
    for p in (0, 1):
        part = rollout.select([p])
        assert part.completion_ids.shape[1] == part.completion_mask.sum(dim=1).max()


# -------------------------------------------------------------------------------- reward functions


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        # a number in words, shortened or foreign, is no unit
        ("5 m dollars", "5", False), ("5 bn dollars", "5", False), ("5 M people", "5", False),
        ("5 mil dollars", "5", False), ("$5 MM", "5", False), ("5 milliards", "5", False),
        ("5 millones", "5", False), ("5 gross pencils", "5", False), ("50 basis points", "50", False),
        ("5 square roots", "5", False), ("0.3 repeats", "0.3", False), ("5 grand dollars", "5", False),
        ("11 binary digits", "11", False), ("0.3 recurring digits", "0.3", False),
        ("5 miles", "5", True), ("5 mm", "5", True), (r"5 \mathrm{~cm}", "5", True),
        # a set that is not listed in full is not sorted
        (r"\{0,-1,-2,\ldots\}", r"\{-2,-1,0,\ldots\}", False), (r"\{1,2,...\}", r"\{2,1,...\}", False),
        (r"\{x:x>1,y\}", r"\{y,x:x>1\}", False),
        # a name before the number keeps no currency from being seen, and a relation is no name
        ("x = $5", "x = €5", False), ("x = 5$", "x = 5€", False), ("x = $5", "x = 5", True),
        (r"\not= 5", "5", False), (r"\le= 5", "5", False), (r"\lambda = 5", "5", True),
        # case is lost by choices and words alone
        ("Γ", "γ", False), ("N", "n", False), ("x = N", "x = n", False), (r"\mathbf{R}", "r", False),
        (r"\sqrt{ABCD}", r"\sqrt{abcd}", False), ("Maße", "Masse", False), ("J", "j", True),
        # digits in groups are no mixed number; what cannot be seen may mean something
        ("1 200/300", "5/3", False), ("1\u20632", "12", False), ("2\u20623", "23", False),
        ("\u200b1\u200b2\ufeff", "12", True),
        (r"\displaystyle\frac12", "1/2", True), ("50 percent", "50%", True),
        (r"50\text{ percent}", r"50\%", True),
        # of \frac the numerator may have three digits
        (r"3\frac{141}{1000}", "3.141", True), ("1 123/200", "323/200", False),
        # e and i are constants, and choices elsewhere
        ("e", "E", False), ("i", "I", False), ("d", "D", True),
        # numbers of another base
        ("(1e1)_{16}", "(10)_{16}", False), (r"\overline{1e1}", r"\overline{10}", False),
        # numerals, and variables before a unit
        ("5 mln rubles", "5", False), ("5 mio euros", "5", False), ("5 thou dollars", "5", False),
        ("11 octal digits", "11", False), ("3 x cm", "3", False), ("12 h hours", "12", False),
    ],
)  # fmt: skip
def test_answers_that_look_alike(left, right, same):
    assert answers_match(left, right) == answers_match(right, left) == same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed 2 \pi", None), (r"\boxed 5 million", None), (r"\boxed 3 + 4", None),
        (r"\boxed 50 \%", None), (r"\boxed 3, 5", None), (r"so \boxed 5.", "5"),
        ("so \\boxed 5\nand", "5"), (r"$\boxed 5$ is", "5"), (r"\boxed 5. Then", "5"),
        (r"\boxed{5} \boxed{$$}", "5"), ("##### 5", None), ("#### 5\n##### 6", "5"),
    ],
)  # fmt: skip
def test_an_answer_is_read_whole_or_not_at_all(text, answer):
    assert rewards.extract_answer(text) == answer


@pytest.mark.parametrize("scores", [{0: 1.0, 1: 0.0}, "10"])
def test_the_keys_of_a_dict_and_the_letters_of_a_text_are_no_scores(scores):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(RewardError, match=r"TypeError: float|gave 1 values for 2 rows"):
        rewards.call_rewards([lambda **_: scores], rows, ["a", "b"], [[1], [2]])


def test_async_rewards_keep_one_event_loop():
    """A client, lock or semaphore belongs to the loop in which it is first waited for."""
    one_at_a_time = asyncio.Semaphore(1)

    async def patient(completions, **columns):
        async def score(text):
            async with one_at_a_time:
                await asyncio.sleep(0)
                return float(len(text))

        return await asyncio.gather(*map(score, completions))

    for _ in range(3):
        rows = [{"prompt": "a"}] * 3
        assert rewards.call_rewards([patient], rows, ["a", "bb", ""], [[]] * 3)[0] == [[1, 2, 0]]


def test_only_what_the_assistant_says_is_scored():
    said = [{"role": "assistant", "content": "no"}, {"role": "tool", "content": "#### 5"}]
    assert rewards.accuracy_reward(None, [said, said[::-1], said[:1]], ["5"] * 3) == [0.0] * 3
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "#### 5"}]}]
    assert rewards.accuracy_reward(None, [parts, {"content": "#### 5"}, None], ["5"] * 3) == [
        1,
        1,
        0,
    ]


HOSTILE = [
    r"\boxed{", "{", "<answer>", "</answer>", "<think>", r"\text{", r"\frac{", "####", "1,", "9",
    "\u202e", "- ", "\\", "e9", "$", "\ud800", "\n", "Step 1:", "x=", "1 ", "½", "١",
    r"\alpha", r"\{\pi", "5 ties ", "as/",
]  # fmt: skip
texts = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*HOSTILE, "}", "%", "/", ".", ",", "</think>", "First,", "a"]), max_size=30
    ).map("".join),
)
RANGES = {
    "accuracy": (0, 1), "format": (0, 1), "tag_count": (0, 1), "reasoning_steps": (0, 1),
    "length": (-0.5, 0.5), "cosine": (-1, 1), "repetition_penalty": (-1, 0),
    "soft_overlong_penalty": (-1, 0),
}  # fmt: skip


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_rewards_are_total_deterministic_and_in_range(pairs):
    completions, golds = [c for c, _ in pairs], [g for _, g in pairs]
    chat = [[{"role": "assistant", "content": c}] for c in completions]
    for name, (low, high) in RANGES.items():
        reward = REWARDS[name]
        scores = reward(prompts=["p"] * len(pairs), completions=completions, answer=golds)
        assert scores == reward(prompts=["p"] * len(pairs), completions=chat, answer=golds)
        assert len(scores) == len(pairs) and all(s is None or low <= s <= high for s in scores)
    for text in completions:
        assert answers_match(text, text)  # reflexive on anything


@pytest.mark.parametrize("piece", HOSTILE)
def test_rewards_take_time_linear_in_the_text(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for name in RANGES:
        REWARDS[name](prompts=["p"], completions=[text], answer=[text])
    for end in ("", "x", "}"):
        within = "5" + text[: 999 - len(end)] + end, r"\{" + text[: 998 - len(end)] + end
        assert answers_match(*within) in (True, False)
    assert answers_match(text[:1000], text[1:1001]) in (True, False)
    # some 0.3 s where this was written; quadratic would be minutes
    assert time.process_time() - start < 5.0


def test_the_layout_of_many_repeated_tags_is_refused_at_once():
    text, start = "<think>" + "</think><answer></answer>" * 8_000 + "x", time.process_time()
    assert REWARDS["format"](prompts=["p"], completions=[text]) == [0.0]
    assert time.process_time() - start < 1.0  # a regular expression alone backtracks for 4 s


def test_a_long_fraction_that_is_none_is_refused_at_once():
    start = time.process_time()
    assert not answers_match("1" * 240 + "/" + "1" * 240 + "!", "5")
    assert time.process_time() - start < 1.0  # a pattern that gives digits back takes 2 s


async def slow_reward(completions, **columns):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


def test_rewards_may_be_async_may_say_none_and_are_weighted():
    half = lambda completions, **columns: [1.0 if i % 2 else None for i in range(len(completions))]
    none = lambda completions, **columns: [None] * len(completions)
    unscored = update(trainer(reward=[slow_reward, none]))
    assert all(math.isnan(unscored[f"rewards/<lambda>/{what}"]) for what in ("mean", "std"))
    t = trainer(reward=[slow_reward, half], reward_weights=[2.0, 10.0])
    metrics = update(t)
    assert metrics["rewards/slow_reward/mean"] == 0.5 and metrics["reward"] == pytest.approx(
        (1 + 11) / 2
    )
    assert [s["rewards/slow_reward"] for s in t.samples] == [0.5] * 16
    t = trainer(reward=lambda completions, **columns: [None] * len(completions))
    assert math.isnan(update(t)["reward"]) and not any(p.grad.any() for p in t.params.values())


def test_an_async_reward_runs_inside_a_running_event_loop_too():
    async def notebook():
        return update(trainer(reward=slow_reward))

    assert asyncio.run(notebook())["reward"] == 0.5


def broken(what):
    def reward(completions, **columns):
        if what == "raises":
            raise RuntimeError("boom")
        if what == "exits":
            sys.exit(3)
        return {
            "short": [1.0],
            "inf": [math.inf] * len(completions),
            "text": ["x"] * len(completions),
            "none": None,
        }[what]

    return reward


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raises", "boom"),
        ("exits", "raised SystemExit: 3"),
        ("short", "1 values for 16"),
        ("inf", "infinite"),
        ("text", "x"),
        ("none", "None"),
    ],
)
def test_a_reward_that_fails_is_named(what, words):
    with pytest.raises(RewardError, match=f"reward reward .*{words}"):
        update(trainer(reward=broken(what)))


@pytest.mark.parametrize("missing", [None, "", " ", float("nan"), []])
def test_a_solution_serves_where_an_answer_is_missing_or_none(missing):
    row = {"prompt": "1", "answer": missing, "solution": "5"}
    scores, _ = rewards.call_rewards([rewards.accuracy_reward], [row], [r"\boxed{5}"], [[1]])
    assert scores == [[1.0]]
    with pytest.raises(ValueError, match="no completion can match"):
        rewards.check_row(rewards.accuracy_reward, row | {"solution": PROSE})


def test_what_rewards_log_is_a_mean_over_the_evaluation_and_must_fit():
    def counts(completions, log_metric, log_extra, **columns):
        log_metric("rows", torch.tensor(len(completions)))
        log_extra("x", [1] * (len(completions) if columns.get("fits", True) else 1))
        return [0.0] * len(completions)

    t = trainer(reward=counts, eval_rows=ROWS[:5], prompts_per_step=1, num_generations=2)
    assert t.evaluate()["eval_rows"] == pytest.approx((2 + 2 + 1) / 3)
    assert t.evaluate()["eval_rows"] == pytest.approx((2 + 2 + 1) / 3) and not t.reward_metrics
    once = lambda log_metric, completions, trainer_state, **columns: (
        log_metric("step", trainer_state.global_step) or [0.0] * len(completions)
    )
    t = trainer(reward=once, rows=ROWS)
    t.reward_names = ["a"]
    assert [update(t)["step"], update(t, 1)["step"]] == [0.0, 1.0]
    with pytest.raises(RewardError, match="log_extra"):
        update(trainer(reward=lambda **c: counts(c.pop("completions"), **c | {"fits": False})))


def test_names_that_rewards_log_do_not_stand_in_for_ours(tmp_path):
    def shadows(completions, log_extra, log_metric, **columns):
        for name in ("length", "ended", "step", "advantage", "note"):
            log_extra(name, ["x"] * len(completions))
        for name in ("step", "reward", "grad_norm", "num_tokens", "mine"):
            log_metric(name, -1.0)
        return digits(completions)

    metrics = trainer(reward=shadows, output_dir=str(tmp_path)).train()
    assert (
        metrics["step"] == 2
        and min(metrics[k] for k in ("reward", "grad_norm", "num_tokens")) >= 0 > metrics["mine"]
    )
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    sample = lines(tmp_path / "completions.jsonl")[0]
    assert sample["step"] == 1 and sample["note"] == "x" and isinstance(sample["length"], int)


def test_one_reward_cannot_change_what_the_next_one_sees():
    def meddles(prompts, completions, completion_ids, answer, **columns):
        completions[0][0]["content"] = completions[1] = answer[0] = completion_ids[0][0] = None
        prompts.clear()
        return [0.0] * len(completion_ids)

    seen = {}
    t = trainer(reward=[meddles, lambda **columns: seen.update(columns) or [0.0] * 16])
    update(t)
    assert None not in seen["answer"] + seen["completions"] + seen["completion_ids"][0]
    assert (
        all(c[0]["content"] is not None for c in seen["completions"]) and len(seen["prompts"]) == 16
    )
    assert all(
        isinstance(sample["completion"], str) and sample["length"] > 0 for sample in t.samples
    )


# --------------------------------------------------------------------------- prompts and templates


def tokenizer_with(template=None, adds="", **special):
    """The demo's tokenizer with another template, or one that adds <bos> or <end> by itself."""
    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(TOKENIZER)
    other.add_special_tokens({"bos_token": "<bos>"} if "<bos>" in adds else {})
    other.chat_template = template or other.chat_template
    if adds:
        named = [
            (token, other.convert_tokens_to_ids(token))
            for token in ("<bos>", "<end>")
            if token in adds
        ]
        other._tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=named)
    return other


@pytest.mark.parametrize("opened", ["<think>", "<think></think>", "<answer>", ""])
def test_a_tag_that_the_template_opened_belongs_to_the_completion(opened):
    template = TOKENIZER.chat_template.replace("<assistant>", "<assistant>" + opened)
    t = trainer(
        reward=["tag_count", lambda completions, **_: heard.extend(completions) or [0] * 16],
        system_prompt="1+1+1+1+1+1+1+1+1+1",  # only the end of a prompt is looked at
    )
    t.tokenizer, heard = tokenizer_with(template), []
    update(t)
    texts = [rewards.completion_text(c) for c in heard]
    assert len(texts) == 16 and all(text.startswith(opened) for text in texts)
    assert [sample["completion"] for sample in t.samples] == texts


def test_a_thought_that_the_template_opened_is_scored_as_one():
    given = "<think>\n"
    texts = [given + "so 5</think> <answer>5</answer>", given + r"maybe \boxed{5}"]
    columns = {"prompts": ["p"] * 2, "completions": texts, "answer": ["5"] * 2}
    assert rewards.OPENED.findall("<user>5<end>\n<assistant>\n" + given)[0] == given
    assert [rewards.REWARDS[name](**columns) for name in ("format", "tag_count", "accuracy")] == [
        [1, 0], [1, 0.25], [1, 0],
    ]  # fmt: skip


def test_tags_that_are_special_tokens_reach_the_rewards_and_eos_does_not():
    t = trainer()
    t.tokenizer = other = copy.deepcopy(TOKENIZER)
    other.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    think, end = other.convert_tokens_to_ids("<think>"), EOS
    ids, mask = torch.tensor([[think, 5, 6, end]]), torch.ones(1, 4, dtype=torch.bool)
    seen = []
    t.reward_funcs = [lambda completions, **_: seen.extend(completions) or [0.0]]
    t.score([{"prompt": "1"}], Rollout(torch.full((1, 4), 10), mask, ids, mask, torch.zeros(1, 4)))
    assert seen == ["<think>" + other.decode([5, 6])]


def test_a_text_prompt_gets_one_bos_and_no_eos():
    both = tokenizer_with(adds="<bos> $A <end>")
    bos, end = both.convert_tokens_to_ids("<bos>"), both.eos_token_id
    assert both("1+2").input_ids[0] == bos and both("1+2").input_ids[-1] == end  # it adds them
    plain = TOKENIZER("1+2").input_ids
    assert encode_prompt("1+2", both) == [bos, *plain]
    assert encode_prompt("<bos>1+2", both) == [bos, *plain]
    assert encode_prompt("1+2<end>", both) == [bos, *plain, end]  # a written one stays
    chat = [{"role": "user", "content": "1"}]
    assert bos not in encode_prompt(chat, both) and encode_prompt(chat, both)[-1] != end


@pytest.mark.parametrize(
    "prompt",
    ["", [], 5, [5], [{"role": "user"}], [{"role": "user", "content": 5}], {"role": "user"}],
)
def test_a_prompt_that_is_neither_text_nor_a_chat_is_refused(prompt):
    with pytest.raises(ValueError, match="'prompt' must be text or a list of messages"):
        encode_prompt(prompt, TOKENIZER)


def test_a_window_that_changes_the_frequencies_of_all_rows_is_not_left():
    """Longrope (Phi-3): one row beyond the original length changes what all others see."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    phi = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0, eos_token_id=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        original_max_position_embeddings=24, rope_scaling={"type": "longrope", **factors},
    )  # fmt: skip
    model = with_adapters(AutoModelForCausalLM.from_config(phi).eval())
    fits = [{"prompt": "1+" * 8}]
    assert update(trainer(model, rows=fits, prompts_per_step=1))[grpo_lora.SAMPLER_GAP] < 1e-5
    with pytest.raises(ValueError, match="the prompt has 17 tokens; 1 to 16 fit in"):
        trainer(model, rows=[{"prompt": "1+" * 8 + "1"}])


def test_a_chat_needs_a_template():
    bare = copy.deepcopy(TOKENIZER)
    bare.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template; use text"):
        encode_prompt(ROWS[0]["prompt"], bare)
    assert encode_prompt("1+1", bare)


def test_template_arguments_come_from_the_settings_and_from_the_row():
    template = TOKENIZER.chat_template + "{{ '<think>' if enable_thinking | default(false) }}"
    rows = [ROWS[0], ROWS[1] | {"chat_template_kwargs": {"enable_thinking": False}}]
    given = {"processing_class": tokenizer_with(template)}
    for kwargs, ends in [(None, [False, False]), ({"enable_thinking": True}, [True, False])]:
        model = with_adapters(tiny_model(), random=False)
        t = GRPOTrainer(
            model,
            digits,
            GRPOConfig(chat_template_kwargs=kwargs, max_completion_length=8),
            rows,
            **given,
        )
        assert [TOKENIZER.decode(t.encode(row)).endswith("<think>") for row in rows] == ends


def test_a_padding_token_beyond_the_embeddings_does_no_harm():
    t = trainer()
    t.tokenizer = None
    other = copy.deepcopy(TOKENIZER)
    other.add_special_tokens({"pad_token": "[PAD]"})
    assert other.pad_token_id >= VOCAB
    model = with_adapters(tiny_model(), random=False)
    config = GRPOConfig(max_steps=1, prompts_per_step=4, num_generations=4, max_completion_length=8)
    rows = [{"prompt": "1+2"}, {"prompt": "1+2+3+4"}] * 4  # of two lengths: one is padded
    t = GRPOTrainer(model, digits, config, rows, processing_class=other)
    assert math.isfinite(t.train()["loss"]) and t.pad_token_id < VOCAB


def test_a_prompt_that_ends_with_the_assistants_words_is_pointed_out():
    rows = [{"prompt": [*ROWS[0]["prompt"], {"role": "assistant", "content": "#### 4"}]}]
    with pytest.warns(UserWarning, match="ends with an assistant's message: it is continued"):
        trainer(rows=rows)


def test_the_first_token_of_the_vocabulary_may_stand_in_a_prompt():
    t = trainer()
    t.encode = lambda row: [0, 5, 6][: row["n"]]
    rollout = t.sample([{"n": 3}, {"n": 2}], 2)
    assert rollout.prompt_mask.tolist() == [[True, True, True], [False, True, True]]
    assert rollout.prompt_ids.tolist() == [[0, 5, 6], [t.pad_token_id, 0, 5]]


def test_prompts_take_the_chat_template_the_system_prompt_or_neither():
    chat = [{"role": "user", "content": "1+2"}]
    decode = lambda *args: TOKENIZER.decode(encode_prompt(*args))
    assert decode("1+2", TOKENIZER) == "1+2"
    assert decode(chat, TOKENIZER) == "<user>1+2<end><assistant>"
    assert decode("1+2", TOKENIZER, "3") == decode(chat, TOKENIZER, "3") != decode(chat, TOKENIZER)
    begun = [*chat, {"role": "assistant", "content": "<think>1"}]
    assert decode(begun, TOKENIZER) == "<user>1+2<end><assistant><think>1"


# ------------------------------------------------------------------------- going on with a training


def test_training_until_the_middle_of_a_batch_ends_before_it_as_an_end_ends():
    seen = []
    note = lambda t, metrics: seen.append((t.step, t.end, "eval_reward" in metrics))
    options = {"num_iterations": 2, "max_steps": 8, "callbacks": [note], "eval_rows": ROWS[:2]}
    assert trainer(**options).train(until=5)["step"] == 4
    assert seen == [(0, 4, True), (2, 4, False), (4, 4, True)]


def test_a_trainer_goes_on_from_the_state_of_another():
    """Weights, moments, schedule and reference: the next update is the same, to the bit."""
    settings = {"beta": 0.1, "lr_scheduler_type": "linear", "max_steps": 4}
    for fresh in (False, True):  # an adapter that is not new has a copy for its reference
        first = trainer(with_adapters(tiny_model()), **settings)
        second = trainer(with_adapters(tiny_model(), random=not fresh), **settings)
        first.train(until=2)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.step == 2 and second.tokens == first.tokens > 0
        assert first.train()["loss"] == second.train()["loss"]
        for name, p in first.params.items():
            assert torch.equal(p, second.params[name])


def test_a_schedule_that_goes_on_to_a_later_end_has_the_rate_of_a_straight_run():
    for kind in ("linear", "cosine", "constant_with_warmup"):
        make = lambda steps, kind=kind: trainer(
            lr_scheduler_type=kind, warmup_steps=1, max_steps=steps
        )
        short, straight, longer = make(2), make(6), make(6)
        short.train()
        straight.train(until=2)
        longer.load_state_dict(copy.deepcopy(short.state_dict()))
        used: list[float] = []
        for t in (longer, straight):
            note = lambda optimizer, *_, used=used: used.append(optimizer.param_groups[0]["lr"])
            t.optimizer.register_step_pre_hook(note)
            assert update(t, 2)["learning_rate"] == used[-1] > 0
        assert used[0] == used[1]
