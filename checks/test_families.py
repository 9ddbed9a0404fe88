"""Model families of transformers, tiny and made from configs: each is scored as it is sampled."""

import dataclasses

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import grpo_lora
from grpo_lora import completion_logps, generate
from lora import LoRAConfig, apply_lora, load_lora, lora_disabled, save_lora
from runner import fast

# ------------------------------------------------------------------------------------- the families

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
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}
DEEPSEEK = {
    **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
}
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
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
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
IDLE = {
    "mamba": ".dt_proj.",
    "falcon_mamba": ".dt_proj.",
    "jamba": ".dt_proj.",
    "bart": ".encoder_attn.",
}


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
        base_logits = model.requires_grad_(False)(
            ids
        ).logits  # torch has another kernel for convolutions that train
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

    prompt_mask, eos, T = (
        torch.arange(7) >= torch.tensor([[3], [0]]),
        range(0, 50, 4),
        0.7,
    )  # prompts of 4 and 7 tokens
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
        assert {
            name for name, p in model.named_parameters() if p.grad is not None
        } <= adapter.keys()
        reached = {
            name: p.grad for name, p in adapter.items() if p.grad is not None and p.grad.any()
        }
        assert adapter.keys() - reached.keys() == {
            name for name in adapter if IDLE.get(family, "none") in name
        }
        return torch.cat([g.flatten() for g in reached.values()])

    rows = []  # each by itself: no padding, no cache, the family's own logits
    for i, length in enumerate(lengths):
        row = torch.cat(
            [ids[i // 3][prompt_mask[i // 3]], rollout.completion_ids[i, :length]]
        ).unsqueeze(0)
        log_probs = (model(row, use_cache=False).logits[0] / T).log_softmax(dim=-1)
        rows.append(log_probs[:-1].gather(1, row[0, 1:, None])[-length:, 0])
    expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    expected_gradient = gradient(expected)

    torch.testing.assert_close(rollout.logps, expected.detach(), **CLOSE)
    for share_prompt in (True, False):
        logps, _ = completion_logps(model, rollout, temperature=T, share_prompt=share_prompt)
        torch.testing.assert_close(logps, expected, **CLOSE)
        assert (gradient(logps) - expected_gradient).norm() < 1e-3 * expected_gradient.norm()

    nothing = dataclasses.replace(rollout, completion_mask=torch.zeros_like(mask))
    for score in (completion_logps, fast.completion_logps):
        logps, entropies = score(model, nothing, temperature=T)
        assert logps.shape == entropies.shape == mask.shape and not entropies.requires_grad
        model.zero_grad()
        logps.sum().backward()
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert not logps.any() and not entropies.any()


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "depth": 1, "num_heads": 4, "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
WRAPPERS = {  # what their text_config needs
    "gemma3": GEMMA,
    "qwen2_vl": {"rope_parameters": MROPE},
    "qwen2_5_vl": {"rope_parameters": MROPE},
    "mistral3": HEAD_DIM,
    "llava": {},
}


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_model_for_text_and_images_trains_on_text(family):
    """The language model inside is sampled and scored as the whole model's own forward has it."""
    # such a model unpacks what its decoder returns
    assert issubclass(grpo_lora._DecoderOutput, transformers.utils.ModelOutput)
    config = transformers.AutoConfig.for_model(family)
    kinds = type(config.text_config), type(config.vision_config)
    config.text_config = kinds[0](**FAMILY_SIZES | WRAPPERS[family])
    config.vision_config = kinds[1](**VISION)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    apply_lora(model, LoRAConfig(r=2, target_modules=r".*language_model.*_proj"))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    ids, seen = torch.arange(3, 17).view(2, 7), torch.arange(7) >= torch.tensor([[3], [0]])
    for engine in (grpo_lora, fast):
        rollout = engine.generate(
            model, ids, seen, num_generations=2, max_completion_length=5, temperature=0.7,
            eos_token_ids=[], pad_token_id=0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        logps, _ = engine.completion_logps(model, rollout, temperature=0.7)
        torch.testing.assert_close(rollout.logps, logps.detach(), **CLOSE)
        logps.sum().backward()
        for i, row in enumerate(rollout.completion_ids):
            whole = torch.cat([ids[i // 2][seen[i // 2]], row]).unsqueeze(0)
            with torch.no_grad():
                log_probs = (model(input_ids=whole).logits[0] / 0.7).log_softmax(dim=-1)
            right = log_probs[:-1].gather(1, whole[0, 1:, None])[-5:, 0]
            torch.testing.assert_close(logps[i].detach(), right, **CLOSE)
