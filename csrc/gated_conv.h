// The C interface between the kernels (gated_conv.cu, no PyTorch) and the binding (gated_conv.cpp, no CUDA).
#pragma once

struct Layer {  // all tensors contiguous, but x and cond may be slices of channels: the stride of their frames
    int B, T, C, H, K, dilation;  // batch, frames, input channels, output channels, taps, frames between taps
    long long x_row, cond_row;    // in elements: C and 2H where contiguous; an item begins T frames after the last
    bool aligned;                 // x, w, cond begin on 16 bytes, which version 5 needs
};

// dtype: 0 float32, 1 float64, 2 float16, 3 bfloat16. bias, cond and a may be null. Pointers are device memory, stream
// a cudaStream_t. They return nullptr, or a message.
extern "C" const char* gated_conv_forward(int dtype, int version, const Layer* n, const void* x, const void* w,
                                          const void* bias, const void* cond, void* y, void* a, void* stream);
extern "C" const char* gated_conv_backward(int dtype, int version, const Layer* n, const void* dy, const void* a,
                                           const void* x, const void* w, void* da, void* dx, void* dw, void* dbias,
                                           void* workspace, void* stream);
extern "C" int gated_conv_version(int dtype, int version,
                                  const Layer* n);                       // 0 = the best that fits; 0 returned: cannot
extern "C" long long gated_conv_workspace(int version, const Layer* n);  // elements of the sum's type for backward
