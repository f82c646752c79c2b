// The PyTorch binding of gated_conv.cu: schema, argument checks, memory, device and stream. Uses PyTorch's stable C
// ABI, so it compiles in seconds and one build serves every later PyTorch. Shapes without data (fake), autograd and
// autocast are registered from Python, in gated_conv.py. With -DCUDA_ON_CPU the same kernels become CPU operators
// (cuda_on_cpu.h) in a library of their own, talkingflow_cpu: that is what the tests run on a machine without a GPU.
//
// No number here passes through a C++ stream: where libstdc++ is linked statically, as in some images, that crashes
// (its locale was never set up). PyTorch's own checking macros use streams: they get new bodies before they are used.
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>
#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>
#endif
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace {
template <class V> std::string in_words(const V& v) {
    if constexpr (std::is_integral_v<V>) return std::to_string(v);
    else if constexpr (std::is_convertible_v<V, std::string>) return v;
    else return "?";  // nothing of ours; perhaps an argument of a header's own check
}
template <class... V> [[noreturn]] void refuse(const V&... parts) {
    throw std::runtime_error((std::string() + ... + in_words(parts)));
}
}  // namespace
#undef STD_TORCH_CHECK
#undef TORCH_ERROR_CODE_CHECK
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STD_TORCH_CHECK(condition, ...) \
    if (!(condition)) { /* without do-while: the headers leave the semicolon out */ \
        refuse("gated_conv: ", ##__VA_ARGS__); \
    }
#define TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, "PyTorch refused ", #call)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

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
        default: refuse("gated_conv: x must be float32, float64, float16 or bfloat16");
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
        refuse("gated_conv: ", name, " has shape (", found, ") vs expected (", wanted, ")");
    }
    STD_TORCH_CHECK(v.scalar_type() == x.scalar_type(), name,
                    " and x differ in dtype; cast them, or run under torch.autocast");
    STD_TORCH_CHECK(v.is_cuda() == x.is_cuda() && v.get_device_index() == x.get_device_index(), name,
                    " and x are on different devices");
}

// (B, T, channels) as the kernels read it: the channels of a frame neighbours, frames one stride apart through all
// items. A slice of channels passes as it is, others are copied.
Tensor frames_apart(const Tensor& v) {
    const bool fits = v.numel() == 0 || ((v.stride(2) == 1 || v.size(2) == 1) && v.stride(1) >= v.size(2) &&
                                         (v.size(0) == 1 || v.stride(0) == v.size(1) * v.stride(1)));
    return fits ? v : torch::stable::contiguous(v);
}

// (2H, C, K) as the kernels read it, K before C. The transposed view of a (2H, K, C) parameter costs nothing here.
Tensor taps_first(const Tensor& w) { return torch::stable::contiguous(torch::stable::transpose(w, 1, 2)); }

bool on_16_bytes(const Tensor& v) { return reinterpret_cast<uintptr_t>(v.data_ptr()) % 16 == 0; }

// Checks x and weight, makes both readable by the kernels, and describes them.
Layer layer_of(Tensor& x, Tensor& weight, int64_t dilation) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "x must be (B, T, C) and weight (2H, C, K)");
    STD_TORCH_CHECK(weight.size(0) % 2 == 0, "weight has ", weight.size(0),
                    " rows vs an even number expected (values, then gates)");
    STD_TORCH_CHECK(weight.size(2) >= 1 && weight.size(2) <= 1024 && dilation >= 1,
                    "kernel size must be 1 to 1024, dilation at least 1");
    check_tensor("weight", weight, x, {weight.size(0), x.size(2), weight.size(2)});
    for (const int64_t size : {x.size(0), x.size(1), x.size(2), weight.size(0), weight.size(2), dilation}) {
        STD_TORCH_CHECK(size < (int64_t(1) << 31), "a size of ", size, " is over 2^31 - 1");
    }
    x = frames_apart(x);
    weight = taps_first(weight);
    Layer n{};
    n.B = (int)x.size(0), n.T = (int)x.size(1), n.C = (int)x.size(2);
    n.H = (int)(weight.size(0) / 2), n.K = (int)weight.size(1), n.dilation = (int)dilation;
    n.x_row = x.stride(1);
    n.aligned = on_16_bytes(x) && on_16_bytes(weight);
    return n;
}

int choose_version(int code, int64_t version, const Layer& n) {
    const int chosen = gated_conv_version(code, version > 9 ? 9 : (int)version, &n);
    STD_TORCH_CHECK(chosen > 0, "version ", version,
                    " cannot run this: 1 takes everything, 2 and 3 need taps whose tile fits 48 KB of shared memory, "
                    "4 fits 99 KB and needs float16 or bfloat16 and a GPU of compute capability 8.0, 5 these types, "
                    "9.0 and rows that are multiples of 16 bytes; 0 chooses");
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
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
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
        check_tensor("cond", *cond, x, {n.B, n.T, 2 * n.H});
        cond = frames_apart(*cond);
        n.cond_row = cond->stride(1);
        n.aligned = n.aligned && on_16_bytes(*cond);
    }
    const OnDevice device(x);
    const int chosen = choose_version(code, version, n);
    Tensor y = torch::stable::new_empty(x, {n.B, n.T, n.H});
    Tensor a = torch::stable::new_empty(x, {save ? n.B : 0, n.T, 2 * n.H});
    const char* problem = gated_conv_forward(
        code, chosen, &n, x.data_ptr(), weight.data_ptr(), bias ? bias->data_ptr() : nullptr,
        cond ? cond->data_ptr() : nullptr, y.data_ptr(), save ? a.data_ptr() : nullptr, device.stream);
    STD_TORCH_CHECK(!problem, problem);
    return {y, a};
}

// Returns dx, dweight, dbias and da, which is also the gradient of cond.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(Tensor dy, Tensor a, Tensor x, Tensor weight, int64_t dilation,
                                                       int64_t version) {
    const Layer n = layer_of(x, weight, dilation);
    const int code = dtype_code(x);
    check_tensor("dy", dy, x, {n.B, n.T, n.H});
    check_tensor("a (kept only when save is true)", a, x, {n.B, n.T, 2 * n.H});
    dy = torch::stable::contiguous(dy);  // often expanded (from a sum) or a slice (from a cat)
    a = torch::stable::contiguous(a);
    const OnDevice device(x);
    const int chosen = choose_version(code, version, n);
    Tensor dx = torch::stable::new_empty(x, {n.B, n.T, n.C}), dw = torch::stable::new_empty(x, {2 * n.H, n.K, n.C});
    Tensor dbias = torch::stable::new_empty(x, {2 * n.H}), da = torch::stable::new_empty(x, {n.B, n.T, 2 * n.H});
    const ScalarType sum = code == 1 ? ScalarType::Double : ScalarType::Float;
    Tensor workspace = torch::stable::new_empty(x, {gated_conv_workspace(chosen, &n)}, sum);
    const char* problem = gated_conv_backward(code, chosen, &n, dy.data_ptr(), a.data_ptr(), x.data_ptr(),
                                              weight.data_ptr(), da.data_ptr(), dx.data_ptr(), dw.data_ptr(),
                                              dbias.data_ptr(), workspace.data_ptr(), device.stream);
    STD_TORCH_CHECK(!problem, problem);
    return {dx, torch::stable::transpose(dw, 1, 2), dbias, da};  // dweight lies as the kernels' weight does
}
}  // namespace

// STABLE_TORCH_LIBRARY pastes its first argument into names, so a macro needs one more step to be expanded first.
#define DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define IMPLEMENT(library, backend, m) STABLE_TORCH_LIBRARY_IMPL(library, backend, m)

DEFINE(LIBRARY, m) {
    m.def(
        "gated_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? cond, int dilation, bool save, int version) -> "
        "(Tensor y, Tensor a)");
    m.def(
        "gated_conv_backward(Tensor dy, Tensor a, Tensor x, Tensor weight, int dilation, int version) -> (Tensor dx, "
        "Tensor dweight, Tensor dbias, Tensor da)");
}

IMPLEMENT(LIBRARY, BACKEND, m) {
    m.impl("gated_conv", TORCH_BOX(&forward_op));
    m.impl("gated_conv_backward", TORCH_BOX(&backward_op));
}
