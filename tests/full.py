"""What the default run leaves to `make test-all`: of some costly tests it takes a few cases, spread evenly.

The cases left out differ from those taken in the method or the backbone alone. Of products, every method and every
model stays with some case while there are no more of these than cases to take; where fewer are taken (compiled,
exported and traced models), the default run tries the mechanism on a few methods, and `make test-all` on each. Numbers
are cases that it takes, 0 for tests that measure or train for long, or in several processes.
"""

from __future__ import annotations

import pytest

TAKEN = {
    "test_one_sentence.py::test_gradients_of_single_images": 6,
    "test_matrix.py::test_threads_share_one_model": 8,
    "test_scan_matrix.py::test_lifting_on_an_uneven_grid": 3,
    "interop/test_openvino.py::test_answers_alike_at_any_batch": 1,
    "test_changed_layers.py::test_costs_are_those_of_the_plain_model": 8,
    "test_changed_layers.py::test_adapters_are_their_merged_weights_under_reduction": 30,
    "test_raster.py::test_one_graph": 0,
    "test_sam.py::test_compiled_and_exported": 0,
    "test_bench.py::test_compiled_runs_do_not_fall_back_to_eager": 0,
    "test_plain_mamba.py::test_export_with_any_batch": 0,
    "test_export.py::test_rotary_model_with_a_composition": 0,
    "test_own_backbone.py::test_export": 0,
    "test_selective_scan.py::test_exports_with_a_dynamic_batch": 0,
    "test_cait.py::test_compiled_and_exported": 0,
    # products by formula against a trace, every method on every backbone
    "test_macs.py::test_formula_is_what_tracing_counts": 8,
    "test_macs.py::test_budgets": 3,
    "test_models.py::test_multiply_adds": 1,
    "test_stvit.py::test_multiply_adds": 1,
    "test_stvit.py::test_compiled_and_exported": 0,
    "test_scan_costs.py::test_patched": 5,
    "test_svit_adapter.py::test_macs_are_those_of_a_trace": 1,
    # compiled, exported, traced, ONNX
    "test_any_batch.py::test_torchscript_onnx_keeps_the_batch_open": 3,
    "test_any_batch.py::test_traced_as_usual": 4,
    "test_compile.py::test_one_graph": 2,
    "test_convit.py::test_compiled_and_exported": 0,
    "test_counts.py::test_counts_that_stay_compile_nothing": 1,
    "test_dense_export.py::test_exported_at_any_batch": 1,
    "test_export.py::test_backbones_of_the_papers": 1,
    "test_export.py::test_every_method_with_any_batch": 1,
    "test_features.py::test_one_graph_and_one_program": 1,
    "test_models.py::test_compiled_gradients": 1,
    "test_models.py::test_onnx": 1,
    "test_plain_mamba.py::test_onnx": 0,
    "test_towers.py::test_one_graph": 1,
    "test_scan_commands.py::test_export": 1,
    "test_scan_graphs.py::test_an_exported_program_takes_any_batch": 1,
    "test_scan_graphs.py::test_exported_files_take_any_batch": 0,
    "test_scan_graphs.py::test_one_graph": 1,
    "test_selective_scan.py::test_compiles_to_one_graph": 1,
    "test_svit_adapter.py::test_compiled_and_exported": 0,
    "test_timm_contract.py::test_torchscript": 2,
    "test_token_distillation.py::test_compiled_in_one_graph": 1,
    "test_vim.py::test_export_with_any_batch": 0,
    "test_vim.py::test_onnx": 0,
    # vision-language models: families x recipes
    "test_vlm_droppers.py::test_a_batch_is_each_prompt_alone": 8,
    "test_vlm_droppers.py::test_merging_in_every_family": 3,
    "test_vlm.py::test_keeping_all_changes_nothing": 5,
    "test_vlm.py::test_a_selection_is_the_language_model_on_fewer_rows": 13,
    "test_vlm.py::test_a_batch_is_each_prompt_alone": 13,
    "test_vlm.py::test_cached_steps_are_those_without_a_cache": 13,
    "test_vlm.py::test_dropped_rows_are_those_of_a_slow_reference": 4,
    "test_vlm.py::test_beams_prompt_lookup_and_continuation": 4,
    "test_vlm_gradients.py::test_loss_and_gradients_are_those_of_shorter_embeddings": 6,
    "test_golden_vlm_sizes.py::test_other_sizes_are_understood": 0,
    "test_vlm_traps.py::test_flash_attention_by_its_convention": 4,
    "test_vlm_traps.py::test_a_second_turn_is_one_prompt": 4,
    "test_vlm_scores.py::test_scores_are_those_of_eager_maps": 5,
    "test_vlm_gradients.py::test_checkpointed_gradients_are_the_same": 4,
    "test_vlm.py::test_copies_and_pickles": 3,
    "test_vlm.py::test_eager_is_sdpa": 4,
    "test_vlm.py::test_a_selector_does_not_see_batch_mates": 6,
    "test_vlm_towers.py::test_a_tower_that_reduces_nothing_changes_nothing": 3,
    "test_vlm_towers.py::test_rows_come_from_the_reduced_tower": 6,
    "test_vlm_towers.py::test_a_batch_is_each_prompt_alone": 3,
    "test_vlm_calls.py::test_a_share_of_reading_a_prompt_is_solved": 3,
    "test_vlm_calls.py::test_prompts_in_chunks_with_a_selector": 6,
    "test_vlm_static.py::test_steps_are_those_of_a_dynamic_cache": 6,
    "test_vlm_videos.py::test_steps_are_those_without_a_cache": 3,
    "test_vlm_videos.py::test_prompts_with_images_and_videos_are_each_alone": 6,
    "test_vlm_static.py::test_a_cache_of_the_user": 4,
    "test_vlm_static.py::test_one_compiled_graph_serves_all_steps": 0,
    "test_vlm_calls.py::test_visual_rows_are_the_marked_ones": 5,
    "test_vlm_calls.py::test_gaps_of_positions_are_no_borders_of_packed_prompts": 4,
    "test_vlm_calls.py::test_flash_attention_sees_no_positions": 4,
    "test_vlm_calls.py::test_signatures_are_the_published_ones": 4,
    "test_vlm_calls.py::test_a_made_up_placeholder_is_a_word": 4,
    # several processes, long training
    "test_accuracy_scripts.py::test_fine_tuned": 0,
    "test_scan_graphs.py::test_gradients_of_two_processes": 0,
    "test_processes.py::test_counts_are_those_of_one_process": 0,
    "test_processes.py::test_the_search_finds_what_one_process_finds": 0,
    "test_processes.py::test_a_failure_ends_all_processes": 0,
    "test_processes.py::test_sharded_training_is_that_of_ddp": 0,
    "test_processes.py::test_checkpoints_are_the_same_files": 0,
    "test_processes.py::test_resumes_sharded_and_whole": 0,
    "test_processes.py::test_patched_blocks_are_the_units": 0,
    "test_processes.py::test_what_two_processes_counted_is_kept_for_one": 0,
    "test_processes.py::test_what_does_not_go_together": 0,
    "test_token_distillation.py::test_two_processes": 0,
    "test_learned_matrix.py::test_goes_on_bit_equal_after_sigkill": 0,
    "test_learned_matrix.py::test_two_processes_give_the_gradients_of_one": 0,
    "test_learned_matrix.py::test_one_graph": 1,
    "test_learned_matrix.py::test_exported": 1,
    "test_train_imagenet.py::test_fine_tunes_in_under_a_minute": 0,
    "test_train_imagenet.py::test_goes_on_bit_equal_after_sigkill": 0,
    "test_train_imagenet.py::test_parts_work_together": 1,
    "test_train_imagenet.py::test_two_processes_give_the_weights_of_one": 0,
    "test_training.py::test_shards": 0,
    "test_training.py::test_shards_in_two_processes": 0,
    "test_training.py::test_two_steps_with_every_method": 8,
    # large matrices, and a measurement
    "test_any_batch.py::test_meta_device": 1,
    "test_any_batch.py::test_no_images": 2,
    "test_any_batch.py::test_nothing_depends_on_gradients": 1,
    "test_batch_mates.py::test_lengths_of_their_own": 6,
    "test_changed_layers.py::test_zero_reduction_is_the_changed_model": 20,
    "test_composition.py::test_two_methods": 40,
    "test_dense_export.py::test_one_graph": 1,
    "test_docs.py::test_configuration_patches_its_backbone": 20,
    "test_dinov2_hub.py::test_the_same_weights_in_timm_give_the_same_answer": 28,
    "test_eva.py::test_compile": 1,
    "test_explaining.py::test_nothing_removed_is_the_grid_of_the_plain_model": 8,
    "test_explaining.py::test_rows_of_attention_sum_to_one": 8,
    "test_explaining.py::test_sums_over_the_grid_are_sums_over_tokens": 8,
    "test_features.py::test_dense_features_are_what_the_head_pools": 3,
    "test_features.py::test_scanning_models": 7,
    "test_features.py::test_the_head_reads_features_as_the_model_does": 3,
    "test_features_prompts.py::test_the_head_reads_features_with_prompts": 4,
    "test_golden_rules.py::test_understood": 2,
    "test_hf_calls.py::test_checkpointed_gradients_are_equal": 8,
    "test_hf_calls.py::test_hidden_patches_have_no_influence": 12,
    "test_hf_calls.py::test_lower_precision": 8,
    "test_hf_calls.py::test_survives_copies_after_a_training_step": 6,
    "test_hf_calls.py::test_threads_share_one_model": 4,
    "test_hf_library.py::test_older_versions_are_left_alone": 0,
    "test_hf_library.py::test_one_graph": 1,
    "test_hf_matrix.py::test_formula_is_what_tracing_counts": 10,
    "test_hf_matrix.py::test_means_outside_of_the_tower_weigh_by_size": 16,
    "test_hf_matrix.py::test_reduction": 40,
    "test_hf_matrix.py::test_zero_reduction_changes_nothing": 40,
    "test_hf_same_weights.py::test_same_numbers": 40,
    "test_hooks.py::test_every_attention_layer_runs_once": 30,
    "test_hooks.py::test_nothing_of_an_attention_outlives_it": 1,
    "test_hooks.py::test_what_hooks_change_has_effect": 30,
    "test_masks.py::test_hidden_pixels_and_options": 20,
    "test_masks.py::test_hidden_pixels_reach_no_visible_token": 40,
    "test_hf_towers.py::test_images_of_any_size_in_one_batch": 10,
    "test_hf_towers.py::test_padding_has_no_influence": 12,
    "test_matrix.py::test_reduction": 160,
    "test_matrix.py::test_zero_reduction_changes_nothing": 160,
    "test_memory.py::test_largest_tensor": 17,
    "test_models.py::test_export_with_any_batch": 1,
    "test_models.py::test_one_graph": 2,
    "test_naflex.py::test_images_do_not_feel_their_mates": 32,
    "test_other_libraries.py::test_checkpointed_gradients_are_equal": 6,
    "test_other_libraries.py::test_copies_after_a_training_step": 8,
    "test_other_libraries.py::test_counts_are_those_of_tracing": 15,
    "test_other_libraries.py::test_exported_with_any_batch": 0,
    "test_other_libraries.py::test_lower_precision": 12,
    "test_other_libraries.py::test_one_graph": 1,
    "test_other_libraries.py::test_reduction": 45,
    "test_other_libraries.py::test_the_same_weights_in_timm_give_the_same_answer": 28,
    "test_other_libraries.py::test_the_same_weights_in_transformers_give_the_same_answer": 10,
    "test_other_libraries.py::test_threads_share_one_model": 4,
    "test_other_libraries.py::test_two_processes_give_the_gradients_of_one": 0,
    "test_other_libraries.py::test_zero_reduction_changes_nothing": 45,
    "test_scan_graphs.py::test_compiled_gradients": 0,
    "test_scan_matrix.py::test_reduction": 24,
    "test_scan_matrix.py::test_two_methods": 22,
    "test_scan_matrix.py::test_zero_reduction_changes_nothing": 24,
    "test_sequences.py::test_prompts_are_what_they_are_without_a_patch": 15,
    "test_sequences.py::test_sizes_set_after_patching_are_followed": 15,
    "test_crossvit.py::test_compiled_and_exported": 0,
    "test_crossvit.py::test_formula_is_what_tracing_counts": 3,
    "test_crossvit.py::test_gradients_copies_threads_and_half_precision": 2,
    "test_crossvit.py::test_identity_reduction_and_undoing": 12,
    "test_stages.py::test_a_stage_begins_with_what_the_model_makes_of_all_places": 8,
    "test_stages.py::test_compiled_and_exported": 0,
    "test_stages.py::test_formula_is_what_tracing_counts": 8,
    "test_stages.py::test_gradients_copies_threads_and_half_precision": 4,
    "test_stages.py::test_reduction_and_undoing": 30,
    "test_stages.py::test_zero_reduction_changes_nothing": 30,
    "test_super_tokens.py::test_speed": 0,
    "test_towers.py::test_the_same_weights_give_the_same_logits": 9,
    "test_svit_adapter.py::test_budgets": 4,
    "test_svit_adapter.py::test_checkpointed_gradients_are_equal": 5,
    "test_svit_adapter.py::test_lower_precision_runs": 5,
    "test_svit_adapter.py::test_nearest_fill": 0,
    "test_svit_adapter.py::test_reduction_and_undoing": 9,
    "test_svit_adapter.py::test_survives_copies_after_a_training_step": 4,
    "test_svit_adapter.py::test_threads_share_one_model": 7,
    "test_svit_adapter.py::test_zero_reduction_changes_nothing": 16,
    "test_timm_contract.py::test_configuration": 10,
    "test_timm_contract_patched.py::test_features_and_head": 18,
    "test_timm_contract_patched.py::test_forward_and_backward": 18,
    "test_timm_contract_patched.py::test_pruned_models_hand_out_the_same": 8,
    "test_timm_contract_patched.py::test_the_meta_device": 12,
    "test_token_distillation.py::test_zero_without_reduction": 1,
    "test_training.py::test_training_configuration_loads_and_patches": 12,
    "test_whole_models.py::test_clip_models": 28,
    "test_volo.py::test_exported": 0,
    "test_volo.py::test_formula_is_what_tracing_counts": 4,
    "test_volo.py::test_identity_reduction_and_undoing": 16,
    "test_wrappers.py::test_classes_that_torch_derives": 12,
    "test_xcit.py::test_compiled_and_exported": 0,
    "test_xcit.py::test_features_are_what_the_head_pools": 6,
    "test_xcit.py::test_gradients_copies_and_half_precision": 6,
    "test_xcit.py::test_other_sizes": 4,
}


def left_out(items: list[pytest.Item]) -> set[str]:
    """Node ids that the default run leaves out.

    Of a product of methods and models, every method and every model stays with some case, as long as there are no more
    of these than cases to take.

    Args:
        items: all collected tests.
    """
    cases: dict[str, list[str]] = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0].removeprefix("tests/"), []).append(item.nodeid)
    gone: set[str] = set()
    for name, taken in TAKEN.items():
        ids = cases.get(name, [])
        if len(ids) > taken:
            keep = [ids[(2 * k + 1) * len(ids) // (2 * taken)] for k in range(taken)]
            gone |= set(ids) - {*keep, *_missing(ids, keep)}
    return gone


def _missing(ids: list[str], keep: list[str]) -> list[str]:
    """Cases with the parameters that none of those to keep has, one each."""
    parts = {case: case.partition("[")[2].removesuffix("]").split("-") for case in ids}
    if len(ids) < 2 or len({len(own) for own in parts.values()}) > 1:
        return []
    found = []
    for place in range(len(parts[ids[0]])):
        first: dict[str, str] = {}
        for case in ids:
            first.setdefault(parts[case][place], case)
        if len(first) <= len(keep):
            there = {parts[case][place] for case in keep}
            found += [case for value, case in first.items() if value not in there]
    return found
