// The end of a process.
//
// PyTorch's autograd threads (a CPU build has none) are told to end when the process has finalized Python already, and
// then want Python's lock once more. Python up to 3.13 ends a thread that does so with pthread_exit; that unwinds through
// a destructor of PyTorch which must not be left so, and C++ aborts the process: "terminate called without an active
// exception". It is a race with the rest of the process's exit, on GPUs, too. Python 3.14 lets such a thread wait for ever
// instead, PyTorch from Python 3.12 on does not ask for the lock; here a thread waits on all of them.
#define _GNU_SOURCE
#include "runtime.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static bool python_has_ended(void) {
    int (*is_initialized)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    return is_initialized != NULL && !is_initialized();
}

EXPORT void pthread_exit(void *result) {
    while (python_has_ended()) pause();
    void (*next)(void *) = (void (*)(void *))dlsym(RTLD_NEXT, "pthread_exit");
    next(result);
    abort();  // not reached
}

// For the test of it: the process lives on for a while after PyTorch has told its threads to end.
__attribute__((destructor)) static void end_slowly(void) {
    const char *milliseconds = getenv("EMULATED_CUDA_EXIT_MS");
    if (milliseconds != NULL) usleep((useconds_t)atoi(milliseconds) * 1000);
}
