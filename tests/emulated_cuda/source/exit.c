// The end of a process.
//
// A thread of PyTorch's autograd (devices have them, a CPU build has none) may want Python's lock when Python has ended
// already: it frees what backward left, or ends itself. Python up to 3.13 then ends the thread with pthread_exit. That
// unwinds through destructors of C++ which must not be left so, and C++ aborts the process: "terminate called without an
// active exception". It is a race with the rest of the process's exit, and rare; nothing in it is of the emulation. Python 3.14 lets such a
// thread wait for ever instead; so does this, for all versions.
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

// For the test of it: the process lives on for a while when Python has ended.
__attribute__((destructor)) static void end_slowly(void) {
    const char *milliseconds = getenv("EMULATED_CUDA_EXIT_MS");
    if (milliseconds != NULL) usleep((useconds_t)atoi(milliseconds) * 1000);
}
