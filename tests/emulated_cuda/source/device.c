// Devices: how many, which one each thread uses, and what they say about themselves: an H100's figures.
#include "runtime.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum { MULTIPROCESSORS = 132, CUDA_VERSION_EMULATED = 13000 };
enum { SHARED_PER_BLOCK = 49152, SHARED_PER_BLOCK_OPTIN = 232448, SHARED_PER_MULTIPROCESSOR = 233472 };

_Thread_local int current_device;
static atomic_bool has_context[MAX_DEVICES];

bool is_device(int device) { return device >= 0 && device < settings()->devices; }

void touch_device(int device) {
    if (is_device(device)) has_context[device] = true;
}

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    *count = settings()->devices;
    return *count > 0 ? cudaSuccess : failed(cudaErrorNoDevice);
}

EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
    if (!is_device(device)) return failed(cudaErrorInvalidDevice);
    current_device = device;
    touch_device(device);  // since CUDA 12
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
    clock_wait_for_device();
    return synchronized();
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_EMULATED;
    return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    if (!is_device(device)) return failed(cudaErrorInvalidDevice);
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "NVIDIA H100 80GB HBM3 (emulated)");
    properties->uuid.bytes[0] = (char)(device + 1);
    properties->pciBusID = device + 1;
    properties->totalGlobalMem = settings()->device_bytes;
    properties->major = 9;
    properties->minor = 0;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->sharedMemPerBlock = SHARED_PER_BLOCK;
    properties->sharedMemPerBlockOptin = SHARED_PER_BLOCK_OPTIN;
    properties->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR;
    properties->reservedSharedMemPerBlock = 1024;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->totalConstMem = 65536;
    properties->memPitch = 2147483647;
    properties->textureAlignment = 512;
    properties->texturePitchAlignment = 32;
    properties->memoryBusWidth = 5120;
    properties->l2CacheSize = 50 << 20;
    properties->persistingL2CacheMaxSize = 32 << 20;
    properties->asyncEngineCount = 3;
    properties->concurrentKernels = properties->cooperativeLaunch = 1;
    properties->unifiedAddressing = properties->managedMemory = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    if (!is_device(device)) return failed(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_PER_BLOCK; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_PER_BLOCK_OPTIN; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_PER_MULTIPROCESSOR; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
        case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
        default: *value = 0;
    }
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, (size_t)length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = is_device(device) && is_device(peer) && device != peer;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

// ---- the same, asked of the driver

EXPORT CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = settings()->devices;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int index) {
    *device = index;
    return is_device(index) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// The runtime's numbers of attributes are the driver's. What PyTorch's allocator asks the driver about (GPUDirect,
// handles shared between processes) is not there.
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *flags = 0;
    *active = has_context[device];
    return CUDA_SUCCESS;
}

// A device's context is its number, moved away from NULL.
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    touch_device(device);
    *context = (CUcontext)(uintptr_t)(device + 1);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_device;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = has_context[current_device] ? (CUcontext)(uintptr_t)(current_device + 1) : NULL;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    if (context != NULL) current_device = (int)(uintptr_t)context - 1;
    return CUDA_SUCCESS;
}
