// Counters that tests read through ctypes; see tests/emulated_cuda/counters.py.
#include "runtime.h"

struct counters counters;

void count_library_call(void) {
    counters.library_calls++;
    clock_library();
}

EXPORT long emulated_cuda_mallocs(void) { return counters.mallocs; }
EXPORT long emulated_cuda_frees(void) { return counters.frees; }
EXPORT long emulated_cuda_launches(void) { return counters.launches; }
EXPORT long emulated_cuda_syncs(void) { return counters.syncs; }
EXPORT long emulated_cuda_library_calls(void) { return counters.library_calls; }
