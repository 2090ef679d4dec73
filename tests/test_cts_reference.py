"""CTS against slow loops: which groups are shared and in which order, half resolution, the policy network, refusals."""

import pytest
import torch
import torch.nn.functional as F
from cases import backbone_names, build, images
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenzoo
from tokenzoo.core.sharing import colour_variance, share_groups
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.layers.cts_policy import PolicyNetwork, load_policy, macs_per_group
from tokenzoo.maps import ReplaceMap


def members_of(group, grid):
    """Patches of a group in raster order."""
    row, column = divmod(group, grid[1] // 2)
    return [(2 * row + i) * grid[1] + 2 * column + j for i in (0, 1) for j in (0, 1)]


def slow_share(scores, grid, count):
    """One image: groups of patches in the new order, and which groups are shared."""
    best = sorted(range(len(scores)), key=lambda g: -scores[g])[:count]
    gone = {i for g in best for i in members_of(g, grid)}
    alone = [[i] for i in range(grid[0] * grid[1]) if i not in gone]
    return alone + [members_of(g, grid) for g in sorted(best)], sorted(best)


@settings(max_examples=60, deadline=None)
@given(
    half=st.tuples(st.integers(1, 4), st.integers(1, 4)), prefix=st.sampled_from([0, 1, 5]), seed=st.integers(0, 9999),
    share=st.floats(0, 1),
)  # fmt: skip
def test_groups(half, prefix, seed, share):
    g = torch.Generator().manual_seed(seed)
    grid, full = (2 * half[0], 2 * half[1]), half[0] * half[1]
    count = round(share * full)
    x, values = torch.randn(2, prefix + 4 * full, 5, generator=g), torch.randn(2, full, 5, generator=g)
    scores = torch.rand(2, full, generator=g)
    layout = Layout(prefix, prefix > 0, grid, track_size=True, track_positions=True)
    tokens = Tokens(x, layout)
    token_map = share_groups(tokens, scores, count, values)
    out = tokens.reduce(token_map)
    y = torch.randn(2, token_map.n_out, 3, generator=g)
    for image in range(2):
        own, best = slow_share(scores[image].tolist(), grid, count)
        new = [[i] for i in range(prefix)] + [[prefix + i for i in members] for members in own]
        assert token_map.n_out == len(new)
        for slot, members in enumerate(new):
            assert token_map.assign[image, members].tolist() == [slot] * len(members)
            assert out.positions[image, slot] == members[0] and out.size[image, slot] == len(members)
            assert torch.equal(token_map.lift(y)[image, members], y[image, slot].expand(len(members), -1))
            if len(members) == 1:
                assert torch.equal(out.x[image, slot], x[image, members[0]])
        assert torch.equal(out.x[image, len(new) - count :], values[image, best])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), first=st.integers(0, 5), second=st.integers(1, 4))
def test_sharing_twice_is_sharing_once(seed, first, second):
    """What is shared already, or lost a patch, stays out of a second round."""
    g = torch.Generator().manual_seed(seed)
    grid, scores = (6, 6), torch.rand(1, 9, generator=g)
    x, values = torch.randn(1, 37, 4, generator=g), torch.randn(1, 9, 4, generator=g)
    start = Tokens(x, Layout(1, True, grid, track_size=True, track_positions=True))
    once = share_groups(start, scores, first, values)
    middle = start.reduce(once)
    twice = share_groups(middle, scores, second, values)
    end = middle.reduce(twice)
    _, best = slow_share(scores[0].tolist(), grid, first + second)
    assert (end.size[0] == 4).sum() == first + second
    straight = start.reduce(share_groups(start, scores, first + second, values))
    by_place = lambda tokens: tokens.x[0, tokens.positions[0].argsort()]  # noqa: E731
    assert torch.equal(by_place(end), by_place(straight)) and torch.equal(
        end.positions.sort()[0], straight.positions.sort()[0]
    )


@pytest.mark.parametrize("groups,size", [((2, 3), (12, 18)), ((4, 2), (16, 24))])
def test_variance(groups, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    h, w = size[0] // groups[0], size[1] // groups[1]
    found = colour_variance(x, groups)
    for image in range(2):
        for g in range(groups[0] * groups[1]):
            row, column = divmod(g, groups[1])
            cell = x[image, :, row * h : (row + 1) * h, column * w : (column + 1) * w].double()
            assert float(found[image, g]) == pytest.approx(float(cell.flatten(1).var(1, correction=0).sum()), rel=1e-3)
    flat = torch.rand(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert (colour_variance(flat, (2, 2)) < 1e-10).all()
    # a flat quarter of an image that the groups do not divide still comes out as the flattest
    odd = torch.rand(1, 3, 31, 30)
    odd[:, :, :16, :16] = 0.5
    assert colour_variance(odd, (2, 2)).argmin() == 0


@pytest.mark.parametrize(
    "backbone", [name for name in ("registers", "gap", "non_square", "dinov3") if name in backbone_names()]
)
@torch.no_grad()
def test_all_shared_is_the_image_at_half_resolution(backbone):
    """Then the model sees the small image with the mean of the four positions, and nothing else."""
    model = build(backbone)
    x, prefix = images(model), model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    high, wide = grid[0] // 2, grid[1] // 2
    tokenzoo.patch_model(model, "cts", shared=high * wide)
    tokens = next(model.walk(x))
    small = F.avg_pool2d(x, 2)
    patches = F.conv2d(small, model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.patch_embed.patch_size)
    expected = patches.flatten(2).transpose(1, 2)
    if model.pos_embed is not None:
        places = model.pos_embed[:, -grid[0] * grid[1] :].unflatten(1, grid)
        mean = sum(places[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        expected = expected + mean.flatten(1, 2)
    expected = model.norm_pre(expected)
    torch.testing.assert_close(tokens.x[:, prefix:], expected, atol=1e-5, rtol=1e-4)
    assert tokens.size is None or (tokens.size[:, prefix:] == 4).all()


@torch.no_grad()
def test_flat_groups_are_shared_first():
    model = build("non_square")
    x = images(model, 1)
    x[:, :, 16:, 16:32] = 0.3  # group 4 of 2 x 3
    x[:, :, :16, 32:] = -1.0  # group 2
    tokenzoo.patch_model(model, "cts", shared=2)
    tokens = model.forward_tokens(x, trace=True)
    assert (tokens.trace[0].map.heads[0, -2:] - 1).tolist() == [members_of(2, (4, 6))[0], members_of(4, (4, 6))[0]]
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, "cts", shared=0.4)  # 2.4 of 6 groups
    assert model.forward_tokens(x).length == 25 - 9 == tokenzoo.report(model).tokens_out


def test_gradients_reach_the_embedding_through_both_resolutions():
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, "cts", shared=4)  # nothing but shared groups is left
    model(x).square().mean().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0 and model.pos_embed.grad[:, 1:].abs().sum() > 0


def test_policy_network():
    model = build("deit")
    x = images(model, 2)
    tokenzoo.patch_model(model, "cts", shared=2, score="policy", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    (network,) = (m for m in model.modules() if isinstance(m, PolicyNetwork))
    keys = set(network.state_dict())
    assert {"policy_net.head.weight", "policy_net.head.bias", "policy_net.backbone.conv_stem.weight"} <= keys
    assert network.policy_net["head"].weight.shape == (2, 320, 1, 1)
    assert all(key.startswith("policy_net.") for key in keys) and not network.training
    seen = {}
    network.policy_net["backbone"].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        # groups of 16 pixels are shown to the network with 32
        back = (x * torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) * 2 - 1
        shown = F.interpolate(back, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(seen["x"], shown)
        scores = network(back, (2, 2)).softmax(1)[:, 1].flatten(1)
        direct = network.policy_net["head"](network.policy_net["backbone"](shown)[-1])
        torch.testing.assert_close(network(back, (2, 2)), direct)
    best = scores.topk(2).indices.sort()[0]
    heads = tokens.trace[0].map.heads[:, -2:] - 1
    assert heads.tolist() == [[members_of(g, (4, 4))[0] for g in row] for row in best.tolist()]
    assert len(tokenzoo.report(model).rows) == 6


def test_policy_weights_load_by_their_published_names():
    torch.manual_seed(1)
    other = PolicyNetwork()
    model = build("deit")
    with pytest.raises(ValueError, match="holds 0 policy networks.*score='policy'"):
        load_policy(model, other.state_dict())
    tokenzoo.patch_model(model, "cts", shared=2, score="policy")
    state = {**other.state_dict(), "encoder.cls_token": torch.zeros(1)}
    load_policy(model, state)
    (network,) = (m for m in model.modules() if isinstance(m, PolicyNetwork))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())
    broken = dict(state)
    del broken["policy_net.head.bias"]
    with pytest.raises(ValueError, match="policy_net.head.bias are missing"):
        load_policy(model, broken)
    with pytest.raises(ValueError, match="policy_net.tail are unknown"):
        load_policy(model, {**state, "policy_net.tail": torch.zeros(1)})
    with pytest.raises(ValueError, match="policy_net.head.weight have another shape"):
        load_policy(model, {**state, "policy_net.head.weight": torch.zeros(2, 1280, 1, 1)})


def test_cost_of_the_policy_network():
    network = PolicyNetwork().eval()
    counter = FlopCountAnalysis(network.policy_net["backbone"], torch.zeros(1, 3, 96, 64))
    counter = counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    convolutions = counter.by_operator()["conv"]
    assert 6 * macs_per_group() == convolutions + 6 * 2 * 320


def test_replaced_values_have_no_matrix():
    x = torch.randn(1, 16, 4)
    token_map = share_groups(Tokens(x, Layout(0, False, (4, 4))), torch.rand(1, 4), 1, torch.randn(1, 4, 4))
    assert isinstance(token_map, ReplaceMap)
    with pytest.raises(TypeError, match="no matrix"):
        token_map.matrix()
    with pytest.raises(ValueError, match="4 channels.*applied to 5"):
        token_map.apply(torch.randn(1, 16, 5))


def odd():
    model = build("deit")
    model.set_input_size(img_size=(40, 32))
    return model


@pytest.mark.parametrize("make,options,error,words", [
    (None, {"shared": 5}, ValueError, ["cts at block 0", "shared=5", "5 groups", "there are 4"]),
    (None, {"shared": -1}, ValueError, ["shared=-1", "at least 0"]),
    (None, {"shared": 1.5}, ValueError, ["shared=1.5", "[0, 1]"]),
    (None, {"shared": True}, TypeError, ["shared=True", "0.4"]),
    (None, {"score": "entropy"}, ValueError, ["'entropy'", "'variance'"]),
    (None, {"layers": (1,)}, ValueError, ["layers=(1,)", "block 0"]),
    (None, {"mean": (0.5, 0.5)}, ValueError, ["mean=(0.5, 0.5)", "three"]),
    (None, {"std": (0.5, 0.0, 0.5)}, ValueError, ["std=(0.5, 0.0, 0.5)", "positive"]),
    (odd, {}, ValueError, ["cts: VisionTransformer", "5 x 4", "odd"]),
])  # fmt: skip
def test_refused(make, options, error, words):
    model = build("deit") if make is None else make()
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "cts", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not tokenzoo.is_patched(model)


def test_an_odd_image_is_refused_where_it_comes():
    model = build("dynamic")
    tokenzoo.patch_model(model, "cts", shared=1)
    with pytest.raises(ValueError, match="cts at block 0.*3 x 4 is odd"):
        model(torch.randn(1, 3, 24, 32))
