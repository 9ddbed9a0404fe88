# library: trl
# file: trl/trainer/grpo_trainer.py
"""TRL's GRPOTrainer with its defaults (loss_type dapo): its own methods, with the model left out."""

import contextlib
import types
from collections import defaultdict

import torch

from checks.alone import Stub, load_alone

ns = types.SimpleNamespace


class Base:
    def _prepare_inputs(self, inputs):
        return inputs


models = Stub()  # a "model" here is a function of the padded prompts that gives the whole rows
models.unwrap_model_for_generation = lambda model, *a, **k: contextlib.nullcontext(model)
utils = load_alone("trl", "trainer/utils.py")
trl = load_alone(
    "trl", "trainer/grpo_trainer.py", trl__models=models, trl__trainer__utils=utils,
    trl__trainer__base_trainer=ns(_BaseTrainer=Base),
)  # fmt: skip
same = lambda x, **k: x


def trainer(**more):
    me = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    device = torch.device("cpu")
    me.accelerator = ns(device=device, process_index=0, num_processes=1, gather=same, reduce=same)
    me.args = ns(
        delta=None, use_bias_correction_kl=True, steps_per_generation=1, num_iterations=1,
        gradient_accumulation_steps=1, gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=1, ds3_gather_for_generation=False,
    )  # fmt: skip
    me._metrics = defaultdict(lambda: defaultdict(list))
    me._logs = defaultdict(lambda: defaultdict(list), advantages=[], prompt=[], completion=[])
    me._dist, me._tokenizer, me.model = Stub(), ns(pad_token_id=0), ns(training=True)
    me.environment_factories = me.environments = me.tools = me.pad_to_multiple_of = None
    me.mask_truncated_completions = me.use_vllm = me._is_vlm = me.log_multimodal = False
    me.use_transformers_continuous_batching = me.aux_loss_enabled = False
    me._entropy_bonus_enabled, me.top_entropy_quantile = False, 1.0
    me.off_policy_mask_threshold, me.importance_sampling_level = None, "token"
    me.loss_type, me.epsilon_low, me.epsilon_high, me.beta = "dapo", 0.2, 0.2, 0.0
    me.current_gradient_accumulation_steps = me.num_iterations = 1
    me.generation_kwargs = me.generation_config = None
    me.scale_rewards, me.multi_objective_aggregation = "group", "sum_then_normalize"
    me.reward_weights, me.reward_func_names, me.reward_funcs = torch.ones(1), ["r"], [None]
    me._pending_extra_logs, me._pending_metrics = {}, {}
    vars(me).update(more)
    return me


def group_advantages(rewards):
    N, G = rewards.numel(), rewards.shape[1]
    me = trainer(
        num_generations=G, _calculate_rewards=lambda *a: rewards.view(-1, 1),
        _generate=lambda prompts: ([[1]] * N, [[1]] * N, None, [""] * N, None, {}, None, None),
    )  # fmt: skip
    return me._generate_and_score_completions([{"prompt": ""}] * N)["advantages"].view(-1, G)


def completion_mask(completion_ids, eos_token_ids):
    B, T = completion_ids.shape
    whole = lambda input_ids, **k: torch.cat([input_ids, completion_ids], dim=1)
    me = trainer(eos_token_ids=eos_token_ids, model_wrapped=ns(generate=whole))
    rows, _ = me._generate_single_turn([[1]] * B, None, {}, 1)
    return torch.arange(T) < torch.tensor([[len(row)] for row in rows])


def grpo_loss(logps, old_logps, advantages, mask, ref_logps=None, beta=0.0, **args):
    one = torch.ones(len(mask), 1, dtype=torch.long)
    forward = lambda model, *a, **k: (logps, torch.zeros_like(logps), None)
    me = trainer(beta=beta, _get_per_token_logps_and_entropies=forward)
    vars(me.args).update(args)
    return me._compute_loss(None, {
        "prompt_ids": one, "prompt_mask": one, "completion_ids": mask.long(),
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps, "num_items_in_batch": mask.sum(),
    })  # fmt: skip


def kl_penalty(logps, ref_logps):  # token by token: the loss where A is 0 and beta is 1
    no_A, one = torch.zeros(1), torch.ones(1, 1, dtype=torch.bool)
    pairs = zip(logps.view(-1, 1, 1), ref_logps.view(-1, 1, 1), strict=True)
    kl = [grpo_loss(x, x, no_A, one, ref, 1.0, use_bias_correction_kl=False) for x, ref in pairs]
    return torch.stack(kl).view_as(logps)
