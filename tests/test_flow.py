"""The mathematics of the flow, each claim against an exact value: autograd's Jacobian, torch.distributions,
integration."""

import copy
import itertools
import shutil

import pytest
import torch
from torch.autograd.functional import jacobian

from csrc.device import dropout
from media.console import UserError
from talkingflow import (
    ActNorm,
    AffineCoupling,
    Clips,
    ConditionTCN,
    Config,
    FlowStep,
    InvertibleConv1x1,
    Prior,
    TalkingFlow,
    Trainer,
    by_doubling,
    frame_by_frame,
)


def make(dtype=torch.float64, awake=0.3, seed=0, **fields):
    """A flow whose couplings do something: their zero last layers get random weights of size `awake`."""
    torch.manual_seed(seed)
    flow = TalkingFlow(Config(**{"dim": 16, "cond_dim": 3, "hidden": 8} | fields)).to(dtype).eval()
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, ConditionTCN):
                module.out.weight.normal_(0, awake / module.out.in_features**0.5)
                module.out.bias.normal_(0, 0.1)
            if isinstance(module, ActNorm):
                module.bias.normal_(), module.logs.normal_(0, 0.1)
        if flow.prior.ar2:
            flow.prior.partial.normal_()
    return flow


def data(B=3, T=9, D=16, M=3, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.rand(B, T, D, dtype=dtype), torch.randn(B, T, M, dtype=dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def jacobian_of(f, x):
    """d f(x) / d x as a square matrix."""
    J = jacobian(f, x)
    return J.reshape(x.numel(), x.numel())


@pytest.mark.parametrize("prior", ["iid", "ar2"])
@pytest.mark.parametrize("dim, scales, steps, T",
                         [(16, 4, 2, 9), (17, 4, 2, 9), (5, 1, 3, 4), (23, 3, 1, 1),
                          (136, 4, 2, 2)])  # fmt: skip
def test_inverse_of_forward_is_the_identity_in_float64(dim, scales, steps, T, prior):
    flow = make(dim=dim, num_scales=scales, steps_per_scale=steps, lambdas=(0.5,) * scales, prior=prior)
    x, c = data(D=dim, T=T)
    zs, _ = flow(x, c)
    assert [z.shape[2] for z in zs] == flow.sizes and sum(flow.sizes) == dim
    assert (flow.inverse(zs, c) - x).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [2, 8])
def test_inverse_of_forward_is_the_identity_in_float32_up_to_32_couplings(steps):
    flow = make(torch.float32, dim=136, hidden=32, steps_per_scale=steps, scale_bound=1.0)
    x, c = data(D=136, T=40, dtype=torch.float32)
    assert (flow.inverse(flow(x, c)[0], c) - x).abs().max() < 1e-4


def test_inverse_of_forward_is_the_identity_after_training():
    flow = make(torch.float32, awake=0, dim=20).train()
    x, c = data(B=16, D=20, dtype=torch.float32)
    flow.initialize(x, c)
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        flow.nll(x, c).mean().backward()
        optimizer.step()
    flow.eval()
    assert (flow.inverse(flow(x, c)[0], c) - x).abs().max() < 1e-4
    flow.double()
    assert (flow.inverse(flow(x.double(), c.double())[0], c.double()) - x.double()).abs().max() < 1e-9


@pytest.mark.parametrize("layer", ["actnorm", "conv", "coupling", "step"])
def test_logdet_of_every_layer_equals_the_autograd_jacobian(layer):
    flow = make()
    step = flow.scales[0][0]
    x, c = data(B=1, T=4)
    call = {"actnorm": step.actnorm, "conv": step.conv, "coupling": lambda x: step.coupling(x, c),
            "step": lambda x: step(x, c)}[layer]  # fmt: skip
    expected = torch.linalg.slogdet(jacobian_of(lambda x: call(x)[0], x))[1]
    assert abs(call(x)[1] - expected).max() < 1e-10


@pytest.mark.parametrize("dim, scales", [(16, 4), (19, 4), (7, 2), (4, 1)])
def test_logdet_of_the_flow_equals_the_autograd_jacobian(dim, scales):
    flow = make(dim=dim, num_scales=scales, lambdas=(1.0,) * scales)
    x, c = data(B=1, T=5, D=dim)
    J = jacobian_of(lambda x: torch.cat(flow(x, c)[0], 2), x)
    assert abs(flow(x, c)[1] - torch.linalg.slogdet(J)[1]).max() < 1e-10


@pytest.mark.parametrize("determinant", [2.0, -2.0])
def test_logdet_of_the_convolution_is_finite_whatever_the_sign(determinant):
    conv = InvertibleConv1x1(3).double()
    conv.set_matrix(torch.diag(torch.tensor([1.0, 1.0, determinant])))
    x = torch.randn(1, 5, 3, dtype=torch.float64)
    y, logdet = conv(x)
    assert torch.allclose(logdet, 5 * torch.tensor(2.0, dtype=torch.float64).log())
    assert torch.allclose(conv.inverse(y), x)


def test_jacobian_is_block_lower_triangular_over_time_with_exact_zeros():
    flow = make()
    x, c = data(B=1, T=6)
    J = jacobian_of(lambda x: torch.cat(flow(x, c)[0], 2), x).reshape(6, 16, 6, 16)
    for t, tau in itertools.product(range(6), range(6)):
        if tau > t:
            assert (J[t, :, tau] == 0).all()
    assert J[5, :, 0].abs().max() > 0  # and the past does matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changed", ["landmarks", "sound"])
def test_a_changed_frame_leaves_every_earlier_latent_bit_identical(changed, dtype):
    flow = make(dtype)
    x, c = data(T=30, dtype=dtype)
    before = torch.cat(flow(x, c)[0], 2)
    (x if changed == "landmarks" else c)[:, 17:] += 5
    after = torch.cat(flow(x, c)[0], 2)
    assert torch.equal(before[:, :17], after[:, :17]) and not torch.equal(before[:, 17], after[:, 17])


@pytest.mark.parametrize("prior", ["iid", "ar2"])
def test_a_changed_sound_leaves_every_earlier_sampled_frame_bit_identical(prior):
    flow = make(torch.float32, prior=prior)
    c = data(T=30, dtype=torch.float32)[1]
    draw = lambda: flow.sample(c, generator=torch.Generator().manual_seed(5))
    before = draw()
    c[:, 17:] += 5
    after = draw()
    assert torch.equal(before[:, :17], after[:, :17]) and not torch.equal(before[:, 17], after[:, 17])


def test_receptive_field_of_the_condition_tcn_equals_its_formula():
    for k, dilations in ((2, (1, 2, 4, 8)), (3, (1, 2, 4, 8)), (2, (1, 3)), (1, (1, 2))):
        net = make(kernel_size=k, dilations=dilations).scales[0][0].coupling.net
        x = torch.randn(1, 60, 8, dtype=torch.float64, requires_grad=True)
        net(x, data(B=1, T=60)[1])[0, -1].sum().backward()
        seen = x.grad.abs().sum((0, 2)).nonzero().flatten()
        assert 60 - int(seen.min()) == 1 + (k - 1) * sum(dilations) and int(seen.max()) == 59


@pytest.mark.parametrize("prior", ["iid", "ar2"])
def test_density_integrates_to_one(prior):
    """Two coordinates, one frame: a sum over a fine grid, the coupling deciding a non-Gaussian shape."""
    flow = make(dim=2, num_scales=1, lambdas=(0.7,), awake=1.0, prior=prior)
    with torch.no_grad():
        std, mean = torch.std_mean(flow.sample(torch.zeros(2000, 1, 3, dtype=torch.float64)), (0, 1))
        axis = torch.linspace(-8, 8, 201, dtype=torch.float64)
        x = torch.cartesian_prod(axis, axis) * std + mean
        p = flow.log_prob(x[:, None], torch.zeros(len(x), 1, 3, dtype=torch.float64)).exp()
        assert abs(p.sum() * (axis[1] - axis[0]) ** 2 * std.prod() - 1) < 1e-3


def test_log_prob_with_the_iid_prior_equals_the_hand_sum():
    flow = make(prior="iid")
    x, c = data()
    zs, logdet = flow(x, c)
    by_hand = sum(
        torch.distributions.Normal(0, torch.tensor(lam).double().sqrt()).log_prob(z).sum((1, 2))
        for z, lam in zip(zs, flow.config.lambdas)
    )
    assert torch.allclose(flow.log_prob(x, c), by_hand + logdet, rtol=1e-12)
    assert torch.allclose(flow.nll(x, c), -(by_hand + logdet) / (9 * 16), rtol=1e-12)


@pytest.mark.parametrize("T", [1, 2, 3, 12])
def test_log_prob_with_the_ar2_prior_equals_a_dense_multivariate_normal(T):
    flow = make()
    x, c = data(T=T)
    zs, logdet = flow(x, c)
    z, prior = torch.cat(zs, 2), flow.prior
    r = z - flow.prior_mean(c)
    assert prior.mean_net is not None and flow.prior_mean(c).abs().max() > 0.01
    p1, p2 = prior.partials()
    expected = logdet.clone()
    for j in range(16):
        p1, p2 = p1.detach(), p2.detach()
        a1, a2 = float(p1[j] * (1 - p2[j])), float(p2[j])
        rho = [1.0, float(p1[j])]  # autocorrelations by the Yule-Walker recursion
        while len(rho) < T:
            rho.append(a1 * rho[-1] + a2 * rho[-2])
        correlation = torch.tensor(
            [[rho[abs(i - k)] for k in range(T)] for i in range(T)], dtype=torch.float64
        )
        normal = torch.distributions.MultivariateNormal(r.new_zeros(T), prior.variance[j] * correlation)
        expected += normal.log_prob(r[:, :, j])
    assert torch.allclose(flow.log_prob(x, c), expected, rtol=1e-10)


@pytest.mark.parametrize("prior", ["iid", "ar2"])
def test_forward_of_a_sample_gives_back_the_drawn_latents(prior):
    flow = make(prior=prior)
    c = data(T=25)[1]
    x = flow.sample(c, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(3, 16, generator=generator, dtype=torch.float64) for _ in range(25)], 1)
    z = flow.prior.sample(noise) + flow.prior_mean(c)
    assert (torch.cat(flow(x, c)[0], 2) - z).abs().max() < 1e-9


@pytest.mark.parametrize("prior", ["iid", "ar2"])
def test_samples_of_an_untrained_prior_have_its_moments(prior):
    flow = make(prior=prior, prior_mean=False)
    noise = torch.randn(4000, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = flow.prior.sample(noise)
    variance = flow.prior.variance
    assert ((z.mean(0) / variance.sqrt()).abs() < 0.09).all()
    assert ((z.var(0) / variance - 1).abs() < 0.13).all()
    lag1 = (z[:, 1:] * z[:, :-1]).mean((0, 1)) / variance
    assert ((lag1 - (flow.prior.partials()[0] if prior == "ar2" else 0)).abs() < 0.06).all()


@pytest.mark.parametrize("init", ["data", "random"])
def test_initialisation_gives_every_latent_its_priors_variance(init):
    torch.manual_seed(0)
    flow = TalkingFlow(Config(dim=20, cond_dim=3, hidden=8, init=init)).double()
    mixing = torch.randn(20, 20, dtype=torch.float64)
    x = torch.randn(200, 12, 20, dtype=torch.float64).cumsum(1) @ mixing + 3
    c = torch.randn(200, 12, 3, dtype=torch.float64) * 4 - 9
    flow.initialize(x, c)
    for z, lam in zip(flow(x, c)[0], flow.config.lambdas):
        assert z.mean((0, 1)).abs().max() < 1e-6
        assert abs(z.var((0, 1)).mean() / lam - 1) < (1e-3 if init == "data" else 0.5)
        assert init == "random" or (z.var((0, 1)) / lam - 1).abs().max() < 1e-3
    assert abs(flow.cond_mean.mean() + 9) < 0.1 and abs(flow.cond_std.mean() - 4) < 0.1
    with pytest.raises(AssertionError, match="once"):
        flow.initialize(x, c)


def test_initialisation_finds_the_autocorrelations_of_the_data():
    torch.manual_seed(0)
    x = torch.randn(300, 100, 16, dtype=torch.float64)
    for t in range(2, 100):
        x[:, t] += 1.4 * x[:, t - 1] - 0.5 * x[:, t - 2]
    flow = TalkingFlow(Config(dim=16, cond_dim=3, hidden=8)).double()
    flow.initialize(x[:, 40:], torch.randn(300, 60, 3, dtype=torch.float64))
    p1, p2 = flow.prior.partials()
    assert (p1 - 1.4 / 1.5).abs().max() < 0.01 and (p2 + 0.5).abs().max() < 0.03


def test_initialisation_survives_coordinates_that_repeat_each_other():
    torch.manual_seed(0)
    x = torch.randn(50, 20, 16)
    x[:, :, 3] = x[:, :, 5]
    x[:, :, 9] = 0.25  # never moves
    flow = TalkingFlow(Config(dim=16, cond_dim=3, hidden=8)).eval()
    c = torch.randn(50, 20, 3)
    flow.initialize(x, c)
    assert flow.nll(x, c).isfinite().all()
    assert (flow.inverse(flow(x, c)[0], c) - x).abs().max() < 1e-3


@pytest.mark.parametrize("prior", ["iid", "ar2"])
@pytest.mark.parametrize("block", range(1, 10))
def test_a_stream_equals_the_whole_sample_for_blocks_of_any_size(block, prior):
    flow = make(torch.float32, prior=prior, hidden=16)
    c = data(T=31, dtype=torch.float32)[1]
    whole = flow.sample(c, generator=seeded(4))
    stream = flow.stream(3, generator=seeded(4))
    parts = torch.cat([stream.push(part) for part in c.split(block, 1)], 1)
    assert (whole - parts).abs().max() < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(dim=37, kernel_size=3, steps_per_scale=3, mean_hidden=24),
        dict(kernel_size=1, prior_mean=False),
        dict(num_scales=1, lambdas=(1.0,), dilations=(3, 1), scale_bound=2.5),
    ],
)
def test_frames_and_longer_blocks_take_turns_in_a_stream(fields):
    """A frame alone goes through csrc/one_frame.py, which takes over what the layers remember."""
    flow = make(hidden=16, **fields)
    flow.cond_mean.normal_(), flow.cond_std.uniform_(0.5, 2)
    c = torch.randn(3, 43, flow.config.cond_dim, dtype=torch.float64)
    whole, stream = flow.sample(c, generator=seeded(4)), flow.stream(3, generator=seeded(4))
    parts = c.split([1, 1, 5, 1, 2, 1, 1, 1, 13, 1, 1, 1, 1, 1, 12], 1)
    assert (whole - torch.cat([stream.push(part) for part in parts], 1)).abs().max() < 1e-12


def test_what_steers_a_stream_steers_its_single_frames():
    flow = make(torch.float32, hidden=16)
    c, steer = data(T=31, dtype=torch.float32)[1], lambda z, c: (0.5 * z, c - 1)
    whole = flow.stream(3, generator=seeded(4), steer=steer).push(c)
    stream = flow.stream(3, generator=seeded(4), steer=steer)
    assert (whole - torch.cat([stream.push(part) for part in c.split(1, 1)], 1)).abs().max() < 1e-5
    assert (whole - flow.sample(c, generator=seeded(4))).abs().max() > 0.1


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_recursion_by_doubling_equals_the_one_frame_by_frame(dtype, error):
    """Random coefficients out to the edge of what the prior allows (partial autocorrelations of 0.9995), any
    length, any start; the error is relative to the largest value."""
    torch.manual_seed(0)
    for T in (1, 2, 3, 7, 64, 128):
        p1, p2 = 0.9995 * torch.tanh(4 * torch.randn(2, 500, dtype=torch.float64))
        a1, a2 = (p1 * (1 - p2)).to(dtype), p2.to(dtype)
        scale = ((1 - p1**2) * (1 - p2**2)).sqrt().to(dtype)  # that of the innovations of a variance of 1
        e, before = torch.randn(2, T, 500, dtype=dtype), torch.randn(2, 500, dtype=dtype)
        args = (e * scale, a1, a2, before, before)
        wanted = frame_by_frame(*(v.double() for v in args))
        got = by_doubling(*args)
        size = wanted.abs().amax((0, 1)).clamp_min(1)
        assert ((got - wanted).abs() / size).max() < error, T


@pytest.mark.parametrize("prior", ["iid", "ar2"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 30])
@torch.no_grad()
def test_a_streams_prior_is_the_same_to_the_last_bit_for_blocks_of_any_size(block, prior):
    flow = make(torch.float32, prior=prior)
    noise = torch.randn(3, 31, 16)
    whole, pieces = copy.deepcopy(flow.prior), copy.deepcopy(flow.prior)
    whole.remember(3), pieces.remember(3)
    r = torch.cat([pieces.sample(part) for part in noise.split(block, 1)], 1)
    assert torch.equal(r, whole.sample(noise)) and torch.equal(r, flow.prior.sample(noise))


def test_dropout_by_bytes_keeps_each_number_as_often_and_the_mean():
    torch.manual_seed(0)
    x = torch.ones(333, 1001, requires_grad=True)  # no multiple of 8
    y = dropout(x, 0.15)
    kept = (y.detach() > 0).float().flatten()
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(256 / 218))}
    for byte in range(8):  # each of those that one draw gives
        assert abs(kept[byte::8].mean() - 218 / 256) < 4 * (218 / 256 * 38 / 256 / len(kept) * 8) ** 0.5
    assert (torch.autograd.grad(y.sum(), x)[0] == y).all()
    assert dropout(x, 0.0) is x and dropout(x, 0.999).count_nonzero() < 0.01 * x.numel()


def test_recomputing_gives_the_same_gradients_with_dropout_too():
    gradients = []
    for recompute in (False, True):
        flow = make(torch.float32, recompute=recompute, dropout=0.3).train()
        x, c = data(dtype=torch.float32)
        torch.manual_seed(7)
        flow.nll(x, c).mean().backward()
        gradients.append([p.grad for p in flow.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3


def trainer(waves, folder, **fields):
    fields = {"steps": 50, "hidden": 8, "steps_per_scale": 1, "batch_size": 4, "seq_len": 32} | fields
    return Trainer(Config(noise=0.0022, **fields), Clips(waves), folder, "cpu")


def test_bfloat16_networks_train_and_the_flow_around_them_stays_exact(waves, tmp_path):
    short = trainer(waves, tmp_path, precision="bfloat16", lr=1e-2, warmup=0)
    assert all(
        net.precision is torch.bfloat16 for net in short.flow.modules() if isinstance(net, ConditionTCN)
    )
    dtypes, losses = set(), []
    layer = short.flow.scales[0][0].coupling.net.layers[1]
    layer.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    short.model.register_forward_hook(lambda module, args, out: losses.append(out[0].item()))
    for _ in range(40):
        short.train_step()
    assert dtypes == {torch.bfloat16} and {p.dtype for p in short.flow.parameters()} == {torch.float32}
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05, losses
    flow, (x, c) = short.flow.eval(), short.held["val"][0]
    assert (flow.inverse(flow(x, c)[0], c) - x).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler (g++) for torch.compile")
def test_compiled_steps_are_the_same_steps_with_dropout_too(waves, tmp_path):
    found, small = [], {"num_scales": 2, "lambdas": (0.5, 1.0), "dilations": (1, 2)}  # a minute less
    small |= {"recompute": True, "dropout": 0.3}
    for compiled in (False, True):
        short = trainer(waves, tmp_path / str(compiled), compile=compiled, **small)
        for _ in range(5):
            short.train_step()
        assert bool(short.model._compiled_call_impl) == compiled
        x, c = short.held["val"][0]
        found.append(short.flow.eval().nll(x, c).detach())
    assert (found[0] - found[1]).abs().max() < 5e-6, found


def test_without_a_compiler_nothing_is_compiled(waves, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="no C.. compiler vs g"):
        trainer(waves, tmp_path / "run", compile=True)


def test_a_share_of_the_error_of_the_mean_stays_to_the_end(waves, tmp_path):
    weights = {}
    for share in (0.0, 0.2):
        run = trainer(waves, tmp_path / str(share), steps=10, mean_loss=2.0, mean_loss_final=share)
        weights[share] = [run.train_step() or round(float(run.fade), 4) for _ in range(10)]
    assert weights[0.0][:7] == [2.0, 1.7143, 1.4286, 1.1429, 0.8571, 0.5714, 0.2857]
    assert weights[0.0][7:] == [0.0] * 3 and weights[0.2] == [max(0.4, w) for w in weights[0.0]]


def test_a_gradient_that_is_not_finite_changes_no_weight_no_moment_and_no_counter(waves, tmp_path):
    """Adam's own state too: a step that is skipped must not age the averages."""
    run = trainer(waves, tmp_path)
    for _ in range(3):
        run.train_step()
    x, c = run.clips.batch(run.clips.windows("train", 32)[:4], 32)

    def everything():
        states = [[p, *run.optimizer.state[p].values()] for p in run.flow.parameters()]
        return [v.detach().clone() for state in states for v in state]

    before = everything()
    for bad in (float("nan"), float("inf")):
        run.update(x * bad, c)
    assert int(run.skipped) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    run.update(x, c)
    assert int(run.skipped) == 0 and not torch.equal(before[0], everything()[0])


def test_streams_side_by_side_do_not_touch_each_other():
    flow = make()
    c = data(T=10)[1]
    streams = [flow.stream(3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mixed = [
        torch.cat(parts, 1) for parts in zip(*([s.push(c[:, t : t + 1]) for s in streams] for t in range(10)))
    ]
    for i, x in enumerate(mixed):
        assert (x - flow.sample(c, generator=torch.Generator().manual_seed(i))).abs().max() < 1e-12


def test_forward_changes_nothing_in_the_flow():
    flow = make().train()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow(*data()), flow.nll(*data()), flow.sample(data()[1])
    assert flow.training and all(
        torch.equal(value, before[name]) for name, value in flow.state_dict().items()
    )


def test_temperature_zero_is_one_track_and_more_temperature_is_more_spread():
    flow = make()
    c = data(B=1)[1].expand(64, -1, -1)
    spreads = [float(flow.sample(c, temperature).std(0).mean()) for temperature in (0.0, 0.5, 1.0)]
    assert spreads[0] < 1e-12 < spreads[1] < spreads[2]


def test_wrong_shapes_and_sizes_are_refused_with_both_values():
    flow = make()
    x, c = data()
    with pytest.raises(AssertionError, match=r"x \(3, 9, 15\).*\(B, T, 16\)"):
        flow(x[:, :, :15], c)
    with pytest.raises(AssertionError, match=r"c \(3, 8, 3\)"):
        flow.log_prob(x, c[:, :8])
    with pytest.raises(UserError, match="dim: 15 vs at least 2\\^num_scales = 16"):
        Config(dim=15)
    with pytest.raises(UserError, match="lambdas"):
        Config(num_scales=3)
    with pytest.raises(UserError, match="lr"):
        Config(lr=float("nan"))


def test_presets_hold_the_numbers_of_section_3():
    paper = Config.preset("paper")
    assert (paper.num_scales, paper.lambdas, paper.dilations) == (4, (0.25, 0.5, 0.75, 1.0), (1, 2, 4, 8))
    assert (paper.batch_size, paper.lr, paper.lr_final, paper.epochs) == (128, 1e-4, 1.0, 100)
    assert (paper.prior, paper.init) == ("iid", "random")
    assert TalkingFlow(dataclass_with(paper, hidden=8)).sizes == [17, 17, 34, 68]


def dataclass_with(config, **fields):
    import dataclasses

    return dataclasses.replace(config, **fields)


def test_layers_stand_alone():
    """What the tutorial builds up from: each layer by itself keeps shapes and inverts."""
    config = Config(dim=16, cond_dim=3, hidden=8)
    x, c = data(dtype=torch.float32)
    layers = ((ActNorm(16), None), (InvertibleConv1x1(16), None), (AffineCoupling(16, config), c),
              (FlowStep(16, config), c))  # fmt: skip
    for layer, y in layers:
        out, logdet = layer(x) if y is None else layer(x, y)
        back = layer.inverse(out) if y is None else layer.inverse(out, y)
        assert (
            out.shape == x.shape
            and (back - x).abs().max() < 1e-5
            and torch.as_tensor(logdet).isfinite().all()
        )
    prior = Prior([16], Config(dim=16, num_scales=1, lambdas=(1.0,), cond_dim=3))
    assert prior.log_prob(x, x.new_zeros(())).shape == (3,)
