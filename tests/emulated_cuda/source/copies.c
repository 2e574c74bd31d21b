// Copies. Device memory holds nothing, unless the settings ask for real memory: what is written there is lost, and what
// is read from there is zeros. A single byte is 1: it is mostly a comparison's answer, and "equal" lets programs go on.
#include "runtime.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, SPARSE_FROM = 1 << 20 };

// Zeros of an ordinary allocation need no memory: its pages are given back, and are zeros when they are read.
static void zero(void *to, size_t bytes) {
    char *begin = (char *)(((uintptr_t)to + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    char *end = (char *)(((uintptr_t)to + bytes) & ~(uintptr_t)(PAGE - 1));
    bool is_sparse = settings()->sparse_copies && bytes >= SPARSE_FROM;
    if (!is_sparse || madvise(begin, (size_t)(end - begin), MADV_DONTNEED) != 0) {
        memset(to, 0, bytes);
        return;
    }
    memset(to, 0, (size_t)(begin - (char *)to));
    memset(end, 0, (size_t)((char *)to + bytes - end));
}

static void copy(void *to, const void *from, size_t bytes) {
    if (settings()->real_memory) {
        memmove(to, from, bytes);
    } else if (is_device_address(to)) {
        return;
    } else if (is_device_address(from)) {
        if (bytes == 1) *(char *)to = 1;
        else zero(to, bytes);
    } else {
        memmove(to, from, bytes);
    }
}

static void set(void *to, int value, size_t bytes) {
    if (settings()->real_memory || !is_device_address(to)) memset(to, value, bytes);
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    copy(to, from, bytes);
    clock_copy(NULL, bytes);
    clock_wait_for_device();
    return synchronized();
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    copy(to, from, bytes);
    clock_copy(stream, bytes);
    return usable();
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int device, const void *from, int source, size_t bytes, cudaStream_t stream) {
    (void)device, (void)source;
    copy(to, from, bytes);
    clock_copy(stream, bytes);
    return usable();
}

EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    clock_copy(stream, width * height);
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    set(to, value, bytes);
    clock_copy(NULL, bytes);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    set(to, value, bytes);
    clock_copy(stream, bytes);
    return cudaSuccess;
}

// A symbol's address on the device is never followed, so its host shadow stands for it.
EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    *address = (void *)symbol;
    return cudaSuccess;
}
