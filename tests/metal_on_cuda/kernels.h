// What the CUDA that generate.py writes offers to run.cc: for each element type, its kernels by
// name and its function constants by index, as Metal has them.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "shaders/params.h"

// of [[buffer(i)]], i ≥ 1. [[buffer(0)]], the sizes, goes by itself.
struct Arguments {
  void* at[7];
};

struct Shaders {
  struct Kernel {
    const char* name;
    void (*function)(Sizes, Arguments);
  };
  std::vector<Kernel> kernels;
  cudaError_t (*set_constant)(int index, const void* value);
};

Shaders FloatShaders();
Shaders HalfShaders();
Shaders BfloatShaders();
