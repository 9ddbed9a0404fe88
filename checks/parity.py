"""Models and adapters twice, ours and PEFT's, for the parity tests."""

import copy
import functools

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lora import LoRAConfig, apply_lora

# Every reference value comes from the library's own code. The tests are skipped where TRL and PEFT
# are not installed: pip install -r benchmarks/requirements.txt

PARITY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def parity_model(family="llama", seed=0, **settings):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **PARITY | settings)
    )
    for p in (
        model.parameters()
    ):  # the default initialisation is so small that every model says the same
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def adapter_of(peft_model):
    """PEFT's parameters under our names (and ours as they are)."""
    rename = {
        ".default": "",
        "magnitude_vector.weight": "magnitude_vector",
        "modules_to_save": "trained",
    }
    named = {}
    for name, p in peft_model.named_parameters():
        name = name.removeprefix("base_model.model.")
        named[functools.reduce(lambda name, old: name.replace(old, rename[old]), rename, name)] = p
    return named


@torch.no_grad()
def randomise(ours, theirs=None):
    """Move all that is trained away from its initial value, in ours and in PEFT's model alike."""
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
