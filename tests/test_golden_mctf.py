"""MCTF against the published implementation."""

import timm
import torch
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.adapters.vit.attention import attention_heads, attention_output, attention_values
from tokenzoo.core.tokens import trace_assign
from tokenzoo.maps import MergeMap
from tokenzoo.ops.attention import attend, attention_rows, key_bias
from tokenzoo.ops.matching.two_way import fusion_pairs
from tokenzoo.training import token_consistency

POOLINGS = {0: "size", 1: "attention", 2: "max", 3: "mean"}


@cases("mctf", lambda c: c.has("out_unm_idx"))
def test_matching_and_pooling(case: Case):
    s = case.settings
    check_settings(
        s, "B", "N", "C", "heads", "r", "size_given", "num_protected", "tau_sim", "tau_info", "tau_size", "bidirection",
        "pooling_types", "attn_used_for_matching", "N_out",
    )  # fmt: skip
    n, attn = s["N"], case["attn"]
    received = attn.mean(dim=(1, 2)) if s["attn_used_for_matching"] else torch.ones(s["B"], n)
    size = case["size"] if case.has("size") else None
    taus = (s["tau_sim"], s["tau_info"], s["tau_size"])
    pairs = fusion_pairs(case["x"], received, size, s["r"], s["num_protected"], taus, bool(s["bidirection"]))
    assert pairs.order.shape[1] == s["N_out"]
    plain = MergeMap(pairs.order, pairs.src, pairs.slot, n)
    assert torch.equal(plain.assign, case["out_source"])
    # indices of the official plan: rows of the even set, then rows of the odd set
    unm, src = 2 * case["out_unm_idx"], 2 * case["out_src_idx"]
    assert torch.equal(pairs.order[:, : unm.shape[1]], unm)
    assert torch.equal(pairs.src[:, : src.shape[1]], src)
    if case.has("out_unm_idx2"):
        assert torch.equal(pairs.order[:, unm.shape[1] :], 2 * case["out_unm_idx2"] + 1)
        assert torch.equal(pairs.src[:, src.shape[1] :], 2 * case["out_src_idx2"] + 1)
        assert torch.equal(pairs.slot[:, src.shape[1] :], case["out_dst_idx2"])

    ones = torch.ones(s["B"], n, 1) if size is None else size
    close(plain.pool(ones), case["out_size"], 1e-5)
    for kind in s["pooling_types"]:
        weight = {0: ones, 1: received.unsqueeze(-1) * ones}.get(kind)
        merge = MergeMap(pairs.order, pairs.src, pairs.slot, n, weight, "max" if kind == 2 else "mean")
        close(merge.apply(case["x"]), case[f"out_x_pool{kind}"], 1e-5)
        for head in range(s["heads"]):
            columns = merge.pool(attn[:, head].transpose(1, 2)).transpose(1, 2)
            close(merge.apply(columns), case[f"out_attn_pool{kind}"][:, head], 1e-5)


@cases("mctf", lambda c: c.has("out_attn_map"))
def test_attention(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "heads")
    attn = timm.layers.Attention(s["C"], s["heads"], qkv_bias=True).eval()
    attn.load_state_dict(case.part("weights"))
    heads, bias = attention_heads(attn, case["x"]), key_bias(case["size"], None)
    close(attention_rows(heads, 0, s["N"], bias), case["out_attn_map"], 1e-5)
    close(attention_output(attn, attend(heads, bias), case["x"]), case["out_normal"], 1e-5)
    given = (case["given_attn"] @ attention_values(attn, case["x"])).transpose(1, 2).flatten(2)
    close(attention_output(attn, given, case["x"]), case["out_with_given_attn"], 1e-5)


def options(s, r):
    return dict(
        layers=s["activate"], r=r, prop_attn=bool(s["prop_attn"]), one_step_ahead=s["one_step_ahead"],
        tau_sim=s["tau_sim"], tau_info=s["tau_info"], tau_size=s["tau_size"], bidirectional=bool(s["bidirection"]),
        pooling=POOLINGS[s["pooling_type"]], clip=True,
    )  # fmt: skip


@cases("mctf", lambda c: c.has("out_logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(
        s, "activate", "r_eval", "r_student", "r_teacher_max", "trace_source", "prop_attn", "one_step_ahead", "tau_sim",
        "tau_info", "tau_size", "bidirection", "pooling_type",
    )  # fmt: skip
    x = case.input(case["out_logits"].shape[0])
    model = case.model()
    tokenzoo.patch_model(model, "mctf", **options(s, s["r_eval"] or s["r_student"]))
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        close(model(x), case["out_logits"])
    if case.has("out_features"):
        close(tokens.x, case["out_features"])
    close(tokens.size, case["out_size"], 1e-5)
    expected = case["out_source_assign"]
    assert torch.equal(trace_assign(tokens.trace, len(x), expected.shape[1], x.device), expected)
    # upstream counts tokens at the MLP; merging at the end of a block shows one block later
    rows = [row for row in tokenzoo.report(model).rows if row.block is not None]
    inside = [row.tokens_in if s["one_step_ahead"] == 0 else row.tokens_out for row in rows]
    assert case["out_tokens_per_block"].tolist() in (inside, [row.tokens_out for row in rows])


@cases("mctf", lambda c: c.has("out_loss_consistency"))
def test_consistency(case: Case):
    s = case.settings
    check_settings(s, "activate", "r_student", "r_teacher_used", "threshold", "mctf_type", "note")
    targets = case["targets"]
    x = case.input(len(targets))
    kind = s["mctf_type"]
    names = ("r", "r_teacher", "trace", "prop_attn", "one_step_ahead", "tau_sim", "tau_info", "tau_size", "bidirection",
             "pooling_type")  # fmt: skip
    model = case.model().train()
    given = {**dict(zip(names, kind)), "activate": s["activate"]}
    tokenzoo.patch_model(model, "mctf", **options(given, s["r_student"]))
    student = model.forward_tokens(x)
    student_logits = model.forward_head(student)
    tokenzoo.update_method(model, r=s["r_teacher_used"])
    teacher = model.forward_tokens(x)
    close(student_logits, case["out_x_student"])
    close(model.forward_head(teacher), case["out_x_teacher"])
    found = token_consistency(student.x[:, 0], teacher.x[:, 0], student_logits, targets, s["threshold"])
    close(found.per_image, case["out_loss_per_image"])
    close(found.confidence, case["out_confidence"])
    close(found.loss.reshape(1), case["out_loss_consistency"])
    found.loss.backward()
    parameters = {name.replace(".", "_"): p for name, p in model.named_parameters()}
    for key, expected in case.matching(r"out_grad_.*").items():
        grad = parameters[key[len("out_grad_") :].replace(".", "_")].grad
        close(torch.zeros_like(expected) if grad is None else grad, expected)
