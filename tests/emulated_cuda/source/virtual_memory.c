// The driver's virtual memory: addresses are reserved first, and physical memory, which has no address, is mapped there
// later. PyTorch's allocator grows its segments so with `expandable_segments:True`. Bytes count from cuMemCreate on.
#include "runtime.h"

#include <pthread.h>
#include <stdlib.h>

// A handle of physical memory. As in CUDA, it lives until it has been released and is mapped nowhere.
struct physical {
    size_t bytes;
    int device;
    int uses;  // by its creator, and by each mapping
};

struct mapping {
    CUdeviceptr address;
    struct physical *physical;
    struct mapping *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct mapping *mappings;

static void drop_use(struct physical *physical) {
    if (--physical->uses > 0) return;
    give_back_bytes(physical->device, physical->bytes);
    free(physical);
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                              CUmemAllocationGranularity_flags option) {
    (void)properties, (void)option;
    *bytes = PAGE_BYTES;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *properties,
                            unsigned long long flags) {
    (void)flags;
    counters.mallocs++;
    int device = properties->location.id;
    if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE || !is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (bytes == 0 || bytes % PAGE_BYTES != 0) return CUDA_ERROR_INVALID_VALUE;
    struct physical *physical = malloc(sizeof *physical);
    if (physical == NULL || !take_bytes(device, bytes)) {
        free(physical);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *physical = (struct physical){.bytes = bytes, .device = device, .uses = 1};
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)physical;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    counters.frees++;
    pthread_mutex_lock(&lock);
    drop_use((struct physical *)(uintptr_t)handle);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wish,
                                    unsigned long long flags) {
    (void)alignment, (void)wish, (void)flags;
    *address = (CUdeviceptr)(uintptr_t)take_addresses(ON_DEVICE, bytes, current_device);
    return *address != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    (void)bytes;
    struct block block;
    bool given_back = give_back_addresses(ON_DEVICE, (void *)(uintptr_t)address, &block);
    return given_back ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                         unsigned long long flags) {
    (void)flags;
    struct physical *physical = (struct physical *)(uintptr_t)handle;
    if (!is_device_address((void *)(uintptr_t)address) || offset + bytes > physical->bytes) return CUDA_ERROR_INVALID_VALUE;
    struct mapping *mapping = malloc(sizeof *mapping);
    if (mapping == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    physical->uses++;
    *mapping = (struct mapping){.address = address, .physical = physical, .next = mappings};
    mappings = mapping;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

// Who may read and write: nobody reads or writes here.
EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t count) {
    (void)bytes, (void)access, (void)count;
    return is_device_address((void *)(uintptr_t)address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// PyTorch unmaps what it mapped, piece by piece or several pieces at once.
EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    bool found = false;
    pthread_mutex_lock(&lock);
    for (struct mapping **place = &mappings; *place != NULL;) {
        struct mapping *mapping = *place;
        if (mapping->address >= address && mapping->address < address + bytes) {
            *place = mapping->next;
            drop_use(mapping->physical);
            free(mapping);
            found = true;
        } else {
            place = &mapping->next;
        }
    }
    pthread_mutex_unlock(&lock);
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address) {
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (struct mapping *mapping = mappings; mapping != NULL; mapping = mapping->next) {
        if (mapping->address != (CUdeviceptr)(uintptr_t)address) continue;
        mapping->physical->uses++;
        *handle = (CUmemGenericAllocationHandle)(uintptr_t)mapping->physical;
        result = CUDA_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *bytes, CUdeviceptr address) {
    struct block block;
    if (!find_block(ON_DEVICE, (void *)(uintptr_t)address, &block)) return CUDA_ERROR_NOT_FOUND;
    if (start != NULL) *start = (CUdeviceptr)(uintptr_t)block.start;
    if (bytes != NULL) *bytes = block.bytes;
    return CUDA_SUCCESS;
}

// ---- the driver's plain allocation

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    return (CUresult)cudaMalloc((void **)address, bytes);
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr address) { return (CUresult)cudaFree((void *)(uintptr_t)address); }
