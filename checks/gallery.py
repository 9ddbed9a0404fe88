"""The gallery of bugs."""

import contextlib
import inspect
import itertools
import sys
import tempfile
import types
from pathlib import Path
from typing import NamedTuple

# -------------------------------------------------------------------------------------- the gallery


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
WEIGHTED = (
    "return torch.where(rewards.isnan().all(dim=-1), math.nan, (rewards * weights).nansum(dim=-1))"
)
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
                tests |= {
                    key: value for key, value in vars(module).items() if key.startswith("test_")
                }
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
        names = (
            [n.strip() for n in mark.args[0].split(",")]
            if isinstance(mark.args[0], str)
            else list(mark.args[0])
        )
        values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
        choices.append([dict(zip(names, value, strict=True)) for value in values])
    for combination in itertools.product(*choices):
        arguments = {key: value for part in combination for key, value in part.items()}
        with tempfile.TemporaryDirectory() as folder:
            if "tmp_path" in inspect.signature(function).parameters:
                arguments["tmp_path"] = Path(folder)
            function(**arguments)
