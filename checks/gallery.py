"""The gallery: bugs that were really made, each with a patch that puts it back in.

    pytest checks/test_gallery.py      each patch must make the test that it names fail
    python -m checks.gallery           writes the table, checks/GALLERY.md

source_patched loads the project anew with a patch, and run_test calls a test in it.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

HERE = Path(__file__).resolve().parent.parent
PAGE = HERE / "checks" / "GALLERY.md"

# -------------------------------------------------------------------------------------- the gallery


class Bug(NamedTuple):
    """A bug, where it was seen, and a patch that puts it back in: `right` becomes `wrong`."""

    number: int  # one bug may have several patches
    what: str
    seen: str  # owner/repository#issue, or owner/repository@commit, path; or words
    file: str  # of this project, in which `right` stands exactly once
    right: str
    wrong: str
    test: str  # must notice it


# Each patch changes as little as it can. Several statements share a line, so that a patch does not
# depend on the indentation around it.
# fmt: off
GALLERY = [
    Bug(1, "mask made from token values: with pad == eos the emitted EOS is never trained",
        "huggingface/trl#6357", "grpo_lora.py",
        "mask = completion_mask(ids, eos_token_ids)",
        "ended = ~completion_mask(ids, eos_token_ids); "
        "mask = ids.masked_fill(ended, pad_token_id) != pad_token_id",
        "test_rows_end_with_their_first_eos_and_are_padded_after_it"),
    Bug(2, "the stop token is masked out, so stopping is never reinforced",
        "rasbt/reasoning-from-scratch#185", "grpo_lora.py",
        "(is_eos.cumsum(dim=1) - is_eos.long()) == 0", "is_eos.cumsum(dim=1) == 0",
        "test_mask_ends_with_the_first_eos_whatever_the_padding"),
    Bug(3, "log-probs off by one against the tokens",
        "lucidrains/PaLM-rlhf-pytorch#31", "grpo_lora.py",
        "rollout.completion_ids[mask]", "rollout.completion_ids.roll(1, 1)[mask]",
        "test_the_sampler_and_the_scorer_agree_at_any_temperature"),
    Bug(3, "prompt tokens in the divisor",
        "CarperAI/trlx#509", "grpo_lora.py",
        "self.normalizers(rollout.completion_mask)",
        "self.normalizers(rollout.completion_mask)\n"
        "        normalizer += int(rollout.prompt_mask.sum())",
        "test_the_update_is_the_sum_over_rows_of_minus_a_grad_logp_under_the_normaliser"),
    Bug(4, "the log-prob function changes its inputs",
        "OpenGVLab/InternVL#1053", "grpo_lora.py",
        "states, targets = torch.cat(parts)",
        "rollout.completion_ids.masked_fill_(~mask, 3); states, targets = torch.cat(parts)",
        "test_scoring_changes_no_input"),
    Bug(5, "equal rewards do not give exactly zero",
        "NVIDIA-NeMo/RL#4161", "grpo_lora.py",
        "valid & (low < high) & (divisor != 0)", "valid & (divisor != 0)",
        "test_equal_rewards_give_exactly_zero"),
    Bug(6, "std with ddof 0",
        "jingyaogong/minimind@0074dcf, trainer/train_grpo.py", "grpo_lora.py",
        "/ (n - 1).clamp(min=0)).sqrt()", "/ n).sqrt()",
        "test_advantages_have_mean_zero_and_std_s_over_s_plus_eps"),
    Bug(6, "std over the batch where the group was meant",
        "XU-YIJIE/grpo-flat#2", "grpo_lora.py",
        "_nanstd(rewards, dim=1)", "_nanstd(rewards.flatten(), dim=0)",
        "test_advantages_have_mean_zero_and_std_s_over_s_plus_eps"),
    Bug(6, "normalised before what has no reward is dropped",
        "huggingface/trl#5902", "grpo_lora.py",
        "valid = ~rewards.isnan()", "valid, rewards = ~rewards.isnan(), rewards.nan_to_num(0.0)",
        "test_a_missing_reward_leaves_the_statistics_and_gets_zero"),
    Bug(7, "clip written as max where the advantage is negative",
        "jvmncs/safe-grid-agents#28", "grpo_lora.py",
        "torch.min(bounded * A, clipped * A)",
        "torch.where(A < 0, torch.max(bounded * A, clipped * A), "
        "torch.min(bounded * A, clipped * A))",
        "test_clip_stops_the_gradient_only_where_the_ratio_already_went_too_far"),
    Bug(8, "k1 as a loss, whose expected gradient is zero",
        "NVIDIA-NeMo/RL#2506", "grpo_lora.py",
        '"k3": d.expm1() - d', '"k3": -d',
        "test_kl_gradients_by_enumeration"),
    Bug(8, "the gradient of the KL correction is cut",
        "huggingface/trl#6503", "grpo_lora.py",
        "kl * (ratio if", "kl * (ratio.detach() if",
        "test_corrected_k3_has_the_gradient_of_k2"),
    Bug(9, "the arguments of the KL swapped",
        "lucidrains/PaLM-rlhf-pytorch#43; "
        "natolambert/rlhf-book@0c2ba9c, code/policy_gradients/loss.py", "grpo_lora.py",
        "d = ref_logps - logps", "d = logps - ref_logps",
        "test_kl_estimators_by_hand"),
    Bug(9, "KL subtracted, and so maximised",
        "Unakar/Logic-RL#58", "grpo_lora.py",
        "loss = loss + beta * kl", "loss = loss - beta * kl",
        "test_kl_term_is_masked_averaged_and_corrected_like_the_rest_and_by_nothing_else"),
    Bug(9, "KL dropped by a mask that is not its own",
        "PrimeIntellect-ai/prime-rl#1701", "grpo_lora.py",
        "loss = loss + beta * kl",
        "loss = loss + beta * kl * (1 if token_weights is None else token_weights)",
        "test_kl_term_is_masked_averaged_and_corrected_like_the_rest_and_by_nothing_else"),
    Bug(10, "temperature at sampling, not at scoring",
        "huggingface/trl#3029", "grpo_lora.py",
        "(self.logits(h) / temperature).log_softmax", "self.logits(h).log_softmax",
        "test_the_sampler_and_the_scorer_agree_at_any_temperature"),
    Bug(10, "top-k of the model's generation config left on",
        "OpenPipe/ART#140", "grpo_lora.py",
        "log_probs = (logits / temperature).log_softmax",
        "k = min(lm.core.generation_config.top_k or 10**9, logits.shape[1]); "
        "least = logits.topk(k).values[:, -1:]; "
        "log_probs = (logits.masked_fill(logits < least, -math.inf) / temperature).log_softmax",
        "test_the_models_own_generation_config_has_no_say"),
    Bug(11, "left padding without position_ids",
        "huggingface/trl#6800", "grpo_lora.py",
        "if self.takes_positions:", "if False:",
        "test_left_padding_moves_no_position"),
    Bug(12, "completions tiled where prompts were repeated: the wrong answer is graded",
        "StarsfieldAI/R1-V#146", "grpo_lora.py",
        "[row for row in rows for _ in range(G)]", "[row for _ in range(G) for row in rows]",
        "test_each_completion_is_graded_with_its_own_row"),
    Bug(13, "means of micro-batches averaged",
        "allenai/open-instruct#1161", "grpo_lora.py",
        "normalizer=normalizer,", "normalizer=None,",
        "test_the_update_does_not_depend_on_the_micro_batch_split"),
    Bug(14, "one function's reward counted twice",
        "a common slip", "grpo_lora.py",
        "(rewards * weights).nansum(-1)",
        "(rewards * weights).nansum(-1) + rewards[..., 0].nan_to_num()",
        "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(14, "weights ignored",
        "huggingface/trl#5352 (in what is logged)", "grpo_lora.py",
        "(rewards * weights).nansum", "rewards.nansum",
        "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(14, "a None treated as 0",
        "huggingface/trl#5902", "grpo_lora.py",
        "torch.where(rewards.isnan().all(-1), math.nan,",
        "torch.where(rewards.isnan().all(-1), 0.0,",
        "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(14, "None == None graded correct",
        "huggingface/open-r1#566", "rewards.py",
        "if answer is None or gold is None:\n        return False",
        "if answer is None or gold is None:\n        return answer is gold",
        "test_a_missing_answer_equals_nothing_not_even_another"),
    Bug(15, "0/0 where everything is masked",
        "huggingface/trl#3248", "grpo_lora.py",
        "max(normalizer, 1)", "normalizer",
        "test_an_empty_batch_has_loss_zero_and_gradient_zero"),
    Bug(15, "0/0 on an empty completion",
        "unslothai/unsloth-zoo#1286", "grpo_lora.py",
        "m.sum(dim=1, keepdim=True).clamp(min=1)", "m.sum(dim=1, keepdim=True)",
        "test_an_empty_batch_has_loss_zero_and_gradient_zero"),
    Bug(16, "log-softmax in bf16",
        "OpenRLHF/OpenRLHF#634", "grpo_lora.py",
        "logits.to(torch.promote_types(logits.dtype, torch.float32))", "logits",
        "test_half_precision_models_are_scored_in_float32"),
    Bug(17, "base weights trainable",
        "microsoft/aurora#167", "lora.py",
        "model.requires_grad_(False)", "pass",
        "test_training_reaches_adapters_only_and_the_base_stays_bit_equal"),
    # lora_merged has nothing to undo any more. So the patch merges and unmerges where it would.
    Bug(17, "merge and unmerge in place, which drifts",
        "huggingface/trl#6688", "lora.py",
        'stack.enter_context(patch.object(layer, "merged", weight))',
        'stack.enter_context(patch.object(layer, "merged", weight)); '
        "W = layer.base_layer.weight.data; "
        "change = layer.scaling * layer.lora_B.weight.data @ layer.lora_A.weight.data; "
        "W.add_(change).sub_(change)",
        "test_merging_a_thousand_times_leaves_every_bit_of_the_base"),
    Bug(18, "adapter-off not restored after an exception",
        "huggingface/peft#367", "lora.py",
        """\
    with ExitStack() as stack:
        for module in _adapters(model).values():
            stack.enter_context(patch.object(module, "disabled", True))
        yield
""",
        """\
    stack = ExitStack()
    for module in _adapters(model).values():
        stack.enter_context(patch.object(module, "disabled", True))
    yield
    stack.close()
""",
        "test_adapters_off_is_the_base_model_to_the_bit_through_nesting_and_exceptions"),
    Bug(18, "an inner disable re-enables too early",
        "huggingface/peft#3507", "lora.py",
        'stack.enter_context(patch.object(module, "disabled", True))',
        'module.disabled = True; stack.callback(setattr, module, "disabled", False)',
        "test_adapters_off_is_the_base_model_to_the_bit_through_nesting_and_exceptions"),
    # There A lies as (in, r), whose fan-in torch takes to be r: the fan-out of ours, (r, in).
    Bug(19, "A initialised with the wrong fan-in",
        "rasbt/LLMs-from-scratch@8f3e5b0, pkg/llms_from_scratch/appendix_e.py", "lora.py",
        "kaiming_uniform_(A, a=math.sqrt(5))",
        'kaiming_uniform_(A, a=math.sqrt(5), mode="fan_out")',
        "test_initialisations_have_the_distributions_they_name"),
    Bug(19, "A and B both zero",
        "huggingface/peft#3449", "lora.py",
        "kaiming_uniform_(A, a=math.sqrt(5))", "zeros_(A)",
        "test_initialisations_have_the_distributions_they_name"),
    Bug(19, "scaling applied twice",
        "huggingface/peft#3473", "lora.py",
        ".mul_(self.scaling)", ".mul_(self.scaling**2)",
        "test_lora_adds_s_b_a_and_nothing_else"),
    Bug(19, "alpha/r where alpha/sqrt(r) was asked for",
        "Blaizzy/mlx-vlm#846", "lora.py",
        "alpha / math.sqrt(r) if config.use_rslora else alpha / r", "alpha / r",
        "test_lora_adds_s_b_a_and_nothing_else"),
    Bug(20, "an adapter bound to no module: reward flat, no error",
        "huggingface/peft#3533", "lora.py",
        "if not any(matches(name, key) for name in names):", "if False:",
        "test_a_lora_config_that_cannot_work_is_refused_in_one_line_that_says_what_would"),
    Bug(21, "reentrant checkpointing over frozen embeddings: no gradient reaches the adapter",
        "huggingface/transformers#26221", "grpo_lora.py",
        'activation_checkpointing_enable({"use_reentrant": False})',
        'activation_checkpointing_enable({"use_reentrant": True}); '
        "lm.core.disable_input_require_grads()",
        "test_training_with_activation_checkpointing_moves_every_adapter"),
    Bug(21, "the cache silently dropped under checkpointing",
        "huggingface/trl#3683", "grpo_lora.py",
        "lm.takes_cache and not again", "lm.takes_cache",
        "test_activation_checkpointing_reaches_adapters_over_frozen_embeddings_and_changes_"
        "no_gradient"),
    Bug(22, "dropout active in the rollout",
        "Human-Agent-Society/reef#536", "grpo_lora.py",
        "with evaluating(lm.core):", "with nullcontext():",
        "test_generation_leaves_the_model_as_it_was_and_acts_in_eval_mode"),
    Bug(23, "merging an adapted head moves the tied embedding",
        "huggingface/peft#2018", "lora.py",
        "base.weight = nn.Parameter((weight.T if module.transposed else weight).contiguous())",
        "base.weight.data.copy_(weight.T if module.transposed else weight)",
        "test_merging_an_adapted_head_leaves_the_tied_embedding_alone"),
    Bug(24, "resuming with a fresh adapter",
        "huggingface/lerobot#3459", "grpo_lora.py",
        'parameter.copy_(state["trainable"][name].view_as(parameter))', "pass",
        "test_several_iterations_and_a_reference_resume_to_the_bit"),
    Bug(24, "resuming with a fresh optimiser",
        "ace-step/ACE-Step-1.5#742", "grpo_lora.py",
        'self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))', "pass",
        "test_several_iterations_and_a_reference_resume_to_the_bit"),
    # A batch follows from its number, so no position is saved. The patch forgets the number.
    Bug(24, "resuming at the start of the data",
        "allenai/open-instruct#1523", "grpo_lora.py",
        "order[i // n][i % n]", "order[i // n][(i - index * size) % n]",
        "test_data_order_is_a_permutation_each_epoch_and_a_function_of_the_seed"),
    Bug(25, "the base model as reference of a continued adapter",
        "huggingface/trl#4723", "lora.py",
        "return lora_snapshot(model)", "return lambda: lora_disabled(model)",
        "test_the_reference_is_the_policy_that_training_starts_from"),
    Bug(26, "of several EOS ids only the first honoured",
        "huggingface/trl#7039", "grpo_lora.py",
        "dict.fromkeys(named)", "named[:1]",
        "test_every_eos_id_of_the_tokenizer_and_the_generation_config_counts"),
    Bug(26, "and so in the rollout",
        "huggingface/trl#7039", "grpo_lora.py",
        "eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)",
        "eos_token_ids = list(eos_token_ids)[:1]; "
        "eos = torch.tensor(eos_token_ids, dtype=torch.long, device=device)",
        "test_rows_end_with_their_first_eos_and_are_padded_after_it"),
    Bug(27, "an evaluator that runs model text",
        "Jiayi-Pan/TinyZero@f36b1b8, verl/utils/reward_score/countdown.py", "rewards.py",
        "text = re.sub(_NUMBER, _value, ",
        "text = str(eval(text)) if text and set(text) <= set('0123456789*') else text; "
        "text = re.sub(_NUMBER, _value, ",
        "test_answers_match_examples"),
    Bug(27, "a substring taken for a match",
        "PrimeIntellect-ai/verifiers#763", "rewards.py",
        "canonical_answer(a) == canonical_answer(b)", "a in b",
        "test_answers_match_examples"),
    Bug(28, "the loss of the last micro-batch reported",
        "allenai/allennlp#4706", "grpo_lora.py",
        "total += loss.item()", "total = loss.item()",
        "test_the_logged_loss_is_that_of_the_whole_batch"),
    Bug(28, "grad norm read after zero_grad",
        "Lightning-AI/pytorch-lightning#272", "grpo_lora.py",
        'metrics = {"loss": loss, "grad_norm": norm,',
        "self.optimizer.zero_grad(set_to_none=False); "
        "norm = nn.utils.clip_grad_norm_(self.params.values(), 1.0).item(); "
        'metrics = {"loss": loss, "grad_norm": norm,',
        "test_the_logged_loss_is_that_of_the_whole_batch"),
    Bug(29, "the sampler's log-probs compared with those of a policy that has moved since",
        "this project", "grpo_lora.py",
        "(micro.old_logps - piece.logps)", "(logps.detach() - piece.logps)",
        "test_the_gap_compares_sampler_and_scorer_of_one_policy"),
    Bug(30, "old checkpoints counted from a damaged later one, so that the new one is deleted",
        "this project", "runner/checkpoints.py",
        " if number(p) <= trainer.step", "",
        "test_old_checkpoints_are_counted_from_the_present_update"),
    Bug(31, "what a reward logs replaces the trainer's own metric of that name",
        "this project", "grpo_lora.py",
        "own | metrics | own", "own | metrics",
        "test_names_that_rewards_log_do_not_stand_in_for_ours"),
    # `parse` does not ask HfArgumentParser to look for such a file. The patch does what that did.
    Bug(32, "a file named like the script is read as settings, unasked",
        "this project", "runner/cli.py",
        "parser, argv = make_parser(), list(argv)",
        'parser, beside = make_parser(), Path(sys.argv[0]).with_suffix(".args"); '
        'argv = [f"@{beside}"] * beside.exists() + list(argv)',
        "test_no_file_beside_the_script_is_read_unasked"),
    Bug(33, "a NaN policy goes unnoticed where all rewards are equal",
        "this project", "grpo_lora.py",
        "loss if self.last_batch[0].logps.isfinite().all() else math.nan", "loss",
        "test_a_policy_that_is_nan_is_noticed_where_no_group_has_an_advantage"),
    Bug(34, "a library renames the cache, and every model takes the slow path unnoticed",
        "this project", "grpo_lora.py",
        'names = ("cache", "past_key_values")', 'names = ("past_key_value",)',
        "test_prompts_go_through_together_only_where_left_padding_is_safe"),
    Bug(35, "DoRA's magnitude kept in the base's half precision, which rounds its updates away",
        "huggingface/trl#7268", "lora.py",
        "nn.Parameter(self._norm())",
        "nn.Parameter(self._norm().to(self.base_layer.weight.dtype))",
        "test_doras_magnitude_keeps_small_updates_on_a_bf16_base"),
    Bug(36, "white space taken out of answers, so that 1 1/2 is 11/2",
        "hendrycks/math, modeling/math_equivalence.py", "rewards.py",
        '|\\\\q?quad(?![A-Za-z])|\\s)+", " ")', '|\\\\q?quad(?![A-Za-z])|\\s)+", "")',
        "test_answers_match_examples"),
    Bug(36, "x = 3 and y = 3 are one answer: what stands before the sign is dropped",
        "hendrycks/math, modeling/math_equivalence.py", "rewards.py",
        "x and y and x != y", "False",
        "test_answers_match_examples"),
    Bug(36, "the case of a LaTeX command is dropped: \\\\gamma is \\\\Gamma",
        "this project", "rewards.py",
        r'(?<!\\)(?<![^\\]\{)\b(?:(?i:yes|no)', r'\b(?:(?i:yes|no)',
        "test_answers_match_examples"),
    Bug(37, "an answer inside a thought that never ended is graded",
        "this project", "rewards.py",
        '.partition("<think>")[0]', "", "test_extract_answer_examples"),
    Bug(38, "the <think> that a template opened is not part of the completion",
        "huggingface/trl#6966", "grpo_lora.py",
        "opened[i // G] + text", "text",
        "test_a_tag_that_the_template_opened_belongs_to_the_completion"),
    Bug(39, "tags that are special tokens vanish before rewards see them",
        "huggingface/trl#2897", "grpo_lora.py",
        "[[i for i in row if i not in ends] for row in ids])", "ids, skip_special_tokens=True)",
        "test_tags_that_are_special_tokens_reach_the_rewards_and_eos_does_not"),
    Bug(40, "a text prompt that holds the template gets a second BOS",
        "this project", "grpo_lora.py",
        "if not plain or plain[0] == tokenizer.bos_token_id:", "if not plain:",
        "test_a_text_prompt_gets_one_bos_and_no_eos"),
    Bug(40, "a tokenizer that appends EOS ends every prompt with one",
        "this project", "grpo_lora.py",
        "return ids[: ids.index(plain[0]) + len(plain)]", "return ids",
        "test_a_text_prompt_gets_one_bos_and_no_eos"),
    Bug(41, "a padding token beyond the embedding",
        "huggingface/transformers#23401", "grpo_lora.py",
        "self.pad_token_id = self.eos_token_ids[0]",
        "self.pad_token_id = self.tokenizer.pad_token_id",
        "test_a_padding_token_beyond_the_embeddings_does_no_harm"),
    Bug(42, "rewards share the lists that they are given",
        "this project", "rewards.py",
        "**copy.deepcopy(columns), **given", "**columns, **given",
        "test_one_reward_cannot_change_what_the_next_one_sees"),
    Bug(43, "float16 cannot hold a gradient that was divided by all tokens before the backward pass",
        "this project", "grpo_lora.py",
        "scale = 2.0 ** int(", "scale = 1.0 ** int(",
        "test_half_precision_keeps_a_gradient_that_is_divided_by_a_million_tokens"),
    Bug(44, "a run that is resumed to a later end begins at the rate of the old one",
        "this project", "grpo_lora.py",
        "for group in self.optimizer.param_groups:\n"
        '            group["lr"] = group["initial_lr"] * self.schedule(self.step)\n'
        "        finite = math.isfinite(loss) and math.isfinite(norm)\n"
        "        if finite:\n            self.optimizer.step()\n",
        "finite = math.isfinite(loss) and math.isfinite(norm)\n"
        "        if finite:\n            self.optimizer.step()\n"
        "        for group in self.optimizer.param_groups:\n"
        '            group["lr"] = group["initial_lr"] * self.schedule(self.step + 1)\n',
        "test_a_schedule_that_goes_on_to_a_later_end_has_the_rate_of_a_straight_run"),
    Bug(45, "a folder is opened to flush it, which Windows cannot",
        "this project", "runner/checkpoints.py",
        "if path.is_dir():\n            return", "pass",
        "test_a_checkpoint_needs_no_folder_that_can_be_opened"),
    Bug(46, "a layer computed again in the backward pass saves other tensors than it did before",
        "this project", "runner/fast.py",
        "(plain_down, nullcontext) if again else (narrow_inputs, quick_products)",
        "(narrow_inputs, nullcontext)",
        "test_a_half_precision_base_trains_under_activation_checkpointing"),
    Bug(47, "layers are computed again in the backward pass, but without the dropout of the forward",
        "this project", "grpo_lora.py",
        "(loss * loss_scale).backward()", "self.model.eval(); (loss * loss_scale).backward()",
        "test_layers_computed_again_in_the_backward_pass_are_in_the_mode_of_the_forward"),
    Bug(48, "train mode, which checkpointing needs, lets the base model drop out",
        "this project", "grpo_lora.py",
        "held.update(dict.fromkeys(off, 0.0), training=", "held.update(training=",
        "test_a_dropout_rate_that_layers_hold_as_a_number_does_not_act_under_checkpointing"),
    Bug(49, "a layout is looked for by a regular expression that takes quadratic time",
        "this project", "rewards.py",
        "all(text.count(tag) == 1 for tag in TAGS) and layout.fullmatch(text)",
        "layout.fullmatch(text) and all(text.count(tag) == 1 for tag in TAGS)",
        "test_the_layout_of_many_repeated_tags_is_refused_at_once"),
    Bug(50, "equal rewards get what is left when the batch's mean is taken off",
        "this project", "grpo_lora.py",
        "return torch.where(each.flatten(1).any(dim=1, keepdim=True), total, 0.0)", "return total",
        "test_several_rewards_are_weighted_once_and_none_is_not_zero"),
    Bug(51, "five twelfths is five, with a unit",
        "this project", "rewards.py",
        "|(?!month)[a-z]*th|", "|",
        "test_answers_match_examples"),
    Bug(52, "of several patterns for a layer another one counts once the adapter is saved and loaded",
        "this project", "lora.py",
        "json.dumps(config, indent=2,", "json.dumps(config, indent=2, sort_keys=True,",
        "test_a_saved_adapter_comes_back_to_the_bit_and_trainable"),
    Bug(53, "opmd's square is dropped in groups without advantage from the second update on",
        "this project", "grpo_lora.py",
        'args.beta or args.loss_type == "opmd" or', "args.beta or",
        "test_what_is_skipped_has_no_gradient_in_later_updates_either"),
    Bug(54, "the standard deviation of no reward at all is reported as 0",
        "this project", "grpo_lora.py",
        "/ (n - 1).clamp(min=0)", "/ (n - 1)",
        "test_rewards_may_be_async_may_say_none_and_are_weighted"),
    Bug(55, "old log-probs that carry a gradient cancel that of the policy: nothing is learnt",
        "this project", "grpo_lora.py",
        "torch.where(mask, old_logps.detach(), 0.0)", "torch.where(mask, old_logps, 0.0)",
        "test_the_log_probs_alone_carry_gradients_also_where_they_are_passed_as_the_old_ones"),
    Bug(56, "a ratio that float16 cannot hold makes the gradient NaN",
        "this project", "grpo_lora.py",
        "clamp(max=min(80, math.log(torch.finfo(logps.dtype).max) - 1))", "clamp(max=80)",
        "test_a_policy_far_off_has_finite_gradients_in_any_precision"),
    Bug(57, "longrope: a row that grows beyond the original window changes what all others see",
        "this project", "grpo_lora.py",
        'if (rope or {}).get("rope_type") == "longrope":', "if False:",
        "test_a_window_that_changes_the_frequencies_of_all_rows_is_not_left"),
    Bug(58, "a reward that calls sys.exit ends the run with status 0 and no word",
        "this project", "rewards.py",
        "except (Exception, SystemExit) as error", "except Exception as error",
        "test_a_reward_that_fails_is_named"),
    Bug(59, "0.333... is taken for 0.333",
        "this project", "rewards.py",
        r'(?<![.\s])\s*\.?[,;:\s]*$', r'[.,;:\s]*$',
        "test_answers_match_examples"),
    Bug(60, "a number is looked for by a pattern that gives digits back, in cubic time",
        "this project", "rewards.py",
        r"[0-9]++\.?[0-9]*+|\.[0-9]++", r"[0-9]+\.?[0-9]*|\.[0-9]+",
        "test_a_long_fraction_that_is_none_is_refused_at_once"),
    Bug(61, "a row with an empty answer and a solution, as in joined data, is not scored",
        "this project", "rewards.py",
        '"solution" in row and gold_answer(row.get("answer")) is None',
        '"solution" in row and row.get("answer") is None',
        "test_a_solution_serves_where_an_answer_is_missing_or_none"),
    Bug(62, "an adapter is refused for a name in its file that matches no layer, which PEFT passes over",
        "this project", "lora.py",
        "make_adapters(model, config, strict=False)", "make_adapters(model, config)",
        "test_a_name_in_a_file_may_match_no_module_if_another_does"),
    Bug(63, "resuming a run that ended without a checkpoint writes over it",
        "this project", "runner/checkpoints.py",
        'if (root / "adapter").exists() and', "if False and",
        "test_a_run_that_ended_without_a_checkpoint_is_not_written_over"),
    Bug(64, "a resumed run may be evaluated on other data than before",
        "this project", "runner/checkpoints.py",
        'same[f"{name} data"] = data.hexdigest()',
        'same |= {"train data": data.hexdigest()} if name == "train" else {}',
        "test_a_resumed_run_is_evaluated_on_the_rows_that_it_was"),
    Bug(65, "digits lose their leading zeros, so that 0,05 is 0,5 and 1/11 is 1",
        "this project", "rewards.py",
        r"(?!(?<=[^\n])0[0-9]|-0,|[+-]?[0-9]+\.000,)", "", "test_answers_match_examples"),
    Bug(66, "any word is a unit, so that 2 theta is 2",
        "this project", "rewards.py",
        "|[a-z]{2,}[a-rt-z]s)", "|[a-z]*)", "test_answers_match_examples"),
    Bug(66, "short names lose their case, so that AB is ab, and MPa mPa",
        "this project", "rewards.py",
        r"[^\W\d_][^\W\d_A-Z]{3,}|[A-Z]{4,}", r"[^\W\d_]{2,}", "test_answers_match_examples"),
    Bug(66, "a sum of money in one currency is that in another",
        "this project", "rewards.py",
        "dollar(text)", "unwrap(str(text))", "test_answers_match_examples"),
    Bug(67, "a product before the sign is taken for a name: xy = 1 is 1",
        "this project", "rewards.py",
        r"[A-Za-z]+|[A-Za-z])\s*=", r"[A-Za-z]+|[A-Za-z]+)\s*=", "test_answers_match_examples"),
    Bug(68, "a set is cut at the commas within its elements, and then sorted",
        "this project", "rewards.py",
        r'(?![^{]*\})", match[1]', '", match[1]', "test_answers_match_examples"),
    Bug(69, r"\boxed 2\pi is read as 2",
        "this project", "rewards.py",
        r'(?=[.,;:!?]?(?:\$|[ \t]*$)|[.;:!?]\s)', "", "test_extract_answer_examples"),
    Bug(69, r"\boxed 2 \pi is read as 2",
        "this project", "rewards.py",
        r"(?:\$|[ \t]*$)|[.;:!?]\s)", r"(?:\$|\s|$))", "test_an_answer_is_read_whole_or_not_at_all"),
    Bug(70, "the reference drifts where a weight below an adapter is trained too",
        "this project", "lora.py",
        "own = {id(p) for p in _file_tensors(adapters).values()}",
        "own = {id(p) for m in adapters.values() for p in m.parameters()}",
        "test_the_reference_is_the_policy_that_training_starts_from"),
    Bug(71, "a snapshot within lora_merged is the policy of now",
        "this project", "lora.py",
        'stack.enter_context(patch.object(module, "merged", None))', "pass",
        "test_a_snapshot_is_the_policy_of_its_moment"),
    Bug(72, "a model is merged, but for layers that are quantised, and then an error ends it",
        "this project", "lora.py",
        "type(parameter) is nn.Parameter and parameter.is_floating_point()", "True",
        "test_a_merged_and_unloaded_model_keeps_what_was_trained_in_full"),
    Bug(73, "a language model inside a model for images cannot be run",
        "this project", "grpo_lora.py",
        "_DecoderOutput(transformers.modeling_outputs.BaseModelOutput):", "_DecoderOutput(tuple):",
        "test_a_model_for_text_and_images_trains_on_text"),
    Bug(74, "where the mean of a group's rewards is negative, MaxRL's advantages point the wrong way",
        "this project", "grpo_lora.py",
        "mean.clamp(min=0)", "mean", "test_max_rl_divides_by_no_negative_mean"),
    Bug(75, "a state with a frozen reference is loaded, and the reference is the base model",
        "this project", "grpo_lora.py",
        'self.reference = lora_snapshot(self.model, state["reference"])',
        'self.reference.tensors = state["reference"]',
        "test_a_trainer_goes_on_from_the_state_of_another"),
    Bug(76, "--device cuda trains on the CPU where there is no GPU",
        "this project", "runner/processes.py",
        '(name == "cuda" and gpus > 0)', 'name == "cuda"',
        "test_a_gpu_that_is_not_there_is_refused"),
    Bug(77, "a run that was killed before its first checkpoint is resumed as another one",
        "this project", "runner/checkpoints.py",
        'if (root / "run.json").exists():', "if False:",
        "test_a_run_without_a_checkpoint_is_not_taken_for_another_when_it_is_resumed"),
    Bug(78, r"a set of commands that never closes is read in exponential time",
        "this project", "rewards.py",
        r"\\[A-Za-z]++|", r"\\[A-Za-z]+|", "test_a_set_that_never_closes_is_passed_over_at_once"),
    Bug(79, "a set that goes on is sorted: 0, -1, -2, ... is -2, -1, 0, ...",
        "this project", "rewards.py",
        r"(?!.*(?:\.\.|…|dots|[:|]|mid))", "", "test_answers_that_look_alike"),
    Bug(80, "a currency behind a name is not seen: x = $5 is x = €5",
        "this project", "rewards.py",
        r"((?:.*=\s*)?[+-]?", "([+-]?", "test_answers_that_look_alike"),
    Bug(81, "a number in words is taken for a unit: 5 m dollars is 5",
        "this project", "rewards.py",
        "|sec|mm|[a-z])", "|sec|mm)", "test_answers_that_look_alike"),
    Bug(82, "three digits and a slash are taken for a fraction: 1 200/300 is 1 2/3",
        "this project", "rewards.py",
        " and (above or len(top) != 3)", "", "test_answers_that_look_alike"),
    Bug(83, "what a tool or the user says is graded as the assistant's answer",
        "this project", "rewards.py",
        ' and completion.get("role", "assistant") == "assistant"', "",
        "test_only_what_the_assistant_says_is_scored"),
    Bug(84, "a trainer holds itself in a circle, and its model stays in memory after it",
        "this project", "grpo_lora.py",
        "self.reward_metrics: list[Any] = []",
        "self.of_row = lambda row: self.encode(row); self.reward_metrics: list[Any] = []",
        "test_a_model_goes_with_its_trainer"),
    Bug(85, "two trainers that load one state share Adam's moments",
        "this project", "grpo_lora.py",
        'copy.deepcopy(state["optimizer"])', 'state["optimizer"]',
        "test_a_state_is_a_copy_and_fits_its_trainer_alone"),
    Bug(85, "a state changes as its trainer goes on",
        "this project", "grpo_lora.py",
        'copy.deepcopy(state | {"optimizer": self.optimizer.state_dict()})',
        'state | {"optimizer": self.optimizer.state_dict()}',
        "test_a_state_is_a_copy_and_fits_its_trainer_alone"),
    Bug(86, "an adapter of rank 1 is broadcast into one of a higher rank",
        "this project", "grpo_lora.py",
        ".view_as(parameter)", "", "test_a_state_is_a_copy_and_fits_its_trainer_alone"),
    Bug(87, "float16 weights are trained by Adam, whose eps is 0 there, and become NaN",
        "this project", "grpo_lora.py",
        "p.dtype == torch.float16 for p", "False for p", "test_float16_parameters_are_not_trained"),
    Bug(88, "groups are said to have equal rewards where MaxRL only has no advantage for them",
        "this project", "grpo_lora.py",
        "equal = ~group_advantages(total).any(dim=1)",
        "equal = ~advantages.any(dim=1)",
        "test_groups_of_equal_rewards_are_counted_by_their_rewards"),
    Bug(89, "a setting of the loss that is changed between updates acts in part",
        "this project", "grpo_lora.py",
        "return {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}",
        "made = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}\n"
        '        return vars(self).setdefault("made", made)',
        "test_a_setting_of_the_loss_may_change_between_updates"),
    Bug(90, "code that reads a switched-off module's weight, as Mamba does, gets the trained one",
        "this project", "lora.py",
        'wrapped = property(lambda self: "original" if self.disabled else "trained")',
        'wrapped = "trained"', "test_a_saved_module_that_is_off_shows_the_originals_attributes"),
    Bug(91, "an encoder is trained to predict tokens that it sees",
        "this project", "grpo_lora.py",
        ' or "bert" in config.model_type', "",
        "test_an_encoder_of_bert_generation_is_refused_and_its_decoder_taken"),
    Bug(92, "a run that saved nothing is written over when it is resumed",
        "this project", "runner/checkpoints.py",
        "if p.stat().st_size]", "if False]",
        "test_resuming_writes_over_no_record_of_a_run_that_saved_nothing"),
    Bug(93, "a callback that has saved one run saves nothing of the next",
        "this project", "runner/checkpoints.py",
        "if self.trainer() is trainer:", "if self.identity:",
        "test_one_callback_saves_the_runs_of_a_sweep_each_as_its_own"),
    Bug(94, "an async reward's client is bound to an event loop that is gone at its second call",
        "this project", "rewards.py",
        "submit(RUNNER.run, scores)", "submit(asyncio.run, scores)",
        "test_async_rewards_keep_one_event_loop"),
    Bug(95, "a run that may not be resumed is refused once, and written over at the second try",
        "this project", "runner/checkpoints.py",
        "self.identity, self.saved = identity(trainer), -1",
        "self.identity, self.saved, self.trainer = identity(trainer), -1, weakref.ref(trainer)",
        "test_resuming_writes_over_no_record_of_a_run_that_saved_nothing"),
    Bug(96, "a prompt that is padded on the right is sampled and scored as another, unnoticed",
        "this project", "grpo_lora.py",
        "if not mask.numel() or not mask[:, -1].all():", "if not mask.numel():",
        "test_prompts_that_are_not_padded_on_the_left_are_refused"),
    Bug(97, "a reward that logs by TRL's names of the arguments ends the run",
        "this project", "grpo_lora.py",
        "log_metric = lambda name, value: self.reward_metrics.append((1, {str(name): float(value)}))",
        "log_metric = lambda name, x: self.reward_metrics.append((1, {str(name): float(x)}))",
        "test_a_reward_may_log_by_trls_names_of_the_arguments"),
    Bug(98, "what a reward logs as a NumPy number or a tensor is recorded as text",
        "this project", "grpo_lora.py",
        'x.tolist() if hasattr(x, "tolist") else str(x)', "str(x)",
        "test_a_reward_may_log_by_trls_names_of_the_arguments"),
    Bug(99, "a decoder that numbers positions from an offset, as RoBERTa, is given them from 0",
        "this project", "grpo_lora.py",
        '"position_ids" in accepted and not own', '"position_ids" in accepted',
        "test_a_decoder_whose_positions_have_an_offset_counts_them_itself"),
    Bug(100, "a compiled model is refused for a reason that is not so",
        "this project", "grpo_lora.py",
        "patch.object(self.core, called, None)", "nullcontext()",
        "test_a_compiled_model_is_sampled_and_scored_uncompiled"),
    Bug(101, "the adapter of a compiled model is saved as one that PEFT loads as nothing",
        "this project", "lora.py",
        '_adapters(getattr(model, "_orig_mod", model))', "_adapters(model)",
        "test_the_adapter_of_a_compiled_model_is_saved_by_its_own_names"),
    Bug(102, "TRL's callbacks and learned reward models fail after a batch was sampled",
        "this project", "grpo_lora.py",
        "for one in (*funcs, *callbacks):", "for one in ():",
        "test_what_is_no_function_is_refused_before_anything_is_sampled"),
    Bug(103, "a temperature of 0 makes every log-prob NaN",
        "this project", "grpo_lora.py",
        "if not temperature > 0:", "if False:",
        "test_sampling_without_a_temperature_is_refused"),
    Bug(104, 'the text "false" switches a setting on',
        "this project", "lora.py",
        'rules.get("choices", [True, False] if f.type is bool else [])', 'rules.get("choices")',
        "test_a_setting_out_of_its_bounds_is_refused"),
    Bug(105, "a gold answer of many words is refused though it is marked, as was asked for",
        "this project", "rewards.py",
        "words = 0 if marked else len(", "words = len(",
        "test_a_marked_gold_answer_may_have_many_words"),
    Bug(106, "a gold answer that is an array scores 0, unnoticed",
        "this project", "rewards.py",
        'gold = gold.tolist() if hasattr(gold, "tolist") else gold', "pass",
        "test_a_gold_answer_may_be_an_array_of_one_and_not_of_two"),
    Bug(107, "Euler's e is the choice E",
        "this project", "rewards.py",
        "^[A-DF-HJ]$", "^[A-J]$", "test_answers_that_look_alike"),
    Bug(108, "a number of another base is read in base ten: 1e1 in base 16 is 10",
        "this project", "rewards.py",
        r"[)\]}](?!_)", r"[)\]}]", "test_answers_that_look_alike"),
    Bug(109, "no warning that entropy has collapsed where an early update had no gradient",
        "this project", "runner/watch.py",
        "values = [row[name] for row in self.rows if row.get(name) is not None]",
        "values = [row.get(name, math.nan) for row in self.rows]",
        "test_warning_entropy_though_an_early_update_had_no_gradient_and_so_no_entropy"),
    Bug(110, "a reward that is learnt in three updates is said to be no higher than at first",
        "this project", "runner/watch.py",
        "(rewards[:size], rewards[:3])", "(rewards[:size],)",
        "test_no_warning_of_a_reward_that_was_learnt_in_three_updates"),
    Bug(111, "the curve of a long run lacks the updates at which the gradient exploded",
        "this project", "runner/report.py",
        "max(s, key=height)", "s[0]",
        "test_a_curve_of_a_long_run_keeps_its_peaks_and_its_end"),
    Bug(112, "a run made again from its settings deletes checkpoints that were all to be kept",
        "this project", "runner/cli.py",
        'if value is None and name != "save_total_limit":', "if value is None:",
        "test_keeping_all_checkpoints_comes_back_from_the_file"),
    Bug(113, "an old checkpoint that is a link ends the run",
        "this project", "runner/checkpoints.py",
        "old.unlink() if old.is_symlink() else shutil.rmtree(old)", "shutil.rmtree(old)",
        "test_a_checkpoint_that_was_moved_away_and_linked_to_is_unlinked_when_it_is_old"),
    Bug(114, "the head is run to see whether it is trained, and draws other dropout for the loss",
        "this project", "runner/fast.py",
        "with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):", "if True:",
        "test_the_engine_has_the_plain_gradients_with_dropout_and_checkpointing"),
    Bug(115, "a layer that oneDNN multiplies is computed again in the backward pass by other means",
        "this project", "runner/fast.py",
        "(plain_down, nullcontext) if again else (narrow_inputs, quick_products)",
        "(plain_down if again else narrow_inputs), quick_products",
        "test_the_engine_has_the_plain_gradients_with_dropout_and_checkpointing"),
    Bug(116, "bitsandbytes repacks a 4-bit layer in eval mode, and nothing below gets a gradient",
        "this project", "lora.py",
        "setattr(m, REPACKS, False)", "pass",
        "test_a_layer_that_would_repack_itself_in_eval_mode_keeps_its_gradient"),
    Bug(116, "bitsandbytes repacks a 4-bit layer in eval mode, and nothing below gets a gradient",
        "this project", "grpo_lora.py",
        'key == "support_avx512bf16_for_cpu"', "False",
        "test_a_layer_that_would_repack_itself_in_eval_mode_keeps_its_gradient"),
    Bug(117, "a layer that passes no gradient is adapted, and those below it are not trained",
        "this project", "lora.py",
        "torch.autograd.grad(y.sum(), x)", "pass",
        "test_a_layer_that_passes_no_gradient_cannot_be_adapted"),
    Bug(118, "a row is cut to as many tokens as its mask has, so that a hole loses its end",
        "this project", "grpo_lora.py",
        "int((mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max())",
        "int(mask.sum(dim=1).max())",
        "test_a_mask_with_holes_keeps_what_comes_after_them"),
    Bug(119, "a state is loaded, and the reference is the adapter as it was saved, not the base",
        "this project", "grpo_lora.py",
        "elif isinstance(self.reference, lora_snapshot):", "elif False:",
        "test_a_state_brings_its_reference_to_a_trainer_of_an_adapter_that_was_trained"),
    Bug(120, "bfloat16 parameters are trained, and nearly every update is rounded away unsaid",
        "this project", "grpo_lora.py",
        "if any(p.dtype == torch.bfloat16 for p in self.params.values()):", "if False:",
        "test_training_bfloat16_parameters_is_warned_of_and_adapters_on_them_are_not"),
]
# fmt: on

# -------------------------------------------------------------------------- putting a bug back in

PROJECT = {"lora", "rewards", "grpo_lora", "runner", "checks", "test_math", "test_training"}
STAY = {"checks.gallery", "checks.test_gallery"}  # they do the loading
# where the tests named above live
TESTS = ("test_math", "test_training", "checks.test_trainer", "checks.test_runner")
TESTS += ("checks.test_families", "checks.test_processes")


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in PROJECT and name not in STAY


@functools.cache
def compiled(source: str, path: str) -> types.CodeType:
    return compile(source, path, "exec")


class PatchedLoader(SourceFileLoader):
    """Loads a module from its source, after a change."""

    def __init__(self, name: str, path: str, change: Callable[[str], str]) -> None:
        super().__init__(name, path)
        self.change = change

    def get_code(self, fullname: str) -> types.CodeType:
        return compiled(self.change(Path(self.path).read_text(encoding="utf-8")), self.path)


class PatchedFinder(MetaPathFinder):
    """Finds the project's own modules, one of them changed, before any other finder does."""

    def __init__(self, file: str, change: Callable[[str], str]) -> None:
        self.file, self.change = file, change

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        file = fullname.replace(".", "/") + ".py"
        if not is_ours(fullname) or not (HERE / file).exists():
            return None
        change = self.change if file == self.file else str  # str: no change
        loader = PatchedLoader(fullname, str(HERE / file), change)
        return importlib.util.spec_from_file_location(fullname, HERE / file, loader=loader)


@contextlib.contextmanager
def source_patched(file: str = "", right: str = "", wrong: str = "") -> Iterator[dict[str, Any]]:
    """The project's modules and tests, loaded anew, with `wrong` for `right` in one of the files.

    Yields the tests by name. What is imported within, by a test, say, is loaded anew too. After it
    all modules are those from before. Raises AssertionError unless `right` occurs exactly once.
    """
    if file:
        count = (HERE / file).read_text(encoding="utf-8").count(right)
        assert count == 1, f"the patch no longer applies: {file} has {right!r} {count} times"
    profile = hypothesis.settings.get_current_profile_name()
    finder = PatchedFinder(file, lambda source: source.replace(right, wrong))
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.meta_path.insert(0, finder)
    try:
        tests: dict[str, Any] = {}
        for name in TESTS:
            members = vars(importlib.import_module(name))
            tests |= {key: value for key, value in members.items() if key.startswith("test_")}
        yield tests
    finally:
        sys.meta_path.remove(finder)
        for name in list(filter(is_ours, sys.modules)):
            del sys.modules[name]
        sys.modules.update(saved)
        hypothesis.settings.load_profile(profile)  # the tests have loaded their own


class Captured:
    """Stands in for pytest's capsys."""

    def __init__(self) -> None:
        self.streams = io.StringIO(), io.StringIO()

    def readouterr(self) -> types.SimpleNamespace:
        out, err = (stream.getvalue() for stream in self.streams)
        for stream in self.streams:
            stream.seek(0)
            stream.truncate()
        return types.SimpleNamespace(out=out, err=err)


def run_test(function: Callable[..., Any]) -> None:
    """Call a test as pytest would, with each of its parameters, up to the first that fails.

    It may use the fixtures tmp_path, monkeypatch and capsys.
    """
    choices: list[list[dict[str, Any]]] = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
            rows = [value if len(names) > 1 else (value,) for value in values]
            choices.append([dict(zip(names, row, strict=True)) for row in rows])
    for combination in itertools.product(*choices):
        arguments = {key: value for part in combination for key, value in part.items()}
        captured = Captured()
        with (
            tempfile.TemporaryDirectory() as folder,
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(captured.streams[0]),
            contextlib.redirect_stderr(captured.streams[1]),
        ):
            fixtures = {"tmp_path": Path(folder), "monkeypatch": patch, "capsys": captured}
            wanted = inspect.signature(function).parameters
            function(**arguments, **{k: v for k, v in fixtures.items() if k in wanted})


# --------------------------------------------------------------------------------------- the page

ABOUT = """\
# The gallery of bugs

These {bugs} bugs are easy to make in GRPO and LoRA. Most of them raise no error: the model just
learns less, or learns something else.

For each bug, [gallery.py](gallery.py) has a small patch that puts it back into this code, and names
the test that must then fail. Some bugs have several patches; there are {patches} in all. To run
them:

    pytest checks/test_gallery.py

"Seen in" links to the issue, pull request or file that has the bug. A link to a file names the
commit that we read; it may have been repaired since. "A common slip" means that we know no public
source, and "this project" that the bug was made here.

`python -m checks.gallery` writes this page.

| # | bug | seen in | the test that notices it |
| --- | --- | --- | --- |
"""


def linked(seen: str) -> str:
    """Where a bug was seen, in Markdown, with links."""
    web, repository = "https://github.com", r"([\w.-]+/[\w.-]+)"
    seen = re.sub(repository + r"#(\d+)", rf"[\1#\2]({web}/\1/issues/\2)", seen)
    return re.sub(repository + r"@(\w+), (\S+)", rf"[\1, \3]({web}/\1/blob/\2/\3)", seen)


def page() -> str:
    """GALLERY.md."""
    files = [HERE / (name.replace(".", "/") + ".py") for name in TESTS]
    sources = {file: file.read_text(encoding="utf-8") for file in files}
    lines = []
    for bug in GALLERY:
        home = next(file for file, text in sources.items() if f"\ndef {bug.test}(" in text)
        test = f"[`{bug.test}`]({os.path.relpath(home, PAGE.parent)})"
        lines.append(f"| {bug.number} | {bug.what} | {linked(bug.seen)} | {test} |\n")
    bugs = len({bug.number for bug in GALLERY})
    return ABOUT.format(bugs=bugs, patches=len(GALLERY)) + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
