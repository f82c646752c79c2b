"""Gives the kernels of this folder to PyTorch: shapes, gradient, autocast; finds a toolkit, builds, loads."""

import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

from media.console import UserError

KERNEL_VERSION = 0  # of csrc/gated_conv.cu: 1 naive, 2 tiled, 3 tensor cores (bfloat16), 0 the best that fits
_kernel = None  # what load_kernel found: a function, or False; None: not asked yet


def register_kernel(library):
    """Gives torch.ops.<library>, built from csrc/, shapes, gradient and autocast; returns a `gated_causal_conv`."""
    ops, name = getattr(torch.ops, library), f"{library}::gated_conv"

    def fake(x, weight, bias, cond, dilation, save, version):
        B, H, T = x.shape[0], weight.shape[0] // 2, x.shape[2]
        return x.new_empty(B, H, T), x.new_empty(B if save else 0, 2 * H, T)  # y, pre-activation h

    def fake_backward(dy, h, x, weight, dilation, version):
        return tuple(
            v.new_empty(size)
            for v, size in ((x, x.shape), (weight, weight.shape), (weight, weight.shape[:1]), (h, h.shape))
        )

    def setup_context(ctx, inputs, output):
        x, weight, bias, cond, ctx.dilation, _, ctx.version = inputs
        ctx.given = bias is not None, cond is not None
        ctx.save_for_backward(output[1], x, weight)

    def backward(ctx, dy, _):  # the gradient of cond is that of h
        dx, dweight, dbias, dh = ops.gated_conv_backward(dy, *ctx.saved_tensors, ctx.dilation, ctx.version)
        return dx, dweight, dbias if ctx.given[0] else None, dh if ctx.given[1] else None, None, None, None

    def autocast(x, weight, bias, cond, *rest):
        device, dtype = x.device.type, torch.get_autocast_dtype(x.device.type)
        tensors = [
            v if v is None or v.dtype == torch.float64 else v.to(dtype) for v in (x, weight, bias, cond)
        ]
        with torch.autocast(device, enabled=False):
            return ops.gated_conv(*tensors, *rest)

    def refuse(ctx, *grads):
        raise NotImplementedError("the fused kernel has no second derivative; set TALKINGFLOW_KERNEL=torch")

    torch.library.register_fake(name, fake)
    torch.library.register_fake(name + "_backward", fake_backward)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(name + "_backward", refuse)
    torch.library.impl(name, ("AutocastCPU", "AutocastCUDA"), autocast)
    return lambda x, weight, bias, cond, dilation: ops.gated_conv(
        x, weight, bias, cond, dilation, torch.is_grad_enabled(), KERNEL_VERSION
    )[0]


def find_toolkit():
    """The CUDA toolkit to compile with: CUDA_HOME if it is one, else nvcc's on PATH, a usual place, or pip's wheels."""
    major, nvcc = torch.version.cuda.split(".")[0], shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parents[1],
    ]
    places += [
        *sorted(Path("/usr/local").glob(f"cuda-{major}*"), reverse=True),
        "/usr/local/cuda",
        "/opt/cuda",
    ]
    for place in map(Path, filter(None, [*places, *(f"{path}/nvidia/cu{major}" for path in sys.path)])):
        if (place / "bin" / "nvcc").exists() and any(
            place.glob("lib*/libcudart.so*")
        ):  # a lone nvcc cannot link
            return place
    raise RuntimeError("no CUDA toolkit (bin/nvcc and libcudart) found; install one or set CUDA_HOME")


def build_kernel():
    """Compiles csrc/ unless it is in the cache, and loads it. Raises whatever goes wrong."""
    csrc = Path(__file__).resolve().parent
    gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    arch = (
        os.environ.get("TORCH_CUDA_ARCH_LIST")
        or ";".join(f"{a}.{b}" for a, b in gpus)
        or "7.5;8.0;8.6;9.0+PTX"
    )
    text = (
        "".join((csrc / f"gated_conv.{end}").read_text() for end in ("h", "cpp", "cu"))
        + arch
        + torch.version.cuda
    )
    cache = (
        Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        / "talkingflow"
    )
    built = cache / f"gated_conv-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    if built.exists():
        return torch.ops.load_library(built)
    from torch.utils import cpp_extension

    toolkit = find_toolkit()
    print(f"kernel: compiling csrc/ with {toolkit} into {built} (once, a minute or two)", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    flags = [
        "-O2",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]  # PyTorch's stable ABI as of 2.10
    with (
        tempfile.TemporaryDirectory(
            dir=cache
        ) as folder,  # our own: the lock of a killed build cannot hang this one
        mock.patch.dict(
            os.environ, TORCH_CUDA_ARCH_LIST=arch
        ),  # torch fails to choose one where no GPU is visible
        mock.patch.object(cpp_extension, "CUDA_HOME", str(toolkit)),
    ):
        Path(folder, "libcudart.so").symlink_to(
            next(toolkit.glob("lib*/libcudart.so*"))
        )  # wheels have only .so.13
        sources = [str(csrc / "gated_conv.cpp"), str(csrc / "gated_conv.cu")]
        cpp_extension.load(
            "talkingflow",
            sources,
            extra_cflags=flags,
            extra_cuda_cflags=["-O3"],
            extra_ldflags=[f"-L{folder}"],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder, "talkingflow.so"), built)  # whole or not at all, however many processes build


def load_kernel():
    """The fused CUDA operator of csrc/ as a function like `gated_causal_conv_reference`, or None: then that runs.

    TALKINGFLOW_KERNEL=auto takes the operator where a GPU is visible, cuda builds it anywhere, torch never. The first
    call says which, and why, in one line on stderr. Whatever fails is one warning and the PyTorch path.
    """
    global _kernel
    if _kernel is None:
        choice = os.environ.get("TALKINGFLOW_KERNEL", "auto")
        if choice not in ("auto", "cuda", "torch"):
            raise UserError(
                f"TALKINGFLOW_KERNEL: {choice} vs auto, cuda or torch. Set one of these or unset it."
            )
        why = (
            "TALKINGFLOW_KERNEL=torch"
            if choice == "torch"
            else "this PyTorch has no CUDA"
            if torch.version.cuda is None
            else "no GPU is visible"
            if choice == "auto" and not torch.cuda.is_available()
            else ""
        )
        _kernel = False
        try:
            if not why:
                build_kernel()
                _kernel = register_kernel("talkingflow")
            print(
                "kernel:",
                f"PyTorch ({why})" if why else "csrc/gated_conv.cu (fused CUDA operator)",
                file=sys.stderr,
            )
        # no compiler or ninja, a read-only cache, a failing build: PyTorch does the same work
        except Exception as error:
            lines = str(error).splitlines() or [repr(error)]
            reason = next((line for line in lines if "error:" in line or "fatal" in line), lines[0])
            warnings.warn(
                f"kernel: PyTorch, because csrc/ could not be built or loaded: {reason[:300]}", stacklevel=2
            )
    return _kernel or None


@torch.compiler.assume_constant_result  # torch.compile asks once, while it traces
def kernel_runs():
    """Whether `load_kernel` found the fused operator."""
    return load_kernel() is not None
