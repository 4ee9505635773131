"""Does each promise's test notice? `python tests/broken_variants.py [P5 ...]` breaks the code in one place at a time, in a
copy of the repository, and runs that promise's test, which must fail. Minutes; not part of pytest.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANTS = (  # promise, what is broken, file, text that stands there once, its replacement, tests
    ("P3", "a LoRA is checked layer by layer", "lora/inject.py",
     "        check(self.model, adapter, name, widen, self._kept)\n", "", "test_lora.py"),
    ("P3", "keys that nobody knows are passed over", "lora/io.py",
     "if report.unused and (strict or unusable or not transformer):", "if report.unused and not transformer:",
     "test_lora_io.py::test_generated_files_are_applied_whole_or_not_at_all"),
    ("P3", "the same rows may change twice", "lora/io.py", "if start < last and first < stop:", "if False:",
     "test_lora_io.py::test_generated_files_are_applied_whole_or_not_at_all"),
    ("P3", "any width is filled up", "lora/io.py", "if term.A.shape[1] == place.narrower else", "if place.narrower else",
     "test_lora_io.py::test_generated_files_are_applied_whole_or_not_at_all"),
    ("P4", "alpha is divided by no rank", "lora/io.py", "(alpha / rank if alpha", "(alpha if alpha", "test_lora_io.py"),
    ("P4", "alpha is written without the rank", "lora/io.py", "torch.tensor(term.scale * term.rank)",
     "torch.tensor(term.scale)", "test_lora_io.py::test_round_trips"),
    ("P4", "the last layer is written unswapped", "lora/io.py",
     "        term = _exchanged(term)\n    if isinstance(term, LowRank):\n        B",
     "    if isinstance(term, LowRank):\n        B", "test_lora_io.py::test_round_trips"),
    ("P4", "a scale is rounded to bfloat16", "lora/io.py", "same if torch.equal(same.float(), wide) else wide", "same",
     "test_lora_io.py::test_round_trips"),
    ("P4", "q, k and v begin at the first row", "flux/lora_names.py", "layer, i * width, stop", "layer, 0, stop",
     "test_lora_io.py"),
    ("P13", "a merge writes into the base", "lora/inject.py", "    out.weight = nn.Parameter(weight, requires_grad=False)\n",
     "    base.weight.data = weight[:, :base.in_features]\n    out.weight = nn.Parameter(weight, requires_grad=False)\n",
     "test_lora.py"),
    ("P13", "new norms stay", "lora/inject.py", "        for name, original in self._kept.items():\n",
     "        for name, original in self._kept.items() if on else ():\n", "test_lora.py"),
    ("P15", "DoRA's norms leave the delta out", "lora/adapter.py", " + ((B @ (A @ A.T)) * B).sum(1)", "", "test_lora.py"),
    ("P15", "a part's column norms are the layer's", "lora/layers.py", "term.gain(weight_of(base)[start:stop].cpu())",
     "term.gain(weight_of(base)[:stop - start].cpu())", "test_lora.py"),
    ("fill", "what is known goes the wrong way", "flux/fill.py", "(img - true) / t", "(true - img) / t",
     "test_family.py::test_what_is_known_ends_at_its_own_latents"),
    ("edit", "all that changes is hidden", "flux/edits.py", "self.repaint * mask), mask", "mask), mask", "test_edits.py"),
    ("edit", "a white mask is white for some", "flux/edits.py", "self.mask_value * mask)", "mask)", "test_edits.py"),
    ("edit", "the source is cut out", "flux/edits.py", "drawn[..., drawn.shape[-1] // 2:]",
     "drawn[..., :drawn.shape[-1] // 2]", "test_edits.py"),
    ("edit", "the first layer is not saved", "flux/edit_training.py", "if self.embedder is not None:", "if False:",
     "test_influxedit.py::test_the_file_has_all_that_was_learned"),
    ("stream", "a block's weights stay", "flux/stream.py", "self.kept = put(fetched.matrices)", "put(fetched.matrices)",
     "test_stream.py"),
    ("reuse", "the threshold is twice as large", "flux/reuse.py", "small = change < self.threshold",
     "small = change < 2 * self.threshold", "test_reuse.py"),
    ("P5", "an infinite setting is a diverged number", "flux/optimiser.py", " and not math.isinf(value)", "",
     "test_optimiser.py"),
    ("P5", "a save writes into its place", "flux/resume.py", 'draft = folder.with_name(f".{folder.name}")',
     "draft = folder", "test_resume.py::test_killed_at_random_times test_resume.py::test_a_save_that_fails_anywhere"),
    ("P5", "old checkpoints go before the new one is there", "flux/resume.py",
     "    try:\n        if split:", "    shutil.rmtree(folder.parent / (folder.parent / 'latest').read_text(), True) if ("
     "folder.parent / 'latest').exists() else None\n    try:\n        if split:",
     "test_resume.py::test_killed_at_random_times test_resume.py::test_a_save_that_fails_anywhere"),
    ("P6", "the average starts anew", "flux/resume.py", "    fill_ema(average)\n", "", "test_resume.py::test_twelve_cuts"),
    ("P6", "the optimiser starts anew", "flux/resume.py", "    optimiser.state |= ", "    dict() | ",
     "test_resume.py::test_twelve_cuts"),
    ("P6", "micro-steps share their noise", "tests/test_resume.py", 'draws.generator(step, micro, "noise")',
     "torch.default_generator", "test_resume.py::test_twelve_cuts"),
    ("P7", "signals end the run where it is", "train.py", "lambda number, frame: kept.append(number)",
     "signal.default_int_handler", "test_resume.py::test_signals_wait_for_a_state_worth_saving"),
    ("P7", "a full disk leaves half a checkpoint", "flux/resume.py",
     "    finally:\n        if team.leads:\n            shutil.rmtree(draft, ignore_errors=True)\n    return folder",
     "    finally:\n        pass\n    return folder", "test_resume.py::test_a_disk_that_fills_up"),
    ("P8", "the crop is not part of an entry's name", "flux/finetune.py", "item.size, content(item.path)",
     "content(item.path)", "test_cache.py"),
    ("P8", "a damaged entry is believed", "flux/cache.py", 'metadata.get("sha256") == digest(kept)', "metadata",
     "test_cache.py::test_a_damaged_entry_is_made_again"),
    ("P9", "the loss is not looked at", "flux/guards.py", "if finite.all():\n            return\n        weight",
     "return\n        weight", "test_guards.py"),
    ("P9", "the gradients are not looked at", "flux/guards.py", "if not math.isfinite(norm):", "if False:",
     "test_guards.py"),
    ("P11", "links are not followed", "flux/data.py", "Path(os.path.realpath(root / name)).is_relative_to(",
     "Path(os.path.abspath(root / name)).is_relative_to(", "test_data.py::test_names_from_outside_stay_inside"),
    ("P11", "two dots are allowed", "flux/data.py", 'not parts.anchor and ".." not in parts.parts and Path(os.path.realpath('
     "root / name)).is_relative_to(\n            os.path.realpath(root))", "True",
     "test_data.py::test_two_hundred_hostile_names"),
    ("kernels", "gradients are turned the wrong way", "kernels/rope_attention.py",
     "dn = _turn(dn, angles, -1.0, TOKENS, E)", "dn = _turn(dn, angles, 1.0, TOKENS, E)",
     "test_rope_attention.py::test_in_the_interpreter"),
    ("kernels", "keys past the end are seen", "kernels/rope_attention.py",
     '    if RAGGED:\n        logits = tl.where(key + keys < length, logits, float("-inf"))\n', "",
     "test_rope_attention.py::test_in_the_interpreter"),
    ("kernels", "text takes the norm of the image", "kernels/rope_attention.py",
     "gamma = tl.where((tokens < split)[:, None], gamma, last)", "gamma = last",
     "test_rope_attention.py::test_in_the_interpreter"),
    ("kernels", "lse has no gradient", "kernels/rope_attention.py",
     "axis=1) - tl.load(dlse + line, mask=inside, other=0.0)", "axis=1)",
     "test_rope_attention.py::test_in_the_interpreter"),
    ("kernels", "a base's mean is its first columns'", "kernels/gated_lora_forward.py",
     "mean += step * (more / (before + more))", "mean += tl.where(at == start, step, 0.0)",
     "test_gated_lora.py::test_kernels_interpreted"),
    ("kernels", "LoRAs' statistics are not centred", "kernels/gated_lora_stack.py",
     "        part = part - means[-1][:, None]\n", "", "test_gated_lora.py::test_either_statistics"),
    ("kernels", "the norm's own gradient is left out", "kernels/gated_lora_backward.py",
     "t_ptr, _read(t_ptr, O, tile) - rstd * (m1 + n_b * m2)", "t_ptr, _read(t_ptr, O, tile)",
     "test_gated_lora.py::test_kernels_interpreted"),
    ("kernels", "ranks of the last block are dropped", "kernels/gated_lora_forward.py",
     "for r in range(first, stop, BR):", "for r in range(first, tl.minimum(stop, first + BR), BR):",
     "test_gated_lora.py::test_kernels_interpreted"),
    ("kernels", "competing gates do not add to one", "kernels/gated_lora_forward.py",
     "            weighted /= exps\n", "            weighted *= 1\n", "test_gated_lora.py::test_kernels_interpreted"),
    ("kernels", "gelu before the bias", "flux/linear.py", "return torch.ops.mkldnn._linear_pointwise(x, weight, bias,",
     "return bias + torch.ops.mkldnn._linear_pointwise(x, weight, None,",
     "test_model.py::test_gelu_is_as_exact_within_the_product_as_after_it"),
    ("P12", "tries are not counted", "vlm_client/client.py", "while tries < TRIES and (left", "while (left",
     "test_vlm_client.py::test_pauses_grow_and_differ test_vlm_client.py::test_nobody_listens"),
    ("P12", "a try may take all the time", "vlm_client/client.py", "limit = left if tries == TRIES else left / 2",
     "limit = 2 * left", "test_vlm_client.py::test_each_fault"),
    ("P12", "pauses are all the same", "vlm_client/client.py", " * random.uniform(0.5, 1)", "",
     "test_vlm_client.py::test_pauses_grow_and_differ"),
    ("P12", "Retry-After is passed over", "vlm_client/client.py", "            pause = failure.pause\n",
     "            pause = None\n", "test_vlm_client.py::test_retry_after_is_waited_for"),
    ("P12", "a refused format is offered again", "vlm_client/client.py", "                self.format = offered\n", "",
     "test_vlm_client.py::test_a_refused_format_is_not_offered_again"),
    ("P12", "a body has no end", "vlm_client/client.py", "if length > BODY_LIMIT:", "if False:",
     "test_vlm_client.py::test_each_fault"),
    ("P12", "the key is kept as it came", "vlm_client/client.py",
     'return text.replace(self._key, "***") if self._key else text', "return text",
     "test_vlm_client.py::test_the_key_goes_into_the_header_alone"),
    ("P12", "an answer is forgotten", "vlm_client/ledger.py", '            self.answers[row["key"]] = row\n\n\n',
     "            pass\n\n\n", "test_vlm_client.py::test_no_answered_question_is_asked_twice"),
    ("P12", "a torn line takes the next one along", "vlm_client/ledger.py", 'line, self.unfinished = b"\\n" + line, False',
     "self.unfinished = False", "test_vlm_client.py::test_a_torn_line_is_passed_over"),
    ("P12", "boxes reach over the edge", "vlm_client/critique.py", "tuple(min(max(part, 0.0), 1.0) for part in whole)",
     "whole", "test_vlm_critique.py"),
    ("artaug", "the second stage has no anchor", "flux/artaug/differential.py", "with self.wearing(anchor), inject",
     "with self.wearing(None), inject", "test_artaug_training.py::test_the_second_stage_stands_on_the_anchor"),
    ("artaug", "the paired target has the other sign", "flux/artaug/lessons.py", "+ z - after", "+ after - z",
     "test_artaug_training.py::test_the_losses_are_zero_where_they_should_be"),
    ("artaug", "the teacher wears what is learned", "flux/artaug/lessons.py", "without(self.taught(some)), img",
     "self.taught(some), img", "test_artaug_training.py::test_the_velocity_of_regions_is_learned"),
    ("artaug", "all pairs are taught by the first plan", "flux/artaug/differential.py", "[plans[some[k]] for k in here]",
     "[plans[some[here[0]]]] * len(here)", "test_artaug_training.py::test_each_pair_is_taught_by_its_own_plan"),
    ("artaug", "states are those of the pictures after", "flux/artaug/lessons.py", "self.after[some], share)",
     "self.after[some], 1.0)", "test_artaug_training.py::test_states_of_the_velocity_lie_between_both_pictures"),
    ("artaug", "what failed a rule is kept", "flux/artaug/pairs.py", "if not held]", "if not held][1:]",
     "test_artaug_pairs.py::test_every_rule_refuses_and_says_why"),
    ("artaug", "regions' prompts see one another", "flux/regional_attention.py", "weights[own, own] = 1",
     "weights[own, :text] = 1", "test_regional_attention.py::test_who_sees_whom"),
    ("artaug", "strengths are left out", "flux/regions.py", "torch.stack([region.strength * soften(",
     "torch.stack([soften(", "test_regions.py::test_two_equal_regions_are_one_of_twice_the_strength"),
    ("P14", "gradients stay at home", "flux/parallel.py", "and not last else nullcontext()", "else nullcontext()",
     "test_parallel.py"),
    ("P14", "the mean is taken for the sum", "train.py", "(loss * team.size).backward()", "loss.backward()",
     "test_parallel.py"),
    ("P14", "the average stays after a look at it", "flux/parallel.py", "reshard_after_forward=True",
     "reshard_after_forward=module is not act", "test_parallel.py"),
)


def notices(file: str, old: str, new: str, tests: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "out", "__pycache__"))
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
        (copy / file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *(f"tests/{test}" for test in tests.split())]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900)
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        return done.returncode == 1


def main() -> int:
    chosen = [variant for variant in VARIANTS if not sys.argv[1:] or variant[0] in sys.argv[1:]]
    missed = 0
    for promise, what, *variant in chosen:
        seen = notices(*variant)
        missed += not seen
        print(f"| {promise} | {what} | {'noticed' if seen else 'NOT NOTICED'} |", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
