// NVML, the driver's library for watching devices: as much as PyTorch asks for. The library is found as
// libnvidia-ml.so.1, too. The wheels have no header of it, so that the few types are declared here.
#include "runtime.h"

#include <stdio.h>
#include <unistd.h>

enum { NVML_SUCCESS = 0, NVML_ERROR_INVALID_ARGUMENT = 2, NVML_ERROR_NOT_SUPPORTED = 3, NVML_ERROR_INSUFFICIENT_SIZE = 7 };

// A device's handle is its number, moved away from NULL.
typedef void *nvml_device;

EXPORT int nvmlInit_v2(void) { return NVML_SUCCESS; }
EXPORT int nvmlInit(void) { return NVML_SUCCESS; }
EXPORT int nvmlShutdown(void) { return NVML_SUCCESS; }

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)settings()->devices;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvml_device *device) {
    *device = (nvml_device)(uintptr_t)(index + 1);
    return is_device((int)index) ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

// As cudaDeviceGetPCIBusId writes it, or with more digits in front.
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, nvml_device *device) {
    unsigned domain, number;
    if (sscanf(bus, "%x:%x:", &domain, &number) != 2 || number == 0) return NVML_ERROR_INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(number - 1, device);
}

// As cudaGetDeviceProperties tells it: its first byte is the device's number, from 1 on.
EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, nvml_device *device) {
    unsigned number;
    if (sscanf(uuid, "GPU-%2x", &number) != 1 || number == 0) return NVML_ERROR_INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(number - 1, device);
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { return (int)cudaDriverGetVersion(version); }

EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NVML_ERROR_NOT_SUPPORTED; }
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NVML_ERROR_NOT_SUPPORTED; }

// The device is in no fabric of several machines.
struct fabric_info {
    unsigned version;
    unsigned char cluster[16];
    int status;
    unsigned clique;
    unsigned char state;
};
EXPORT int nvmlDeviceGetGpuFabricInfoV(nvml_device device, struct fabric_info *info) {
    (void)device;
    info->state = 0;  // not supported
    return NVML_SUCCESS;
}

// ---- processes on a device: this one, by the number that it has or, as in a container, by another

struct process {
    unsigned pid;
    unsigned long long bytes;
};
struct process_3 {
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
};

static unsigned own_number(void) { return (unsigned)getpid() + (settings()->in_container ? 1u << 24 : 0); }

static unsigned long long bytes_with_context(nvml_device device) {
    return used_bytes((int)(uintptr_t)device - 1) + settings()->context_bytes;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses(nvml_device device, unsigned *count, struct process *processes) {
    unsigned room = *count;
    *count = 1;
    if (room == 0 || processes == NULL) return NVML_ERROR_INSUFFICIENT_SIZE;
    processes[0] = (struct process){.pid = own_number(), .bytes = bytes_with_context(device)};
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(nvml_device device, unsigned *count, struct process_3 *processes) {
    unsigned room = *count;
    *count = 1;
    if (room == 0 || processes == NULL) return NVML_ERROR_INSUFFICIENT_SIZE;
    processes[0] = (struct process_3){.pid = own_number(), .bytes = bytes_with_context(device)};
    return NVML_SUCCESS;
}
