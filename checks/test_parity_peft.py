"""The same numbers as PEFT 0.21: layers to the bit, files in both directions."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checks.parity import adapter_of, both, parity_model, randomise
from grpo_lora import CausalLM
from lora import (
    LoRAConfig,
    apply_lora,
    load_lora,
    lora_disabled,
    merge_and_unload,
    param_groups,
    save_lora,
)
from test_training import adapters_of, tiny_model, trainer

# --------------------------------------------------------------------------------- PEFT: the layers


PEFT_METHODS = {
    "LoRA": lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "DoRA": lambda peft: peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], use_dora=True
    ),
    "IA3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
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
        results[-1] |= zip(
            trained, torch.autograd.grad(y, list(trained.values()), seed), strict=True
        )
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
    ours, theirs = both(
        base, r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa", **variant
    )
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


MERGES = [
    ({"use_dora": True}, {}),
    ({"init_lora_weights": "pissa"}, {}),
    ({"modules_to_save": ["lm_head"]}, {}),
]
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
    "rank_pattern": {
        "q_proj": 2,
        "layers.1.mlp.up_proj": 3,
        r"^model\.layers\.0\.self_attn\.v_proj": 5,
        "k.*": 6,
    },
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3, ".*mlp.*": 5, "v_proj": 7},
}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_give_each_module_pefts_rank_and_scale(use_rslora):
    ours, theirs = both(
        parity_model(), target_modules="all-linear", use_rslora=use_rslora, **PATTERNS
    )
    a, b = dict(ours.named_parameters()), adapter_of(theirs)
    assert {n: p.shape for n, p in a.items() if "lora_" in n} == {
        n: p.shape for n, p in b.items() if "lora_" in n
    }
    randomise(ours, theirs)
    ids = torch.arange(2, 14).view(2, 6)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_param_groups_are_pefts_lora_plus(settings):
    peft_optimizers = pytest.importorskip("peft.optimizers")
    ours, theirs = both(parity_model(), target_modules="all-linear", **settings)
    optimizer = peft_optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )

    def rates(groups, named):
        names = {id(p): name for name, p in named}
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    expected = rates(optimizer.param_groups, adapter_of(theirs).items())
    assert (
        rates(param_groups(ours, 1e-3, lora_plus_ratio=16.0), ours.named_parameters()) == expected
    )


# ---------------------------------------------------------------------------------- PEFT: the files

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
    for case in (
        "plain",
        "head-copy",
        "head-adapted",
        "embedding-copy",
        "head-and-embedding-copies",
    )
]
FILE_TESTS += [(case, "llama", torch.bfloat16) for case in ("plain", "dora", "pissa", "head-copy")]
FILE_TESTS += [
    ("plain", "many", torch.float32),
    *((case, "gpt2", torch.float32) for case in ("plain", "dora", "pissa")),
]


@pytest.fixture(params=FILE_TESTS, ids=lambda p: "-".join(map(str, p)))
def file_case(request):
    case, model, dtype = request.param
    base = parity_model("gpt2" if model == "gpt2" else "llama", **FILE_MODELS.get(model, {})).to(
        dtype
    )
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
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(copy.deepcopy(base), tmp_path)
    assert_same_outputs(ours, theirs, base)

    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trainable) == sum(p.requires_grad for p in theirs.parameters())
    ours.train()(IDS, labels=IDS).loss.backward()
    assert {
        n for n, p in ours.named_parameters() if p.grad is not None and p.grad.any()
    } == trainable
