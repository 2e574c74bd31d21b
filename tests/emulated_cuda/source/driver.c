// The driver's modules and launches, which Triton and kernels compiled at run time use, and finding driver functions.
#define _GNU_SOURCE
#include "runtime.h"

#include <dlfcn.h>
#include <stdio.h>

// ---- modules: all kernels look alike

static CUresult some_handle(void *handle) {
    *(void **)handle = new_handle();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    (void)image;
    return some_handle(module);
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    (void)image, (void)count, (void)options, (void)values;
    return some_handle(module);
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    (void)module, (void)name;
    return some_handle(function);
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *configuration) {
    (void)function, (void)configuration;
    *clusters = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    (void)function, (void)threads, (void)shared;
    *blocks = 1;
    return CUDA_SUCCESS;
}

// ---- launches

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *configuration, CUfunction function, void **arguments, void **extra) {
    (void)function, (void)extra;
    launched("a kernel by the driver", arguments);
    clock_kernel(configuration->hStream, (double)configuration->gridDimX * configuration->gridDimY * configuration->gridDimZ *
                                             configuration->blockDimX * configuration->blockDimY * configuration->blockDimZ);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                               void **extra) {
    CUlaunchConfig configuration = {
        .gridDimX = grid_x, .gridDimY = grid_y, .gridDimZ = grid_z,
        .blockDimX = block_x, .blockDimY = block_y, .blockDimZ = block_z,
        .sharedMemBytes = shared, .hStream = stream,
    };
    return cuLaunchKernelEx(&configuration, function, arguments, extra);
}

// ---- the rest

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    struct block block;
    if (!find_block(ON_DEVICE, (void *)(uintptr_t)address, &block)) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int *)value = block.device;
    else *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = cudaGetErrorName((cudaError_t)error);
    return CUDA_SUCCESS;
}

// The library that this function is in, and so all the functions that it has.
static void *this_library(void) {
    Dl_info info;
    if (dladdr((void *)this_library, &info) == 0) return NULL;
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

// PyTorch's allocator and NVSHMEM ask for the driver's functions by name. Newer forms of a function have a version in their
// real name.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
    (void)version, (void)flags;
    char versioned[256];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    void *library = this_library();
    *function = library == NULL ? NULL : dlsym(library, versioned);
    if (*function == NULL && library != NULL) *function = dlsym(library, name);
    if (result != NULL) *result = *function != NULL ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
