"""Adapters on bases of four and eight bits: bitsandbytes' and torchao's, on a CPU."""

import copy
import json

import pytest
import torch
from torch import nn

from checks.helpers import SMALL
from grpo_lora import completion_logps
from lora import (
    REPACKS,
    LoRAConfig,
    apply_lora,
    dense_weight,
    load_lora,
    lora_disabled,
    lora_merged,
    merge_and_unload,
    save_lora,
)
from runner import fast
from runner.cli import main
from test_training import ROWS, TOKENIZER, digits, prompts, sample, tiny_model, trainer

SIZES = {"hidden_size": 64, "intermediate_size": 96}  # 4-bit blocks are of 64 numbers
KINDS = ["nf4", "int8", "torchao int8"]


def quantised(kind: str):
    """A tiny model whose linear layers, but for the head, are quantised."""
    model = tiny_model(**SIZES)
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        keep = lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), keep)
        return model
    bnb = pytest.importorskip("bitsandbytes").nn
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and name != "lm_head":
            sizes = (old.in_features, old.out_features)
            if kind == "nf4":
                new = bnb.Linear4bit(*sizes, bias=False, quant_type="nf4")
            else:
                new = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            model.set_submodule(name, new.to("cpu"))
    return model


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def with_random_adapter(kind: str, **config):
    torch.manual_seed(3)
    model = apply_lora(quantised(kind), LoRAConfig(r=4, lora_alpha=8, **config))
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            nn.init.normal_(p, std=0.1)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


IDS = torch.arange(5, 17).view(2, 6)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_the_adapter_off_is_the_quantised_base_to_the_bit_and_merging_is_near(kind, config):
    base, model = quantised(kind), with_random_adapter(kind, **config)
    before = logits(base, IDS)
    with lora_disabled(model):
        assert torch.equal(logits(model, IDS), before)
    after = logits(model, IDS)
    assert (after - before).abs().max() > 0.01
    # int8 of bitsandbytes also quantises what goes in, and merging does not
    near = 0.05 if kind == "int8" else 1e-5
    with lora_merged(model):
        torch.testing.assert_close(logits(model, IDS), after, atol=near, rtol=near)
    assert torch.equal(logits(model, IDS), after)
    plain = merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(logits(plain, IDS), after, atol=near, rtol=near)
    for m in (m for m in plain.modules() if hasattr(m, "in_features")):
        assert type(m) is nn.Linear and m.weight.shape == (m.out_features, m.in_features)


def test_merging_some_layers_leaves_the_others_quantised_and_the_rest_trainable(kind):
    model = apply_lora(quantised(kind), LoRAConfig(r=4, target_modules=["q_proj"]))
    before = logits(model, IDS)
    plain = merge_and_unload(model)
    torch.testing.assert_close(logits(plain, IDS), before, atol=0.05, rtol=0.05)
    trainable = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert "model.layers.0.self_attn.q_proj.weight" in trainable and "lm_head.weight" in trainable
    assert not any("up_proj" in name for name in trainable)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_quantised_model_in_half_precision_is_merged_into_one_that_runs(kind, config):
    model = with_random_adapter(kind, **config).to(torch.bfloat16)
    after = logits(model, IDS)
    with lora_merged(model):
        torch.testing.assert_close(logits(model, IDS), after, atol=0.2, rtol=0.1)
        rollout = sample(model, *prompts(), engine=fast)
        assert rollout.logps.isfinite().all()
    torch.testing.assert_close(logits(merge_and_unload(model), IDS), after, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_the_dense_weight_is_what_the_layer_multiplies_by(kind, bias):
    layer = quantised(kind).model.layers[0].mlp.down_proj
    layer.bias = nn.Parameter(torch.full((64,), bias)) if bias else None
    W, x = dense_weight(layer), torch.eye(96)[:7] * 3
    assert W.shape == (64, 96)
    torch.testing.assert_close(layer(x), x @ W.T + bias, atol=1e-5, rtol=1e-2)


def test_only_adapters_get_gradients_and_they_are_those_of_the_dense_model(kind):
    model = with_random_adapter(kind)
    dense = copy.deepcopy(model)
    for _, layer in dense.named_modules():
        if hasattr(layer, "lora_A"):
            plain = nn.Linear(*layer.base_layer.weight.shape[::-1], bias=False, device="meta")
            plain.weight = nn.Parameter(dense_weight(layer.base_layer), requires_grad=False)
            layer.base_layer = plain
    found = []
    for m in (model, dense):
        m(input_ids=IDS).logits.square().sum().backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all("lora_" in name for name in found[0])
    for name, gradient in found[0].items():
        cosine = torch.cosine_similarity(gradient.flatten(), found[1][name].flatten(), dim=0)
        assert cosine > (0.98 if kind == "int8" else 0.9999), name


@pytest.mark.parametrize("engine", [None, fast])
def test_a_run_trains_on_a_quantised_base_and_its_sampler_is_its_scorer(kind, engine, tmp_path):
    torch.manual_seed(0)
    model = apply_lora(quantised(kind), LoRAConfig(r=4))
    layer = model.model.layers[1].mlp.up_proj.base_layer
    before = dense_weight(layer).clone()
    t = trainer(model, digits, engine=engine, output_dir=str(tmp_path))
    metrics = t.train()
    assert metrics["grad_norm"] > 0
    # int8's products depend on what else is in the batch
    assert metrics["sampling/sampling_logp_difference/mean"] < (0.05 if kind == "int8" else 1e-5)
    assert torch.equal(dense_weight(layer), before)
    ids, mask = prompts()
    with lora_disabled(model):
        rollout = sample(model, ids, mask, engine=engine or __import__("grpo_lora"))
    with lora_disabled(model):
        got, _ = completion_logps(model, rollout, temperature=0.7)
    again = load_lora(quantised(kind), tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), logits(model, IDS)) and got.isfinite().all()


def test_the_adapter_of_a_quantised_base_loads_into_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_random_adapter(kind)
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    for module in theirs.modules():  # the products of the training forward, on every CPU
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    near = 0.01 if kind == "int8" else 1e-5
    torch.testing.assert_close(logits(theirs, IDS), logits(model, IDS), atol=near, rtol=near)


def test_a_layer_of_another_kind_is_refused_by_what_it_is():
    class OddLinear(nn.Module):
        def forward(self, x):
            return x

    model = tiny_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, OddLinear())
    for target in ("all-linear", ["q_proj"]):
        with pytest.raises(ValueError, match="OddLinear"):
            apply_lora(model, LoRAConfig(target_modules=target))


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_a_run_on_a_quantised_base_resumes_to_the_bit(flag, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    tiny_model(**SIZES).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["--model", str(tmp_path / "model"), "--data", str(data), flag, "--save_steps", "2"]
    command += [*SMALL, "--max_steps", "4"]
    for folder, steps in (("straight", "4"), ("resumed", "2")):
        assert main([*command, "--output_dir", str(tmp_path / folder), "--max_steps", steps]) == 0
    assert main([*command, "--output_dir", str(tmp_path / "resumed"), "--resume"]) == 0
    ours = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()
            for name in ("straight", "resumed")]  # fmt: skip
    assert ours[0] == ours[1]
