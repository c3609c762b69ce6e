/* Stands for libcuda.so.1 where there is no GPU: it loads any image, runs nothing, and keeps what
   the last launch was given. The device it describes is an H100. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;

typedef struct {
    char name[256];
    int opted_in; /* bytes of dynamic shared memory that the function may use */
} Function;

typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void *stream, *attributes;
    unsigned num_attributes;
} Config;

struct {
    int sizes[128], num_parameters; /* set before a launch: a driver knows them */
    int num_values;
    uint64_t values[256]; /* one of a parameter, eight of a tensor map */
    unsigned grid[3], threads, shared, num_launches;
    int opted_in;
    char name[256];
} stub_launch = {.num_launches = 0};

enum { TENSOR_MAP = 128 }; /* bytes; this driver fills the first half */
enum { SHARED_OPT_IN = 97, MAJOR = 75, MINOR = 76, MULTIPROCESSORS = 16 };

Result cuLaunchKernelEx(const Config *config, Function *function, void **parameters, void **extra) {
    unsigned grid[3] = {config->grid_x, config->grid_y, config->grid_z};
    memcpy(stub_launch.grid, grid, sizeof grid);
    stub_launch.threads = config->block_x * config->block_y * config->block_z;
    stub_launch.shared = config->shared;
    stub_launch.opted_in = function->opted_in;
    memcpy(stub_launch.name, function->name, sizeof function->name);
    uint64_t *value = stub_launch.values;
    for (int i = 0; i < stub_launch.num_parameters; i++) {
        int size = stub_launch.sizes[i] == TENSOR_MAP ? 64 : stub_launch.sizes[i];
        *value = 0;
        memcpy(value, parameters[i], size);
        value += (size + 7) / 8;
    }
    stub_launch.num_values = value - stub_launch.values;
    stub_launch.num_launches++;
    return 0;
}

Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleGetFunction(Function **function, void *module, const char *name) {
    *function = calloc(1, sizeof **function);
    strncpy((*function)->name, name, sizeof(*function)->name - 1);
    return 0;
}
Result cuFuncSetAttribute(Function *function, int attribute, int value) {
    if (attribute != 8) return 1; /* MAX_DYNAMIC_SHARED_SIZE_BYTES: the only one it knows */
    function->opted_in = value;
    return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, Function *function) {
    *value = attribute == 0 ? 1024 : 0; /* MAX_THREADS_PER_BLOCK */
    return 0;
}
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == SHARED_OPT_IN ? 227 * 1024
           : attribute == MAJOR ? 9
           : attribute == MINOR ? 0
           : attribute == MULTIPROCESSORS ? 132
           : 65536;
    return 0;
}
Result cuPointerGetAttribute(uint64_t *address, int attribute, uint64_t pointer) {
    *address = pointer;
    return 0;
}
Result cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxPopCurrent_v2(void **context) { *context = (void *)1; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }

Result cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *address,
                              const uint64_t *shape, const uint64_t *strides, const uint32_t *box,
                              const uint32_t *element_strides, int interleave, int swizzle,
                              int promotion, int fill) {
    if (rank != 2 || interleave != 0 || fill != 0) return 1;
    uint64_t values[8] = {(uint64_t)address, shape[0], shape[1], strides[0],
                          box[0], box[1], type, swizzle};
    memcpy(map, values, sizeof values);
    return 0;
}

#define DOES_NOTHING(name) Result name(void) { return 0; }
DOES_NOTHING(cuInit)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxPushCurrent_v2)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuCtxSynchronize)
DOES_NOTHING(cuDevicePrimaryCtxRelease_v2)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuMemAlloc_v2)
DOES_NOTHING(cuMemcpyDtoH_v2)
DOES_NOTHING(cuMemcpyHtoD_v2)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuOccupancyMaxActiveClusters)
DOES_NOTHING(cuStreamSynchronize)
DOES_NOTHING(cuTensorMapEncodeIm2col)
