// Errors: the last one of each thread, and their names.
#include "runtime.h"

static _Thread_local cudaError_t last_error;

cudaError_t failed(cudaError_t error) {
    last_error = error;
    return error;
}

static _Atomic bool broken;

void break_devices(void) { broken = true; }

cudaError_t usable(void) { return broken ? failed(cudaErrorAssert) : cudaSuccess; }

EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORT const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        case cudaErrorAssert: return "cudaErrorAssert";
        default: return "an error of the emulated CUDA runtime";
    }
}

EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorNotSupported: return "the emulated CUDA runtime does not have this";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorAssert: return "device-side assert triggered";
        default: return cudaGetErrorName(error);
    }
}
