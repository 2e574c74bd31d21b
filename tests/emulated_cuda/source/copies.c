// Copies. Device memory holds nothing, unless the settings ask for real memory: what is written there is lost, and what
// is read from there is zeros. A single byte is 1: it is mostly a comparison's answer, and "equal" lets programs go on.
#include "runtime.h"

#include <string.h>

static void copy(void *to, const void *from, size_t bytes) {
    if (settings()->real_memory) {
        memmove(to, from, bytes);
    } else if (is_device_address(to)) {
        return;
    } else if (is_device_address(from)) {
        memset(to, bytes == 1, bytes);
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
