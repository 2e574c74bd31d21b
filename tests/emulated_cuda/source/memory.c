// Memory: which bytes of which device are used, and the runtime's functions that take and give them back.
#include "runtime.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[MAX_DEVICES], peak[MAX_DEVICES];

bool take_bytes(int device, size_t bytes) {
    touch_device(device);
    pthread_mutex_lock(&lock);
    bool fits = used[device] + bytes + settings()->context_bytes <= settings()->device_bytes;
    if (fits) {
        used[device] += bytes;
        if (used[device] > peak[device]) peak[device] = used[device];
    }
    pthread_mutex_unlock(&lock);
    return fits;
}

void give_back_bytes(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    used[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

size_t used_bytes(int device) {
    pthread_mutex_lock(&lock);
    size_t bytes = used[device];
    pthread_mutex_unlock(&lock);
    return bytes;
}

EXPORT size_t emulated_cuda_used_bytes(int device) { return is_device(device) ? used_bytes(device) : 0; }

EXPORT size_t emulated_cuda_peak_bytes(int device) { return is_device(device) ? peak[device] : 0; }

EXPORT void emulated_cuda_reset_peak(int device) {
    if (!is_device(device)) return;
    pthread_mutex_lock(&lock);
    peak[device] = used[device];
    pthread_mutex_unlock(&lock);
}

// ---- device memory

// The driver gives out small requests in steps of 512 bytes.
static size_t rounded(size_t bytes) { return (bytes + 511) & ~(size_t)511; }

EXPORT cudaError_t cudaMalloc(void **address, size_t bytes) {
    counters.mallocs++;
    if (!is_device(current_device)) return failed(cudaErrorNoDevice);
    *address = NULL;
    if (bytes == 0 || usable() != cudaSuccess) return usable();
    if (!take_bytes(current_device, rounded(bytes))) return failed(cudaErrorMemoryAllocation);
    *address = take_addresses(ON_DEVICE, bytes, current_device);
    if (*address != NULL) return cudaSuccess;
    give_back_bytes(current_device, rounded(bytes));
    return failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaFree(void *address) {
    if (address == NULL) return cudaSuccess;
    counters.frees++;
    struct block block;
    if (!give_back_addresses(ON_DEVICE, address, &block)) return failed(cudaErrorInvalidValue);
    give_back_bytes(block.device, rounded(block.bytes));
    return cudaSuccess;
}

EXPORT cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
    (void)stream;
    return cudaMalloc(address, bytes);
}

EXPORT cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
    (void)stream;
    return cudaFree(address);
}

EXPORT cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    if (!is_device(current_device)) return failed(cudaErrorNoDevice);
    touch_device(current_device);
    *total = settings()->device_bytes;
    *free = settings()->device_bytes - settings()->context_bytes - used_bytes(current_device);
    return cudaSuccess;
}

// ---- page-locked host memory, which is real

EXPORT cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    (void)flags;
    *address = take_addresses(PINNED, bytes, current_device);
    return *address != NULL ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaFreeHost(void *address) {
    struct block block;
    return address == NULL || give_back_addresses(PINNED, address, &block) ? cudaSuccess : failed(cudaErrorInvalidValue);
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    struct block block = {0};
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    if (find_block(ON_DEVICE, address, &block)) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->devicePointer = (void *)address;
    } else if (find_block(PINNED, address, &block)) {
        attributes->type = cudaMemoryTypeHost;
        attributes->devicePointer = attributes->hostPointer = (void *)address;
    }
    attributes->device = block.device;
    return cudaSuccess;
}
