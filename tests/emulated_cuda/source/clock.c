// The clock: kernels take modelled time on their stream, and the host goes on, until it waits.
//
// The host's time is what tests say that it works, and a fixed time for each launch; on request the processor's time of
// the whole process as well. Nobody sleeps: a wait puts the host's clock forward to what is waited for. Until a test
// sets what a kernel takes, nothing takes any time.
#include "runtime.h"

#include <pthread.h>
#include <time.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool is_set;
static struct {
    double launch_us, kernel_us, kernel_ps_per_thread, library_us, ps_per_byte;
    bool of_processor;
} costs;
static double works_us;       // that tests and launches have added
static double waited_us;      // by which waits have put the host's clock forward
static double processor_us;   // the processor's time up to which has been counted
static double allowed_us;     // the processor's time that counts

// ---- queues: one for each stream of each device that was used since the clock was set; of more, the last is shared

enum { QUEUES = 64 };
static struct queue {
    cudaStream_t stream;
    int device;
    double ready_us;  // when all that was submitted is done
} queues[QUEUES];
static int queue_count;

static struct queue *queue_of(cudaStream_t stream) {
    // Streams 0, 1 and 2 are the default one, by its several names.
    if ((uintptr_t)stream <= 2) stream = NULL;
    for (int i = 0; i < queue_count; i++)
        if (queues[i].stream == stream && queues[i].device == current_device) return &queues[i];
    if (queue_count < QUEUES) queue_count++;
    queues[queue_count - 1] = (struct queue){.stream = stream, .device = current_device};
    return &queues[queue_count - 1];
}

// ---- the host's time

static double now_us(void) {
    if (costs.of_processor) {
        struct timespec time;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
        double us = (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
        allowed_us += us - processor_us;
        processor_us = us;
    }
    return works_us + waited_us + allowed_us;
}

static void wait_until(double us) {
    double now = now_us();
    if (us > now) waited_us += us - now;
}

static void submit(cudaStream_t stream, double us) {
    pthread_mutex_lock(&lock);
    works_us += costs.launch_us;
    double now = now_us();
    struct queue *queue = queue_of(stream);
    queue->ready_us = (queue->ready_us > now ? queue->ready_us : now) + us;
    pthread_mutex_unlock(&lock);
}

void clock_kernel(cudaStream_t stream, double threads) {
    submit(stream, costs.kernel_us + threads * costs.kernel_ps_per_thread * 1e-6);
}

// cuBLAS and cuDNN run on the stream of their handle. Stubs do not know it: they take the one that was set last.
static _Thread_local cudaStream_t library_stream;

void clock_library(void) { submit(library_stream, costs.library_us); }

EXPORT long cublasSetStream_v2(void *handle, cudaStream_t stream) {
    (void)handle;
    library_stream = stream;
    return 0;
}

EXPORT long cudnnSetStream(void *handle, cudaStream_t stream) { return cublasSetStream_v2(handle, stream); }

void clock_copy(cudaStream_t stream, size_t bytes) { submit(stream, costs.kernel_us + (double)bytes * costs.ps_per_byte * 1e-6); }

void clock_wait_for_stream(cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    wait_until(queue_of(stream)->ready_us);
    pthread_mutex_unlock(&lock);
}

void clock_wait_for_device(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < queue_count; i++)
        if (queues[i].device == current_device) wait_until(queues[i].ready_us);
    pthread_mutex_unlock(&lock);
}

// ---- events: when the work before them is done

double clock_event(cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    double now = now_us(), ready = queue_of(stream)->ready_us;
    pthread_mutex_unlock(&lock);
    return ready > now ? ready : now;
}

bool clock_is_set(void) { return is_set; }

void clock_wait_for(double us) {
    pthread_mutex_lock(&lock);
    wait_until(us);
    pthread_mutex_unlock(&lock);
}

void clock_stream_waits(cudaStream_t stream, double us) {
    pthread_mutex_lock(&lock);
    struct queue *queue = queue_of(stream);
    if (us > queue->ready_us) queue->ready_us = us;
    pthread_mutex_unlock(&lock);
}

// ---- for tests, see tests/emulated_cuda/clock.py

EXPORT void emulated_cuda_set_clock(double launch_us, double kernel_us, double kernel_ps_per_thread, double library_us,
                                    double ps_per_byte, int of_processor) {
    pthread_mutex_lock(&lock);
    is_set = launch_us > 0 || kernel_us > 0 || kernel_ps_per_thread > 0 || library_us > 0 || ps_per_byte > 0 || of_processor;
    costs.of_processor = true;
    now_us();  // the processor's time from here on
    costs.launch_us = launch_us;
    costs.kernel_us = kernel_us;
    costs.kernel_ps_per_thread = kernel_ps_per_thread;
    costs.library_us = library_us;
    costs.ps_per_byte = ps_per_byte;
    costs.of_processor = of_processor != 0;
    works_us = waited_us = allowed_us = 0;
    queue_count = 0;
    pthread_mutex_unlock(&lock);
}

EXPORT double emulated_cuda_now_us(void) {
    pthread_mutex_lock(&lock);
    double now = now_us();
    pthread_mutex_unlock(&lock);
    return now;
}

EXPORT void emulated_cuda_work_us(double us) {
    pthread_mutex_lock(&lock);
    works_us += us;
    pthread_mutex_unlock(&lock);
}
