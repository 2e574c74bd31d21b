// Kernels: their registration by the libraries that bring them, and their launches, which are counted and do nothing.
#include "runtime.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void launched(const char *what, void **arguments) {
    counters.launches++;
    touch_device(current_device);
    if (settings()->broken_by != NULL && what != NULL && strstr(what, settings()->broken_by) != NULL) break_devices();
    if (!settings()->show_launches) return;
    // Arguments are pointers to the values; whether a value is a pointer only the kernel knows.
    if (arguments != NULL) fprintf(stderr, "emulated CUDA: launch of %s, first argument %p\n", what, *(void **)arguments[0]);
    else fprintf(stderr, "emulated CUDA: launch of %s\n", what);
}

// ---- names, only kept where somebody asks for them: libtorch_cuda has tens of thousands of kernels

struct kernel {
    const void *function;
    const char *name;
    struct kernel *next;
};
enum { BUCKETS = 1 << 14 };
static struct kernel *kernels[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool asks_for_names(void) { return settings()->show_launches || settings()->broken_by != NULL; }

static size_t bucket_of(const void *function) { return ((uintptr_t)function >> 4) % BUCKETS; }

static const char *name_of(const void *function) {
    if (!asks_for_names()) return NULL;
    pthread_mutex_lock(&lock);
    struct kernel *kernel = kernels[bucket_of(function)];
    while (kernel != NULL && kernel->function != function) kernel = kernel->next;
    pthread_mutex_unlock(&lock);
    return kernel != NULL ? kernel->name : "an unknown kernel";
}

EXPORT void __cudaRegisterFunction(void **binary, const char *function, char *device_function, const char *name,
                                   int thread_limit, void *x, void *y, void *z, void *w, int *warp_size) {
    (void)binary, (void)device_function, (void)thread_limit, (void)x, (void)y, (void)z, (void)w, (void)warp_size;
    if (!asks_for_names()) return;
    struct kernel *kernel = malloc(sizeof *kernel);
    if (kernel == NULL) return;
    pthread_mutex_lock(&lock);
    *kernel = (struct kernel){.function = function, .name = name, .next = kernels[bucket_of(function)]};
    kernels[bucket_of(function)] = kernel;
    pthread_mutex_unlock(&lock);
}

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    (void)binary;
    return handle;
}

EXPORT char __cudaInitModule(void **binary) {
    (void)binary;
    return 1;
}

// ---- a kernel's attributes

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                         size_t shared, unsigned flags) {
    (void)function, (void)shared, (void)flags;
    *blocks = threads > 0 ? 2048 / threads : 1;
    if (*blocks < 1) *blocks = 1;
    if (*blocks > 32) *blocks = 32;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

// ---- launches

// `kernel<<<grid, block, shared, stream>>>(...)` is compiled into a push, a call of the kernel's host stub, which pops the
// configuration again, and a launch. Stubs of one thread may be nested a few deep.
enum { NESTED = 8 };
static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configurations[NESTED];
static _Thread_local unsigned pushed;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    unsigned place = pushed++ % NESTED;
    configurations[place].grid = grid;
    configurations[place].block = block;
    configurations[place].shared = shared;
    configurations[place].stream = stream;
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    unsigned place = --pushed % NESTED;
    *grid = configurations[place].grid;
    *block = configurations[place].block;
    *shared = configurations[place].shared;
    *(cudaStream_t *)stream = configurations[place].stream;
    return cudaSuccess;
}

static double threads(dim3 grid, dim3 block) {
    return (double)grid.x * grid.y * grid.z * block.x * block.y * block.z;
}

EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    (void)shared, (void)arguments;
    cudaError_t before = usable();  // what a kernel does wrong, a later call hears
    launched(name_of(function), NULL);
    clock_kernel(stream, threads(grid, block));
    return before;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel((const void *)kernel, grid, block, arguments, shared, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    (void)arguments;
    cudaError_t before = usable();  // what a kernel does wrong, a later call hears
    launched(name_of(function), NULL);
    clock_kernel(configuration->stream, threads(configuration->gridDim, configuration->blockDim));
    return before;
}
