// The switches: environment variables, read once.
#include "runtime.h"

#include <pthread.h>
#include <stdlib.h>

static struct settings values;

static double number(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text != NULL && *text != '\0' ? atof(text) : otherwise;
}

static void read_environment(void) {
    int devices = (int)number("EMULATED_CUDA_DEVICES", 1);
    values.devices = devices < 0 ? 0 : devices > MAX_DEVICES ? MAX_DEVICES : devices;
    values.device_bytes = (size_t)(number("EMULATED_CUDA_GIB", 80) * (1 << 30));
    values.context_bytes = (size_t)(number("EMULATED_CUDA_CONTEXT_MIB", 520) * (1 << 20));
    values.real_memory = number("EMULATED_CUDA_REAL_MEMORY", 0) != 0;
    values.show_launches = number("EMULATED_CUDA_SHOW_LAUNCHES", 0) != 0;
    values.sparse_copies = number("EMULATED_CUDA_SPARSE_COPIES", 0) != 0;
    values.in_container = number("EMULATED_CUDA_IN_CONTAINER", 0) != 0;
    const char *kernel = getenv("EMULATED_CUDA_BROKEN_BY");
    values.broken_by = kernel != NULL && *kernel != '\0' ? kernel : NULL;
}

const struct settings *settings(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, read_environment);
    return &values;
}
