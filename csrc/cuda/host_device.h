// How functions are marked for nvcc. To any other compiler they are ordinary functions.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#define DEVICE __device__ __forceinline__
// A kernel of so many threads, of which so many programs share a multiprocessor.
#define KERNEL(threads, programs) __global__ void __launch_bounds__(threads, programs)
#else
#define HOST_DEVICE
#define DEVICE inline
#define KERNEL(threads, programs) void
#endif
