"""The same flow out of other libraries' parts, for benchmark_cpu.py: their ActNorm, invertible 1x1
convolution and affine coupling, our ConditionTCN inside; around them our splits and our prior.

    pip install --no-deps normflows nflows FrEIA tqdm UMNN

They keep channels in the middle, here (B, C, T, 1); the two layouts are views of each other, nothing is
copied. None of them takes the sound along a sequence, so it lies ready in the network.
"""

import importlib.util

import torch
from torch import nn


def flat(x):
    """(B, C, T, 1) -> (B, T, C)"""
    return x.squeeze(3).transpose(1, 2)


def wide(x):
    """(B, T, C) -> (B, C, T, 1)"""
    return x.transpose(1, 2)[..., None]


def normflows(dim, create):
    from normflows import flows

    sizes = [dim // 2, dim - dim // 2]
    norm, conv = flows.ActNorm((dim, 1, 1)), flows.Invertible1x1Conv(dim, use_lu=True)
    coupling = flows.AffineCoupling(create(sizes[0], 2 * sizes[1]))

    def to_noise(x):  # which is the inverse there
        x, norm_logdet = norm.inverse(x)
        x, conv_logdet = conv.inverse(x)
        x, logdet = coupling.inverse(x.split(sizes, 1))
        return torch.cat(x, 1), logdet + norm_logdet + conv_logdet

    def to_data(y):
        return norm.forward(conv.forward(torch.cat(coupling.forward(y.split(sizes, 1))[0], 1))[0])[0]

    return [norm, conv, coupling], to_noise, to_data


def nflows(dim, create):
    from nflows import transforms

    coupling = transforms.AffineCouplingTransform((torch.arange(dim) >= dim // 2).int(), create)
    step = transforms.CompositeTransform(
        [transforms.ActNorm(dim), transforms.OneByOneConvolution(dim), coupling]
    )
    return [step], step, lambda y: step.inverse(y)[0]


def freia(dim, create):
    """One block for all three; its 1x1 convolution is a rotation that stays as it is."""
    from FrEIA.modules import AllInOneBlock

    block = AllInOneBlock([(dim, 1, 1)], subnet_constructor=create, permute_soft=True)

    def to_noise(x):
        (x,), logdet = block([x])
        return x, logdet

    return [block], to_noise, lambda y: block([y], rev=True)[0][0]


class Step(nn.Module):
    """FlowStep's two functions by a library's parts."""

    def __init__(self, parts, dim, config, Network):
        super().__init__()

        def create(inputs, outputs):
            self.net = Ready(Network(inputs, outputs, config))
            return self.net

        modules, self.to_noise, self.to_data = parts(dim, create)
        self.parts = nn.ModuleList(modules)

    def forward(self, x, c):
        self.net.c = c
        x, logdet = self.to_noise(wide(x))
        return flat(x), logdet

    def inverse(self, y, c):
        self.net.c = c
        return flat(self.to_data(wide(y)))


class Ready(nn.Module):
    """A network as the libraries call it; `c` is the sound."""

    def __init__(self, net):
        super().__init__()
        nn.init.normal_(net.out.weight, std=0.1 / net.out.in_features**0.5)
        self.net, self.c = net, None

    def forward(self, x, *_):
        return wide(self.net(flat(x), self.c))


def installed():
    """name -> parts of the libraries that are here."""
    known = {"normflows": normflows, "nflows": nflows, "FrEIA": freia}
    return {name: parts for name, parts in known.items() if importlib.util.find_spec(name)}


def out_of(parts, flow, Network):
    """Gives every step of `flow` a library's parts."""
    for i, scale in enumerate(flow.scales):
        dim = flow.config.dim // 2**i
        flow.scales[i] = nn.ModuleList(Step(parts, dim, flow.config, Network) for _ in scale)
