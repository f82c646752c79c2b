// The PyTorch binding of gated_conv.cu: schema, argument checks, memory, device and stream. Uses PyTorch's stable C
// ABI, so it compiles in seconds and one build serves every later PyTorch. Shapes without data (fake), autograd and
// autocast are registered from Python, in talkingflow.py. With -DCUDA_ON_CPU the same kernels become CPU operators
// (cuda_on_cpu.h) in a library of their own, talkingflow_cpu: that is what the tests run on a machine without a GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <optional>
#include <tuple>
#include "gated_conv.h"
#ifdef CUDA_ON_CPU
#include "gated_conv.cu"
#define LIBRARY talkingflow_cpu
#define BACKEND CPU
#else
#define LIBRARY talkingflow
#define BACKEND CUDA
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
int dtype_code(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return 0;
        case ScalarType::Double: return 1;
        case ScalarType::Half: return 2;
        case ScalarType::BFloat16: return 3;
        default: STD_TORCH_CHECK(false, "gated_conv: x must be float32, float64, float16 or bfloat16");
    }
}

// Shape, dtype and device in one place; the message says what was found and what was wanted.
void check_tensor(const char* name, const Tensor& v, const Tensor& x, std::initializer_list<int64_t> shape) {
    bool same = v.dim() == (int64_t)shape.size();
    int64_t axis = 0;
    for (const int64_t size : shape) same = same && v.size(axis++) == size;
    if (!same) {
        std::string found, wanted;
        for (axis = 0; axis < v.dim(); ++axis) found += (axis ? ", " : "") + std::to_string(v.size(axis));
        for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
        STD_TORCH_CHECK(false, "gated_conv: ", name, " has shape (", found, ") vs expected (", wanted, ")");
    }
    STD_TORCH_CHECK(v.scalar_type() == x.scalar_type(), "gated_conv: ", name,
                    " and x differ in dtype; cast them, or run under torch.autocast");
    STD_TORCH_CHECK(v.is_cuda() == x.is_cuda() && v.get_device_index() == x.get_device_index(), "gated_conv: ", name,
                    " and x are on different devices");
}

// (B, channels, T) as the kernels read it: each batch item contiguous. A slice of channels passes as it is, others are
// copied.
Tensor item_contiguous(const Tensor& v) {
    const bool fits =
        v.numel() == 0 || ((v.stride(2) == 1 || v.size(2) == 1) && (v.stride(1) == v.size(2) || v.size(1) == 1));
    return fits ? v : torch::stable::contiguous(v);
}

// Checks x and weight, makes both readable by the kernels, and describes them.
Layer layer_of(Tensor& x, Tensor& weight, int64_t dilation) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "gated_conv: x must be (B, C, T) and weight (2H, C, K)");
    STD_TORCH_CHECK(weight.size(0) % 2 == 0, "gated_conv: weight has ", weight.size(0),
                    " rows vs an even number expected (values, then gates)");
    STD_TORCH_CHECK(weight.size(2) >= 1 && weight.size(2) <= 1024 && dilation >= 1,
                    "gated_conv: kernel size must be 1 to 1024, dilation at least 1");
    check_tensor("weight", weight, x, {weight.size(0), x.size(1), weight.size(2)});
    for (const int64_t size : {x.size(0), x.size(1), x.size(2), weight.size(0), weight.size(2), dilation}) {
        STD_TORCH_CHECK(size < (int64_t(1) << 31), "gated_conv: a size of ", size, " is over 2^31 - 1");
    }
    x = item_contiguous(x);
    weight = torch::stable::contiguous(weight);
    Layer n{};
    n.B = (int)x.size(0), n.C = (int)x.size(1), n.T = (int)x.size(2);
    n.H = (int)(weight.size(0) / 2), n.K = (int)weight.size(2), n.dilation = (int)dilation;
    n.x_batch = x.stride(0);
    return n;
}

int choose_version(int code, int64_t version, const Layer& n) {
    const int chosen = gated_conv_version(code, (int)version, &n);
    STD_TORCH_CHECK(chosen > 0, "gated_conv: version ", version,
                    " cannot run this: 1 takes everything, 2 needs kernel size and dilation whose tile fits "
                    "48 KB of shared memory, 3 also bfloat16 and a GPU of compute capability 8.0; 0 chooses");
    return chosen;
}

// The device of x is current while this lives (kernels would otherwise start on cuda:0), and its current stream is
// used, so that PyTorch's streams, graphs and torch.compile order our work with theirs.
struct OnDevice {
#ifdef CUDA_ON_CPU
    explicit OnDevice(const Tensor&) {}
    void* stream = nullptr;
#else
    explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    }
    torch::stable::accelerator::DeviceGuard guard;
    void* stream = nullptr;
#endif
};

std::tuple<Tensor, Tensor> forward_op(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> cond,
                                      int64_t dilation, bool save, int64_t version) {
    Layer n = layer_of(x, weight, dilation);
    const int code = dtype_code(x);
    if (bias) {
        check_tensor("bias", *bias, x, {2 * n.H});
        bias = torch::stable::contiguous(*bias);
    }
    if (cond) {
        check_tensor("cond", *cond, x, {n.B, 2 * n.H, n.T});
        cond = item_contiguous(*cond);
        n.cond_batch = cond->stride(0);
    }
    const OnDevice device(x);
    Tensor y = torch::stable::new_empty(x, {n.B, n.H, n.T});
    Tensor h = torch::stable::new_empty(x, {save ? n.B : 0, 2 * n.H, n.T});
    const char* problem = gated_conv_forward(
        code, choose_version(code, version, n), &n, x.data_ptr(), weight.data_ptr(), bias ? bias->data_ptr() : nullptr,
        cond ? cond->data_ptr() : nullptr, y.data_ptr(), save ? h.data_ptr() : nullptr, device.stream);
    STD_TORCH_CHECK(!problem, "gated_conv: ", problem);
    return {y, h};
}

// Returns dx, dweight, dbias and dh, which is also the gradient of cond.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(Tensor dy, Tensor h, Tensor x, Tensor weight, int64_t dilation,
                                                       int64_t version) {
    const Layer n = layer_of(x, weight, dilation);
    const int code = dtype_code(x);
    check_tensor("dy", dy, x, {n.B, n.H, n.T});
    check_tensor("h (kept only when save is true)", h, x, {n.B, 2 * n.H, n.T});
    dy = torch::stable::contiguous(dy);  // often expanded (from a sum) or a slice (from a cat)
    h = torch::stable::contiguous(h);
    const OnDevice device(x);
    Tensor dx = torch::stable::new_empty(x, {n.B, n.C, n.T}), dw = torch::stable::new_empty(x, {2 * n.H, n.C, n.K});
    Tensor dbias = torch::stable::new_empty(x, {2 * n.H}), dh = torch::stable::new_empty(x, {n.B, 2 * n.H, n.T});
    const int chosen = choose_version(code, version, n);
    const ScalarType sum = code == 1 ? ScalarType::Double : ScalarType::Float;
    Tensor workspace = torch::stable::new_empty(x, {gated_conv_workspace(chosen, &n)}, sum);
    const char* problem = gated_conv_backward(code, chosen, &n, dy.data_ptr(), h.data_ptr(), x.data_ptr(),
                                              weight.data_ptr(), dh.data_ptr(), dx.data_ptr(), dw.data_ptr(),
                                              dbias.data_ptr(), workspace.data_ptr(), device.stream);
    STD_TORCH_CHECK(!problem, "gated_conv: ", problem);
    return {dx, dw, dbias, dh};
}
}  // namespace

// STABLE_TORCH_LIBRARY pastes its first argument into names, so a macro needs one more step to be expanded first.
#define DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define IMPLEMENT(library, backend, m) STABLE_TORCH_LIBRARY_IMPL(library, backend, m)

DEFINE(LIBRARY, m) {
    m.def(
        "gated_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? cond, int dilation, bool save, int version) -> "
        "(Tensor y, Tensor h)");
    m.def(
        "gated_conv_backward(Tensor dy, Tensor h, Tensor x, Tensor weight, int dilation, int version) -> (Tensor dx, "
        "Tensor dweight, Tensor dbias, Tensor dh)");
}

IMPLEMENT(LIBRARY, BACKEND, m) {
    m.impl("gated_conv", TORCH_BOX(&forward_op));
    m.impl("gated_conv_backward", TORCH_BOX(&backward_op));
}
