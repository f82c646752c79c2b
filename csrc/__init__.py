"""The fused operator: CUDA kernels, their binding to PyTorch, and a model of CUDA that runs them on a CPU."""
