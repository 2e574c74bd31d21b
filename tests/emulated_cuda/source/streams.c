// Streams, events and CUDA graphs. Work is done as soon as it is submitted, so that nobody really waits; what counts is
// that somebody would have, and until when by the clock.
#include "runtime.h"

#include <stdatomic.h>
#include <stdlib.h>

void *new_handle(void) {
    static _Atomic uintptr_t last = 0x1000;
    return (void *)(last += 16);
}

// ---- capture: of one stream at a time

static _Atomic(cudaStream_t) captured;  // a real stream is never NULL here: the default stream cannot be captured
static _Atomic unsigned long long capture_id;

cudaError_t synchronized(void) {
    counters.syncs++;
    return captured == NULL ? usable() : failed(cudaErrorStreamCaptureUnsupported);
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)mode;
    if (stream == NULL || captured != NULL) return failed(cudaErrorStreamCaptureUnsupported);
    capture_id++;
    captured = stream;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = NULL;
    if (captured != stream) return failed(cudaErrorInvalidValue);
    captured = NULL;
    *graph = new_handle();
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    bool active = stream != NULL && captured == stream;
    *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                            size_t *count) {
    cudaStreamIsCapturing(stream, status);
    bool active = *status == cudaStreamCaptureStatusActive;
    if (id != NULL) *id = active ? capture_id : 0;
    if (graph != NULL) *graph = active ? (cudaGraph_t)stream : NULL;
    if (dependencies != NULL) *dependencies = NULL;
    if (edges != NULL) *edges = NULL;
    if (count != NULL) *count = 0;
    return cudaSuccess;
}

// One node, so that PyTorch does not warn of an empty graph.
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (nodes != NULL) *nodes = (cudaGraphNode_t)graph;
    *count = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    (void)graph, (void)flags;
    *executable = new_handle();
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    (void)executable;
    launched("a CUDA graph", NULL);
    clock_kernel(stream, 0);
    return cudaSuccess;
}

// ---- streams

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    touch_device(current_device);
    *stream = new_handle();
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    (void)flags;
    return cudaStreamCreate(stream);
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    (void)flags, (void)priority;
    return cudaStreamCreate(stream);
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    clock_wait_for_stream(stream);
    return synchronized();
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    (void)stream;
    *priority = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    (void)stream;
    function(data);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    (void)flags;
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

// ---- events

static double *time_of(cudaEvent_t event) { return (double *)event; }

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = calloc(1, sizeof(double));
    return *event != NULL ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *time_of(event) = clock_event(stream);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    (void)flags;
    return cudaEventRecord(event, stream);
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)flags;
    clock_stream_waits(stream, *time_of(event));
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    return cudaEventCreate(event);
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    clock_wait_for(*time_of(event));
    return synchronized();
}

// Where the clock is not set, kernels take no time; a little, so that nobody divides by zero.
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    double us = *time_of(end) - *time_of(begin);
    *milliseconds = clock_is_set() ? (float)(us * 1e-3) : 0.01f;
    return cudaSuccess;
}
