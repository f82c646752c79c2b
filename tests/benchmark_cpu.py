"""How fast is the flow on one CPU core, beside the same flow as a textbook would write it?

    python tests/benchmark_cpu.py [--hidden 64,128,256] [--quick]

and, where they are installed, beside the same flow out of other libraries' parts (peers.py).

Every ratio is the median of pairs taken in turn in one process, in CPU time of one thread, so a busy
machine changes it little. The textbook form computes the same numbers from the same weights (checked
below, gradients too): channels in the middle and nn.functional.conv1d, a convolution of its own for every
layer's sound, the 1x1 matrices inverted in every call, plain Adam, a stream that computes its past again.
`recompute` stands beside our own step, neither recomputed nor compiled. Compiling takes ten minutes in all.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from peers import installed, out_of

from csrc.device import fused
from talkingflow import ConditionTCN, Config, Objective, TalkingFlow, build_optimizer

SIZES = {  # hidden: Config fields, frames a window
    64: (dict(hidden=64, kernel_size=2, steps_per_scale=2, batch_size=8), 80),
    128: (dict(hidden=128, kernel_size=3, steps_per_scale=4, batch_size=32, cond_dim=80), 64),
    256: (dict(hidden=256, kernel_size=3, steps_per_scale=4, batch_size=16, cond_dim=80), 64),
}


def textbook_network(net, x, c):
    """A ConditionTCN's output by conv1d on (B, C, T)."""
    h, c = x.transpose(1, 2), c.transpose(1, 2)
    conds = net.cond.weight.chunk(len(net.layers))
    for layer, cond in zip(net.layers, conds):
        weight = layer.weight.transpose(1, 2)
        padded = F.pad(h, ((weight.shape[2] - 1) * layer.dilation, 0))
        a = F.conv1d(padded, weight, layer.bias, dilation=layer.dilation) + F.conv1d(c, cond[:, :, None])
        value, gate = a.chunk(2, 1)
        h = F.dropout(torch.tanh(value) * torch.sigmoid(gate), net.dropout, net.training)
    return F.conv1d(h, net.out.weight[:, :, None], net.out.bias).transpose(1, 2)


class Textbook(ConditionTCN):
    """The same weights, the textbook's arithmetic; `as_textbook` puts it in place."""

    def forward(self, x, c):
        return textbook_network(self, x, c)


def as_textbook(flow):
    for module in flow.modules():
        if type(module) is ConditionTCN:
            module.__class__ = Textbook
    return flow


def build(fields, T):
    """-> (flow, x, c): a flow after its data-dependent start whose couplings do something."""
    torch.manual_seed(0)
    config = Config(**fields)
    x, c = torch.rand(config.batch_size, T, config.dim), torch.randn(config.batch_size, T, config.cond_dim)
    flow = TalkingFlow(config)
    flow.initialize(x, c)
    for module in flow.modules():
        if isinstance(module, ConditionTCN):
            torch.nn.init.normal_(module.out.weight, std=0.1 / config.hidden**0.5)
    return flow, x, c


def training_step(flow, x, c, plain=False, fuse=False):
    """A function that takes one step, as the trainer does or as a textbook does."""
    objective, fade = fused(Objective(flow)) if fuse else Objective(flow), torch.tensor(0.1)
    ours = build_optimizer(flow, flow.config)
    for group in ours.param_groups:
        group["lr"].fill_(1e-4)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-4) if plain else ours

    def step():
        _, loss = objective(x, c, fade)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()

    return step


def pairs(plain, ours, count):
    """Medians: CPU ms of both, and of their ratios, taken in turn."""
    times = []
    for number in range(count + 2):
        spent = []
        for function in (plain, ours):
            clock = time.process_time()
            function()
            spent.append(time.process_time() - clock)
        if number > 1:  # the first two warm up
            times.append(spent)
    a, b = (1000 * statistics.median(t[i] for t in times) for i in (0, 1))
    return a, b, statistics.median(p / o for p, o in times)


def saved_megabytes(flow, x, c, fuse=False):
    """What autograd keeps of one forward pass, MB, each storage once, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in flow.parameters()}
    objective, fade = fused(Objective(flow)) if fuse else Objective(flow), torch.tensor(0.1)
    objective(x, c, fade)  # what compiling it keeps is not counted

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(x, c, fade)[1]
    del loss
    return sum(kept.values()) / 1e6


def gemm_peak():
    """GFLOP/s of a large float32 product on this core."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    _, spent, _ = pairs(lambda: None, lambda: a @ b, 10)
    return 2 * 2048 * 1024 * 1024 / spent / 1e6


def step_gigaflop(flow, T):
    """Multiply-adds of the matrix products in one training step (forward once, backward twice), times two."""
    macs = sum(
        layer.weight.numel()
        for net in flow.modules()
        if isinstance(net, ConditionTCN)
        for layer in net.layers
    )
    nets = [net for net in flow.modules() if isinstance(net, ConditionTCN)]
    macs += sum(net.cond.weight.numel() + net.out.weight.numel() for net in nets)
    macs += sum(step.conv.lower.numel() for scale in flow.scales for step in scale)
    return 6 * macs * flow.config.batch_size * T / 1e9


def gradients(flow, x, c):
    flow.zero_grad()
    Objective(flow)(x, c, torch.tensor(0.1))[1].backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters()])


def training(fields, x, c, count, fuse):
    """The lines of a training step: ours as it is, or fused by torch.compile."""
    plain, ours, half = (build(fields, x.shape[1])[0] for _ in range(3))
    dropping = [build(fields | {"dropout": 0.15}, x.shape[1])[0] for _ in range(2)]
    as_textbook(plain), as_textbook(dropping[0])
    for net in half.modules():
        if isinstance(net, ConditionTCN):
            net.precision = torch.bfloat16
    kinds = {"training step": (plain, ours), "  dropout 0.15": dropping, "  bfloat16 networks": (plain, half)}
    for name, (theirs, flow) in kinds.items():
        a, b, ratio = pairs(training_step(theirs, x, c, True), training_step(flow, x, c, fuse=fuse), count)
        share = step_gigaflop(ours, x.shape[1]) / b * 1e3 / gemm_peak()
        note = f"   ({share:.0%} of the GEMM peak)" if name == "training step" else ""
        yield f"{name:20} {a:10.1f} {b:8.1f} ms  {ratio:5.2f}{note}"
    again = build(fields | {"recompute": True}, x.shape[1])[0]
    a, b, ratio = pairs(training_step(ours, x, c), training_step(again, x, c, fuse=fuse), count)
    stored, kept = saved_megabytes(ours, x, c), saved_megabytes(again, x, c, fuse)
    memory = f"(activations {stored:.0f} -> {kept:.0f} MB: {stored / kept:.1f} x)"
    yield f"  recompute          {a:10.1f} {b:8.1f} ms  {ratio:5.2f}   {memory}"


def measure(hidden, count):
    """The lines of one size."""
    fields, T = SIZES[hidden]
    fields = fields | {"dropout": 0.0}
    ours, x, c = build(fields, T)
    plain = as_textbook(build(fields, T)[0])
    error = (gradients(plain, x, c) - gradients(ours, x, c)).abs().max() / gradients(ours, x, c).abs().max()
    yield f"gradients differ by {error:.1e} of the largest"
    yield from training(fields, x, c, count, False)
    if shutil.which("g++"):
        yield "compiled (--compile true)"
        yield from training(fields, x, c, count, True)
    with torch.no_grad():
        ours.eval(), plain.eval()
        a, b, ratio = pairs(lambda: plain.nll(x, c), lambda: ours.nll(x, c), count)
        yield f"NLL of a batch       {a:10.1f} {b:8.1f} ms  {ratio:5.2f}"
        sound = torch.randn(1, 250, ours.config.cond_dim)
        a, b, ratio = pairs(lambda: plain.sample(sound), lambda: ours.sample(sound), 3 * count)
        yield f"250 frames, one face {a:10.1f} {b:8.1f} ms  {ratio:5.2f}"
        stream, reach = ours.stream(), 120
        stream.push(sound[:, :100])
        tail = torch.randn(1, reach, ours.config.dim).split(ours.sizes, 2)
        frame = lambda: stream.push(sound[:, 100:101])
        a, b, ratio = pairs(lambda: plain.inverse(tail, sound[:, :reach]), frame, 4 * count)
        again = f"(the textbook's: its last {reach} frames again)"
        yield f"one streamed frame   {a:10.2f} {b:8.2f} ms  {ratio:5.1f}   {again}"


def beside_peers(fields, T, count):
    """The lines of one size, with the iid prior and without dropout, which all have."""
    fields = fields | {"dropout": 0.0, "prior": "iid", "prior_mean": False}
    plain, x, c = build(fields, T)
    as_textbook(plain)
    x, c = (v.transpose(1, 2).contiguous().transpose(1, 2) for v in (x, c))  # as they lie in (B, C, T)
    for name, parts in (installed() | {"ours": None}).items():
        flow = build(fields, T)[0]
        if parts:
            out_of(parts, flow, Textbook)
        found = [pairs(training_step(plain, x, c, True), training_step(flow, x, c, bool(parts)), count)]
        flow.eval(), plain.eval()
        with torch.no_grad():
            found.append(pairs(lambda: plain.nll(x, c), lambda: flow.nll(x, c), count))
            sound = torch.randn(1, 250, flow.config.cond_dim)
            zs = torch.randn(1, 250, flow.config.dim).split(flow.sizes, 2)
            sample = (lambda: flow.inverse(zs, sound)) if parts else (lambda: flow.sample(sound))
            found.append(pairs(lambda: plain.inverse(zs, sound), sample, count))
            error = (flow.inverse(flow(x, c)[0], c) - x).abs().max()
        flow.train(), plain.train()
        values = "".join(f"{b:10.1f} {ratio:5.2f}" for _, b, ratio in found)
        yield f"{name:10}{values}{saved_megabytes(flow, x, c):10.0f}     {error:.0e}"


def curves():
    """What a frame costs, in NLL and sampling over T, in training over the batch and the flow steps."""
    flow, _, _ = build(SIZES[64][0] | {"dropout": 0.0}, 80)
    flow.eval()
    with torch.no_grad():
        for T in (64, 256, 1024, 4096, 16384):
            x, c = torch.rand(1, T, 136), torch.randn(1, T, 40)
            a, b, _ = pairs(lambda: flow.nll(x, c), lambda: flow.sample(c), 3 if T > 1024 else 8)
            yield f"T {T:6d}: nll {1000 * a / T:6.1f}, sample {1000 * b / T:6.1f} us a frame"
    for change in [{"batch_size": n} for n in (1, 8, 32)] + [{"steps_per_scale": n} for n in (1, 2, 4, 6)]:
        flow, x, c = build(SIZES[64][0] | {"dropout": 0.0} | change, 80)
        _, spent, _ = pairs(lambda: None, training_step(flow.train(), x, c), 8)
        ((name, n),) = change.items()
        yield f"{name} {n:3d}: training step {spent:7.1f} ms, {1000 * spent / len(x) / 80:6.1f} us a frame"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", default="64,128,256", help="sizes to measure [64,128,256]")
    parser.add_argument("--quick", action="store_true", help="few pairs, no curves")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, one thread, float32 GEMM peak {gemm_peak():.0f} GFLOP/s")
    for hidden in map(int, args.hidden.split(",")):
        print(f"\nhidden {hidden}: {SIZES[hidden][0]}, T {SIZES[hidden][1]}")
        print(f"{'':22} textbook     ours     ratio")
        for line in measure(hidden, 3 if args.quick else 9):
            print(line, flush=True)
        print(f"\n{'iid prior':10}   training step       a batch's NLL      250 frames  kept, MB  round trip")
        print(f"{'':10}" + "        ms ratio" * 3)
        for line in beside_peers(*SIZES[hidden], 3 if args.quick else 9):
            print(line, flush=True)
    if not args.quick:
        print("\nhidden 64, cost curves")
        for line in curves():
            print(line, flush=True)


if __name__ == "__main__":
    main()
