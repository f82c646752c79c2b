"""Gives this folder's kernels to PyTorch: shapes, gradient, autocast; builds, loads and chooses."""

import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from media.console import UserError

CSRC = Path(__file__).resolve().parent
SOURCES = "gated_conv.h", "tensor_cores.h", "hopper.h", "gated_conv.cpp", "gated_conv.cu", "hopper.cu"
# Where `auto` takes the fused operator: (dtype, major compute capability) -> what says that it is faster.
# Times are us of forward and all gradients on an H100 (csrc/README.md).
FASTER = {
    (torch.bfloat16, 9): "against eager / compiled PyTorch: 75 / 217 / 107 (C 256), 19.5 / 50 / 21 (demo)",
    (torch.float16, 9): "the same instructions and bytes as bfloat16; no figure of its own",
}
# Elsewhere PyTorch runs the definition:
#   16 bits, compute capability 8.x, or 10 and later    no such GPU has run these kernels
#   16 bits, taps too many or too far for rung 4        rung 3 would run: 1678 against 217
#   float32 (TF32 or not)                               rung 3's form: 1860 against 399
#   float64                                             not measured


# ---- The operator ------------------------------------------------------------------------------------------


def fused_gated_conv(x, weight, bias, cond, dilation, version=0, library="talkingflow"):
    """`gated_causal_conv_reference` by rung `version` of gated_conv.cu; 0: the fastest that can run it."""
    save = torch.is_grad_enabled()  # the pre-activation, for backward
    if version == 0 and x.shape[2] % 8 and (computed_in(x), capability(x.device)) in FASTER:
        x, weight = whole_pieces(x, weight)
    return getattr(torch.ops, library).gated_conv(x, weight, bias, cond, dilation, save, version)[0]


def whole_pieces(x, weight):
    """Channels of zeros, up to a multiple of 8: Hopper's rung copies rows of whole 16-byte pieces."""
    pad = (0, -x.shape[2] % 8)
    return F.pad(x, pad), F.pad(weight.transpose(1, 2), pad).transpose(1, 2)  # as the kernels read it


def fake(x, weight, bias, cond, dilation, save, version):
    """Shapes of y (B, T, H) and of the pre-activation a (B, T, 2H), without data."""
    B, T, H = x.shape[0], x.shape[1], weight.shape[0] // 2
    return x.new_empty(B, T, H), x.new_empty(B if save else 0, T, 2 * H)


def fake_backward(dy, a, x, weight, dilation, version):
    dweight = weight.new_empty(weight.shape[0], weight.shape[2], weight.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape), dweight, weight.new_empty(weight.shape[0]), a.new_empty(a.shape)


def setup_context(ctx, inputs, output):
    x, weight, bias, cond, ctx.dilation, _, ctx.version = inputs
    ctx.given = bias is not None, cond is not None
    ctx.set_materialize_grads(False)  # a's, which nobody uses, would be filled with zeros
    ctx.save_for_backward(output[1], x, weight)


def refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("the fused kernel has no second derivative; set TALKINGFLOW_KERNEL=torch")


@functools.cache
def register_kernel(library):
    """Gives torch.ops.<library>, built from this folder, shapes, gradient and autocast."""
    ops, name = getattr(torch.ops, library), f"{library}::gated_conv"

    def backward(ctx, dy, _):  # the gradient of cond is that of a
        if dy is None:
            return (None,) * 7
        dx, dweight, dbias, da = ops.gated_conv_backward(dy, *ctx.saved_tensors, ctx.dilation, ctx.version)
        return dx, dweight, dbias if ctx.given[0] else None, da if ctx.given[1] else None, None, None, None

    def autocast(x, weight, bias, cond, *rest):
        device, dtype = x.device.type, torch.get_autocast_dtype(x.device.type)
        tensors = [
            v if v is None or v.dtype == torch.float64 else v.to(dtype) for v in (x, weight, bias, cond)
        ]
        with torch.autocast(device, enabled=False):
            return ops.gated_conv(*tensors, *rest)

    torch.library.register_fake(name, fake)
    torch.library.register_fake(name + "_backward", fake_backward)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(name + "_backward", refuse_second_derivative)
    torch.library.impl(name, ("AutocastCPU", "AutocastCUDA"), autocast)


# ---- Building ----------------------------------------------------------------------------------------------


def find_toolkit():
    """The CUDA toolkit to compile with: of CUDA_HOME, of nvcc on PATH, in a usual place, or pip's wheels."""
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
    places += [f"{path}/nvidia/cu{major}" for path in sys.path]
    for place in map(Path, filter(None, places)):
        # nvcc alone (a script that calls another, a lone binary) cannot link: the runtime must be beside it
        if (place / "bin" / "nvcc").exists() and any(place.glob("lib*/libcudart.so*")):
            return place
    raise RuntimeError("no CUDA toolkit (bin/nvcc and libcudart) found; install one or set CUDA_HOME")


def architectures():
    """What to compile for: TORCH_CUDA_ARCH_LIST, else the GPUs that are here, else the usual ones.

    9.0 becomes 9.0a, the only name under which Hopper takes hopper.cu; as PTX that would run nowhere else.
    """
    gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    here = ";".join(f"{a}.{b}" for a, b in gpus)
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or here or "7.5;8.0;8.6;9.0+PTX"
    return re.sub(r"9\.0(\+PTX)?(?!a)", lambda found: "8.0+PTX;9.0a" if found[1] else "9.0a", wanted)


def compile_sources(toolkit, arch, built):
    """Compiles csrc/ into the file `built`, which appears whole or not at all, however many processes do."""
    from torch.utils import cpp_extension

    with (
        tempfile.TemporaryDirectory(
            dir=built.parent
        ) as folder,  # ours: a killed build's lock cannot hang this one
        mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=arch),  # torch fails to choose one without a GPU
        mock.patch.object(cpp_extension, "CUDA_HOME", str(toolkit)),
    ):
        # Wheels have only libcudart.so.13. "-L." is the build folder: no path, so no spaces to quote.
        Path(folder, "libcudart.so").symlink_to(next(toolkit.glob("lib*/libcudart.so*")))
        cpp_extension.load(
            "talkingflow",
            [str(CSRC / "gated_conv.cpp"), str(CSRC / "gated_conv.cu")],
            extra_cflags=[
                "-O2",
                "-DUSE_CUDA",
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
            ],  # stable ABI of 2.10
            extra_cuda_cflags=["-O3"],
            extra_ldflags=["-L."],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder, "talkingflow.so"), built)


def first_error(error):
    """The line of a failed build's output that says why."""
    lines = str(error).splitlines() or [repr(error)]
    return next((line for line in lines if "error:" in line or "fatal" in line), lines[0])


def build_kernel():
    """Loads csrc/ as compiled before, or compiles it. Raises what goes wrong and remembers a failed build."""
    arch = architectures()
    text = "".join((CSRC / name).read_text() for name in SOURCES) + arch + torch.version.cuda
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    built = cache / "talkingflow" / f"gated_conv-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    if built.exists():
        return torch.ops.load_library(built)
    toolkit, failed = find_toolkit(), built.with_suffix(".failed")
    tools = f"{torch.__version__}, {toolkit}, {shutil.which(os.environ.get('CXX', 'c++'))}"
    again = f"(remembered: to try again, delete {failed})"
    if failed.exists() and failed.read_text().startswith(tools + "\n"):
        raise RuntimeError(f"{failed.read_text().splitlines()[1]} {again}")
    print(f"kernel: compiling csrc/ with {toolkit} into {built} (once, a minute or two)", file=sys.stderr)
    built.parent.mkdir(parents=True, exist_ok=True)
    try:
        compile_sources(toolkit, arch, built)
    except Exception as error:
        if "Error building extension" not in str(error):
            raise  # nothing was compiled: quickly found out again
        reason = first_error(error)[:300]
        failed.write_text(f"{tools}\n{reason}\n")
        raise RuntimeError(f"{reason} {again}") from error


# ---- Choosing ----------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # torch.compile asks once, while it traces
def kernel_choice():
    """TALKINGFLOW_KERNEL: auto takes the operator where it is faster, cuda where it can run, torch never."""
    choice = os.environ.get("TALKINGFLOW_KERNEL", "auto")
    if choice not in ("auto", "cuda", "torch"):
        raise UserError(f"TALKINGFLOW_KERNEL: {choice} vs auto, cuda or torch. Set one of these or unset it.")
    return choice


def why_not():
    """Why PyTorch runs everything, in a few words; empty where the fused operator is worth building."""
    choice = kernel_choice()
    if choice == "torch":
        return "TALKINGFLOW_KERNEL=torch"
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    if choice == "cuda":
        return ""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    gpus = range(torch.cuda.device_count())
    able = {major for _, major in FASTER} & {torch.cuda.get_device_capability(gpu)[0] for gpu in gpus}
    return "" if able else "csrc/ was not measured to be faster on this GPU"


@functools.cache
def load_kernel():
    """The fused operator of csrc/ as a function like `gated_causal_conv_reference`, or None: then that runs.

    The first call says which, and why, in one line on stderr. Whatever fails is one warning, and PyTorch.
    """
    if why := why_not():
        print(f"kernel: PyTorch ({why})", file=sys.stderr)
        return None
    try:
        build_kernel()
        register_kernel("talkingflow")
    # no compiler or ninja, a read-only cache, a failing build: PyTorch does the same work
    except Exception as error:
        message = f"kernel: PyTorch, because csrc/ could not be built or loaded: {first_error(error)}"
        warnings.warn(message, stacklevel=2)
        return None
    where = "" if kernel_choice() == "cuda" else " in float16 and bfloat16, else PyTorch"
    print(f"kernel: csrc/gated_conv.cu (fused CUDA operator){where}", file=sys.stderr)
    return fused_gated_conv


def computed_in(x):
    """The dtype that x will have in the operator, which leaves float64 as it is."""
    on = x.device.type
    casts = torch.is_autocast_enabled(on) and x.dtype != torch.float64
    return torch.get_autocast_dtype(on) if casts else x.dtype


@torch.compiler.assume_constant_result
def capability(device):
    """The major compute capability of a GPU; 0 of a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@torch.compiler.assume_constant_result
def kernel_loaded():
    """Whether `load_kernel` found the fused operator."""
    return load_kernel() is not None


def tensor_cores_fit(weight, dilation):
    """Whether the tile of rung 4 fits in shared memory: shared_forward_v4 of gated_conv.cu, 16 frames."""
    taps = weight.shape[2]
    return 128 * (2 * (16 + (taps - 1) * dilation) + 128 * taps) <= 99 * 1024


def kernel_runs(x, weight, dilation):
    """Whether `fused_gated_conv` shall compute this layer: where it is faster, or wherever it is wanted."""
    choice = kernel_choice()
    if choice == "torch":
        return False
    if choice == "auto":
        if (computed_in(x), capability(x.device)) not in FASTER or not tensor_cores_fit(weight, dilation):
            return False
    return kernel_loaded()
