// What the files of the emulated CUDA runtime share.
//
// All of them are linked into one library that is preloaded and is called libcuda.so.1: PyTorch finds the runtime, cuBLAS
// and cuDNN in it before the real ones, and whoever opens the driver by name gets the same library, with the same memory.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Without this, the headers rename functions that PyTorch asks for by their plain names.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <cuda_runtime_api.h>

#define EXPORT __attribute__((visibility("default")))

enum { MAX_DEVICES = 16 };

// ---- settings.c: what the environment says

struct settings {
    int devices;
    size_t device_bytes;
    size_t context_bytes;  // taken from each device before the first allocation, as by a real context
    bool real_memory;      // there is memory behind the addresses, and copies copy
    bool sparse_copies;    // the zeros that large copies to the host bring take no memory there
    bool show_launches;
    bool in_container;     // the driver knows this process by another number than it has itself
    const char *broken_by;  // part of the name of a kernel that fails, or NULL
};
const struct settings *settings(void);

// ---- counters.c: what happened, to be read by tests

struct counters {
    _Atomic long mallocs, frees, launches, syncs, library_calls;
};
extern struct counters counters;
// Called by generated stubs.
void count_library_call(void);

// ---- errors.c

// Remember the error for cudaGetLastError, and return it.
cudaError_t failed(cudaError_t error);
// Let every further call that asks `usable` fail, as after an assertion in a kernel.
void break_devices(void);
// What a call that uses a device returns if nothing else is wrong.
cudaError_t usable(void);

// ---- device.c

extern _Thread_local int current_device;
// Note that the device has a context from now on.
void touch_device(int device);
bool is_device(int device);

// ---- arena.c: addresses

// Everything is handed out in pages of this size, the driver's own granularity.
#define PAGE_BYTES ((size_t)2 << 20)

struct block {
    size_t bytes;  // as asked for
    int device;
    void *start;
};

enum place { ON_DEVICE, PINNED };

// Take addresses for `bytes`; NULL if there are no more. Never soon the same again, so that a late use is not hidden.
void *take_addresses(enum place place, size_t bytes, int device);
// Give back what take_addresses returned; false if it did not return it.
bool give_back_addresses(enum place place, void *start, struct block *block);
// Find the block that holds the address; false if none does.
bool find_block(enum place place, const void *address, struct block *block);
// Whether the address is one of devices' addresses, allocated or not.
bool is_device_address(const void *address);

// ---- memory.c: bytes

// Count bytes of a device as used; false if it has not so many.
bool take_bytes(int device, size_t bytes);
void give_back_bytes(int device, size_t bytes);
size_t used_bytes(int device);

// ---- clock.c: what the work that is submitted takes, and waits for it

void clock_kernel(cudaStream_t stream, double threads);
void clock_copy(cudaStream_t stream, size_t bytes);
// A call of cuBLAS or cuDNN, on the stream that this thread has set last.
void clock_library(void);
void clock_wait_for_stream(cudaStream_t stream);
void clock_wait_for_device(void);
// When all that was submitted to the stream is done; waiting for that moment, on the host and on a stream.
double clock_event(cudaStream_t stream);
void clock_wait_for(double us);
// Whether anything takes time.
bool clock_is_set(void);
void clock_stream_waits(cudaStream_t stream, double us);

// ---- streams.c

// A handle that nobody has: streams, events, descriptors.
void *new_handle(void);
// Count a launch, and show the kernel's name and first arguments where the settings ask for it.
void launched(const char *what, void **arguments);
// Count a wait for the device; an error while a stream is being captured, as in CUDA.
cudaError_t synchronized(void);
