"""Where the flow runs: device, threads, the processes of torchrun, and CUDA graphs, which spare a GPU the
launches."""

import os
import shutil

import torch
import torch.nn.functional as F

from csrc.gated_conv import load_kernel
from media.console import UserError


def choose_device(name):
    """auto: this process's GPU where there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"device: {name} ({reason}) vs one that torch can use. Try --device cpu")
    return torch.device(name)


def few_threads(device, hidden):
    """One thread on a CPU for small tensors, which gain nothing from more, and lose much on a busy
    machine."""
    if hidden <= 64 and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def network_precision(asked, hidden, device):
    """The dtype that the networks are trained in: asked for, or for "auto" the faster one. None: as the
    weights are, float32.

    On an H100, steps as CUDA graphs, PyTorch's operators: hidden 256, 30 ms in bfloat16 against 42;
    hidden 64, 4.6 against 4.2, but 3.3 by the kernels of csrc/, which take 16 bits only. Other GPUs since
    8.0 were not measured; by their data sheets 16-bit products are at least twice as fast."""
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    faster = gpu and (hidden >= 128 or load_kernel() is not None)
    return torch.bfloat16 if asked == "bfloat16" or (asked == "auto" and faster) else None


def dropout(x, p):
    """Dropout in training, on a CPU from one random byte a number, so p is rounded to 1/256: drawing a number
    for each is the slower half of it."""
    dropped = min(round(256 * p), 255)
    if x.is_cuda or not dropped:
        return F.dropout(x, p)
    drawn = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),))  # eight bytes at a time
    drawn = drawn.view(torch.uint8)[: x.numel()].view(x.shape)
    if torch.compiler.is_compiling():
        drawn = drawn.float()  # of bytes it makes no vector instructions
    return x * ((drawn >= dropped) * (256 / (256 - dropped)))


def fused(model):
    """A model whose training steps torch.compile fuses, so that what surrounds the products (gates, copies of
    the taps, dropout) goes through memory once, not once an operation. It writes and compiles C++ for one or
    two minutes, and keeps that for the next run. Random numbers stay those of PyTorch, and so do the losses.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("compile: no C++ compiler vs g++ or clang++. Install one, or --compile false")
    print("compile: the first step takes a minute or two", flush=True)
    model.compile(dynamic=False, options={"fallback_random": True})
    return model


class Processes:
    """This process among those of torchrun, or alone: rank 0 of 1."""

    def __init__(self, device, batch_size):
        self.device = device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if batch_size % self.world:
            found = f"{batch_size} vs a multiple of {self.world} processes"
            raise UserError(f"batch_size: {found}. Change --batch_size")

    def join(self, model):
        """The model, its gradients from now on averaged over the processes."""
        if self.world == 1:
            return model
        torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return torch.nn.parallel.DistributedDataParallel(model)

    def largest(self, number):
        """The largest of the processes' numbers: a signal that any of them got stops all after the same
        step."""
        if self.world == 1:
            return number
        number = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def leave(self):
        if self.world > 1:
            torch.distributed.destroy_process_group()


class Captured:
    """function(*tensors) as one CUDA graph. A training step of this size is thousands of launches, each
    dearer than its work: an H100 was idle nine tenths of the time.

    The first three calls run as they are, on a stream of their own, since what they set up must not be
    recorded; the fourth is recorded, and from then on replayed with the new tensors in the same places.
    The function must do all its work on the device, wait for nothing, and change tensors in place; torch
    moves the random generator of a graph on at every replay. It returns a tensor or None. Where recording
    fails, calls go on as they were, and one line says why."""

    def __init__(self, function, device):
        self.function, self.calls, self.graph = function, 0, None
        self.stream = torch.cuda.Stream(device)

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(*tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == 4:
            self.record(tensors)
        if self.graph is None:
            return self.function(*tensors)
        for place, tensor in zip(self.places, tensors):
            place.copy_(tensor)
        self.graph.replay()
        return None if self.result is None else self.result.clone()

    def record(self, tensors):
        """Record one call on tensors like these; nothing is computed yet."""
        self.places, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.result = self.function(*self.places)
            self.graph = graph
        except RuntimeError as e:
            print(
                f"note: no CUDA graph ({str(e).splitlines()[0]}): every operation is launched by itself",
                flush=True,
            )
