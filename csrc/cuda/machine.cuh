// The instructions that kernels are written in. gpu.cuh has them in PTX; a build by a plain C++
// compiler takes a header of the same functions that emulates them (python_tests/cuda_host).
#pragma once

#ifdef __CUDACC__
#include "cuda/gpu.cuh"
#else
#include "emulated_gpu.h"
#endif
