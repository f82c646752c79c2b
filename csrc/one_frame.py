"""A stream's next frame on a CPU. A product of one row takes microseconds, and so does every module, view and
copy around it: here matrices are folded once, and little is left between the products."""

import torch


class Network:
    """A ConditionTCN that remembers: x (B, C), the sound's share in each layer (B, 2H) -> (B, out)."""

    def __init__(self, net):
        self.layers = [(layer, layer.weight.flatten(1).T, layer.dilation) for layer in net.layers]
        self.out, self.past = net.out, None

    def __call__(self, x, conds):
        for (_, matrix, dilation), past, cond in zip(self.layers, self.past, conds):
            past.append(x)  # the last (k-1) d inputs and this one
            taps = torch.cat(past[::dilation], 1)
            del past[0]
            tanh, sigmoid = torch.addmm(cond, taps, matrix).chunk(2, 1)
            x = tanh.tanh_().mul_(sigmoid.sigmoid_())
        return torch.addmm(self.out.bias, x, self.out.weight.T)

    def take(self):
        self.past = [list(layer.past.unbind(1)) for layer, *_ in self.layers]

    def give(self):
        for (layer, *_), past in zip(self.layers, self.past):
            if past:
                layer.past.copy_(torch.stack(past, 1))


class Sound:
    """The sound's share in every layer of some networks, biases included, as one product."""

    def __init__(self, nets):
        layers = [layer for net in nets for layer in net.layers]
        self.matrix = torch.cat([net.cond.weight for net in nets]).T.contiguous()
        self.bias, self.depth = torch.cat([layer.bias for layer in layers]), len(nets[0].layers)
        self.sizes = [len(layer.bias) for layer in layers]

    def __call__(self, c):
        """c (B, M) -> for each network a tuple of (B, 2H), one for each layer."""
        shares = torch.addmm(self.bias, c, self.matrix).split(self.sizes, 1)
        return [shares[i : i + self.depth] for i in range(0, len(shares), self.depth)]


class OneFrame:
    """`prior_mean` and `inverse` of a flow that remembers (TalkingFlow.remembering), for one frame.

    The flow's layers and this keep what they remember in different forms: `take` it over before a frame,
    `give` it back before a longer block."""

    def __init__(self, flow):
        self.flow, self.prior, self.sizes = flow, flow.prior, flow.sizes
        self.nets, self.taken = None, False

    @torch.no_grad()
    def fold(self):
        """At the first frame: a whole sequence does without."""
        scales = [scale[::-1] for scale in self.flow.scales[::-1]]
        nets, mean = [step.coupling.net for scale in scales for step in scale], self.prior.mean_net
        self.steps = [[(step.coupling, *folded(step)) for step in scale] for scale in scales]
        self.nets, self.sound = [Network(net) for net in nets], Sound(nets)
        self.mean, self.mean_sound = (Network(mean), Sound([mean])) if mean else (None, None)

    def take(self):
        if not self.nets:
            self.fold()
        if not self.taken:
            [net.take() for net in (*self.nets, self.mean) if net]
        self.taken = True
        return self

    def give(self):
        if self.taken:
            [net.give() for net in (*self.nets, self.mean) if net]
        self.taken = False
        return self.flow

    def standardize(self, c):
        return (c[:, 0] - self.flow.cond_mean) / self.flow.cond_std

    def prior_mean(self, c):
        """c (B, 1, M) -> m(c) (B, 1, D), or 0."""
        if not self.mean:
            return self.flow.prior_mean(c)
        c = self.standardize(c)
        return self.mean(c, self.mean_sound(c)[0])[:, None]

    def inverse(self, zs, c):
        """Latents (B, 1, d_l), the deepest first, c (B, 1, M) -> x (B, 1, D)."""
        x, *zs = (z[:, 0] for z in zs)
        nets = zip(self.nets, self.sound(self.standardize(c)))
        for number, scale in enumerate(self.steps):
            if number:
                x = torch.cat([x, zs[number - 1]], 1)
            for (coupling, matrix, offset), (net, conds) in zip(scale, nets):
                xa, xb = x.split(coupling.sizes, 1)
                s, t = net(xa, conds).chunk(2, 1)
                s = coupling.bound * torch.tanh(s / coupling.bound)
                x = torch.addmm(offset, torch.cat([xa, (xb - t) * torch.exp(-s)], 1), matrix)
        return x[:, None]


def folded(step):
    """A step's 1x1 convolution and ActNorm inverted, y -> y matrix + offset: matrix (D, D), offset (D,)."""
    return step.conv.inverted.T * (-step.actnorm.logs).exp(), -step.actnorm.bias
