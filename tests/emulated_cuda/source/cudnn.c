// cuDNN: what must say something: descriptors, sizes, and the one way that it offers to compute anything. The calls that
// compute are generated. Workspaces are empty, reserves have roughly the size of what cuDNN keeps.
#include "runtime.h"

#include <cudnn.h>
#include <stdlib.h>
#include <string.h>

EXPORT cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    *handle = (cudnnHandle_t)new_handle();
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
    (void)handle;
    *stream = NULL;
    return CUDNN_STATUS_SUCCESS;
}

// ---- graphs of operations: convolutions. One engine, which needs no workspace and has no notes.

EXPORT cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor) {
    (void)type;
    *descriptor = new_handle();
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                              cudnnBackendAttributeType_t type, int64_t wanted, int64_t *found,
                                              void *values) {
    (void)descriptor;
    int64_t count = 0;
    if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS || name == CUDNN_ATTR_ENGINECFG_ENGINE) {
        count = 1;  // the caller brings the descriptors, and asks with none how many to bring
    } else if (type == CUDNN_TYPE_INT64) {
        count = 1;
        if (values != NULL && wanted > 0) *(int64_t *)values = 0;
    } else if (type == CUDNN_TYPE_INT32) {
        count = 1;
        if (values != NULL && wanted > 0) *(int32_t *)values = 0;
    }
    if (found != NULL) *found = count;
    return CUDNN_STATUS_SUCCESS;
}

// ---- tensors, which are asked for their sizes again

enum { MAX_DIMENSIONS = 8 };
struct cudnnTensorStruct {
    cudnnDataType_t type;
    int dimensions, sizes[MAX_DIMENSIONS], strides[MAX_DIMENSIONS];
};

EXPORT cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t *tensor) {
    *tensor = calloc(1, sizeof **tensor);
    return *tensor != NULL ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

EXPORT cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t tensor) {
    free(tensor);
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnSetTensorNdDescriptor(cudnnTensorDescriptor_t tensor, cudnnDataType_t type, int dimensions,
                                                const int sizes[], const int strides[]) {
    if (dimensions > MAX_DIMENSIONS) return CUDNN_STATUS_NOT_SUPPORTED;
    tensor->type = type;
    tensor->dimensions = dimensions;
    memcpy(tensor->sizes, sizes, sizeof(int) * (size_t)dimensions);
    memcpy(tensor->strides, strides, sizeof(int) * (size_t)dimensions);
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnGetTensorNdDescriptor(cudnnTensorDescriptor_t tensor, int wanted, cudnnDataType_t *type,
                                                int *dimensions, int sizes[], int strides[]) {
    int count = tensor->dimensions < wanted ? tensor->dimensions : wanted;
    *type = tensor->type;
    *dimensions = tensor->dimensions;
    memcpy(sizes, tensor->sizes, sizeof(int) * (size_t)count);
    memcpy(strides, tensor->strides, sizeof(int) * (size_t)count);
    return CUDNN_STATUS_SUCCESS;
}

// ---- batch normalisation

static cudnnStatus_t no_bytes(size_t *bytes) {
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations, cudnnTensorDescriptor_t x,
    cudnnTensorDescriptor_t z, cudnnTensorDescriptor_t y, cudnnTensorDescriptor_t scale,
    cudnnActivationDescriptor_t activation, size_t *bytes) {
    (void)handle, (void)mode, (void)operations, (void)x, (void)z, (void)y, (void)scale, (void)activation;
    return no_bytes(bytes);
}

EXPORT cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations, cudnnTensorDescriptor_t x,
    cudnnTensorDescriptor_t y, cudnnTensorDescriptor_t dy, cudnnTensorDescriptor_t dz, cudnnTensorDescriptor_t dx,
    cudnnTensorDescriptor_t scale, cudnnActivationDescriptor_t activation, size_t *bytes) {
    (void)handle, (void)mode, (void)operations, (void)x, (void)y, (void)dy, (void)dz, (void)dx, (void)scale;
    (void)activation;
    return no_bytes(bytes);
}

EXPORT cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(cudnnHandle_t handle, cudnnBatchNormMode_t mode,
                                                                          cudnnBatchNormOps_t operations,
                                                                          cudnnActivationDescriptor_t activation,
                                                                          cudnnTensorDescriptor_t x, size_t *bytes) {
    (void)handle, (void)mode, (void)operations, (void)activation, (void)x;
    return no_bytes(bytes);
}
