"""What the default run leaves to `make test-all`: of some costly tests it takes a few cases, spread evenly.

The cases left out differ from those taken in the method or the backbone alone; each method and each family is compiled,
exported and traced by some test of the default run. Numbers are cases that it takes, 0 for tests that measure or train
for long, of which a shorter sibling stays.
"""

from __future__ import annotations

import pytest

TAKEN = {
    # products by formula against a trace, every method on every backbone
    "test_macs.py::test_formula_is_what_tracing_counts": 60,
    "test_macs.py::test_budgets": 15,
    "test_models.py::test_multiply_adds": 7,
    "test_scan_costs.py::test_patched": 30,
    "test_svit_adapter.py::test_macs_are_those_of_a_trace": 4,
    # compiled, exported, ONNX
    "test_compile.py::test_one_graph": 12,
    "test_dense_export.py::test_exported_at_any_batch": 2,
    "test_export.py::test_backbones_of_the_papers": 2,
    "test_export.py::test_every_method_with_any_batch": 4,
    "test_models.py::test_compiled_gradients": 1,
    "test_models.py::test_onnx": 1,
    "test_plain_mamba.py::test_onnx": 0,
    "test_scan_commands.py::test_export": 1,
    "test_scan_graphs.py::test_an_exported_program_takes_any_batch": 1,
    "test_scan_graphs.py::test_exported_files_take_any_batch": 1,
    "test_svit_adapter.py::test_compiled_and_exported": 1,
    "test_token_distillation.py::test_compiled_in_one_graph": 1,
    "test_vim.py::test_export_with_any_batch": 0,
    "test_vim.py::test_onnx": 0,
    # several processes, long training
    "test_accuracy_scripts.py::test_fine_tuned": 0,
    "test_scan_graphs.py::test_gradients_of_two_processes": 0,
    "test_token_distillation.py::test_two_processes": 0,
    "test_train_imagenet.py::test_fine_tunes_in_under_a_minute": 0,
    "test_train_imagenet.py::test_goes_on_bit_equal_after_sigkill": 0,
    "test_train_imagenet.py::test_two_processes_give_the_weights_of_one": 1,
    "test_training.py::test_shards": 1,
    "test_training.py::test_shards_in_two_processes": 0,
    # large matrices, and a measurement
    "test_hooks.py::test_nothing_of_an_attention_outlives_it": 5,
    "test_scan_matrix.py::test_reduction": 72,
    "test_scan_matrix.py::test_two_methods": 43,
    "test_sequences.py::test_prompts_are_what_they_are_without_a_patch": 60,
    "test_super_tokens.py::test_speed": 0,
    "test_svit_adapter.py::test_nearest_fill": 0,
    "test_svit_adapter.py::test_reduction_and_undoing": 9,
    "test_svit_adapter.py::test_survives_copies_after_a_training_step": 4,
    "test_wrappers.py::test_classes_that_torch_derives": 12,
}


def left_out(items: list[pytest.Item]) -> set[str]:
    """Node ids that the default run leaves out.

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
            keep = {ids[(2 * k + 1) * len(ids) // (2 * taken)] for k in range(taken)}
            gone |= set(ids) - keep
    return gone
