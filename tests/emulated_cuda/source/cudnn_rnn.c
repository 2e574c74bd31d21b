// cuDNN's recurrent networks: how the weights lie in their one buffer, which PyTorch checks, and the sizes of the rest.
#include "runtime.h"

#include <cudnn.h>
#include <stdlib.h>

struct cudnnRNNStruct {
    cudnnDataType_t type;
    int gates, directions, layers, input, hidden, projection;
    bool has_bias;
};

struct cudnnRNNDataStruct {
    int steps, batch;
};

static size_t element_bytes(cudnnDataType_t type) {
    switch (type) {
        case CUDNN_DATA_DOUBLE: return 8;
        case CUDNN_DATA_HALF:
        case CUDNN_DATA_BFLOAT16: return 2;
        default: return 4;
    }
}

EXPORT cudnnStatus_t cudnnCreateRNNDescriptor(cudnnRNNDescriptor_t *rnn) {
    *rnn = calloc(1, sizeof **rnn);
    return *rnn != NULL ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

EXPORT cudnnStatus_t cudnnDestroyRNNDescriptor(cudnnRNNDescriptor_t rnn) {
    free(rnn);
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnSetRNNDescriptor_v8(cudnnRNNDescriptor_t rnn, cudnnRNNAlgo_t algorithm, cudnnRNNMode_t mode,
                                              cudnnRNNBiasMode_t bias, cudnnDirectionMode_t direction,
                                              cudnnRNNInputMode_t input_mode, cudnnDataType_t type,
                                              cudnnDataType_t precision, cudnnMathType_t math, int32_t input,
                                              int32_t hidden, int32_t projection, int32_t layers,
                                              cudnnDropoutDescriptor_t dropout, uint32_t flags) {
    (void)algorithm, (void)input_mode, (void)precision, (void)math, (void)dropout, (void)flags;
    *rnn = (struct cudnnRNNStruct){
        .type = type,
        .gates = mode == CUDNN_LSTM ? 4 : mode == CUDNN_GRU ? 3 : 1,
        .directions = direction == CUDNN_BIDIRECTIONAL ? 2 : 1,
        .layers = layers,
        .input = input,
        .hidden = hidden,
        .projection = projection > 0 ? projection : hidden,
        .has_bias = bias != CUDNN_RNN_NO_BIAS,
    };
    return CUDNN_STATUS_SUCCESS;
}

// ---- the weights: for each layer and direction the input's matrix of each gate, then the recurrent ones and, with a
// projection, its matrix; behind all of them the vectors of bias, two for each gate

static size_t input_width(const struct cudnnRNNStruct *rnn, int layer) {
    return layer < rnn->directions ? (size_t)rnn->input : (size_t)rnn->projection * (size_t)rnn->directions;
}

static bool has_projection(const struct cudnnRNNStruct *rnn) { return rnn->projection != rnn->hidden; }

static size_t matrix_elements(const struct cudnnRNNStruct *rnn, int layer) {
    size_t for_each_gate = (size_t)rnn->hidden * (input_width(rnn, layer) + (size_t)rnn->projection);
    size_t projected = has_projection(rnn) ? (size_t)rnn->hidden * (size_t)rnn->projection : 0;
    return (size_t)rnn->gates * for_each_gate + projected;
}

static size_t all_matrices(const struct cudnnRNNStruct *rnn, int before) {
    size_t elements = 0;
    for (int layer = 0; layer < before; layer++) elements += matrix_elements(rnn, layer);
    return elements;
}

static size_t bias_elements(const struct cudnnRNNStruct *rnn) {
    return rnn->has_bias ? 2 * (size_t)rnn->gates * (size_t)rnn->hidden : 0;
}

EXPORT cudnnStatus_t cudnnGetRNNWeightSpaceSize(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, size_t *bytes) {
    (void)handle;
    int layers = rnn->layers * rnn->directions;
    *bytes = (all_matrices(rnn, layers) + (size_t)layers * bias_elements(rnn)) * element_bytes(rnn->type);
    return CUDNN_STATUS_SUCCESS;
}

// PyTorch asks for a matrix or for a bias, and gives no tensor for the other.
static void describe(cudnnTensorDescriptor_t tensor, cudnnDataType_t type, size_t rows, size_t columns) {
    if (tensor == NULL) return;
    int sizes[] = {1, (int)rows, (int)columns}, strides[] = {(int)(rows * columns), (int)columns, 1};
    cudnnStatus_t cudnnSetTensorNdDescriptor(cudnnTensorDescriptor_t, cudnnDataType_t, int, const int[], const int[]);
    cudnnSetTensorNdDescriptor(tensor, type, 3, sizes, strides);
}

EXPORT cudnnStatus_t cudnnGetRNNWeightParams(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, int32_t layer, size_t bytes,
                                             const void *space, int32_t part, cudnnTensorDescriptor_t matrix,
                                             void **matrix_address, cudnnTensorDescriptor_t bias, void **bias_address) {
    (void)handle, (void)bytes;
    size_t width = (size_t)rnn->hidden, inputs = input_width(rnn, layer), recurrent = (size_t)rnn->projection;
    size_t gates = (size_t)rnn->gates, number = (size_t)part, offset = all_matrices(rnn, layer);
    bool is_projection = number == 2 * gates;
    if (is_projection) {
        offset += gates * width * (inputs + recurrent);
        describe(matrix, rnn->type, recurrent, width);
    } else if (number < gates) {
        offset += number * width * inputs;
        describe(matrix, rnn->type, width, inputs);
    } else {
        offset += gates * width * inputs + (number - gates) * width * recurrent;
        describe(matrix, rnn->type, width, recurrent);
    }
    bool has_matrix = !is_projection || has_projection(rnn), has_bias = rnn->has_bias && !is_projection;
    if (matrix_address != NULL) *matrix_address = has_matrix ? (char *)space + offset * element_bytes(rnn->type) : NULL;
    size_t behind = all_matrices(rnn, rnn->layers * rnn->directions) + (size_t)layer * bias_elements(rnn) + number * width;
    describe(bias, rnn->type, width, 1);
    if (bias_address != NULL) *bias_address = has_bias ? (char *)space + behind * element_bytes(rnn->type) : NULL;
    return CUDNN_STATUS_SUCCESS;
}

// ---- the data

EXPORT cudnnStatus_t cudnnCreateRNNDataDescriptor(cudnnRNNDataDescriptor_t *data) {
    *data = calloc(1, sizeof **data);
    return *data != NULL ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

EXPORT cudnnStatus_t cudnnDestroyRNNDataDescriptor(cudnnRNNDataDescriptor_t data) {
    free(data);
    return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnSetRNNDataDescriptor(cudnnRNNDataDescriptor_t data, cudnnDataType_t type,
                                               cudnnRNNDataLayout_t layout, int steps, int batch, int width,
                                               const int lengths[], void *padding) {
    (void)type, (void)layout, (void)width, (void)lengths, (void)padding;
    *data = (struct cudnnRNNDataStruct){.steps = steps, .batch = batch};
    return CUDNN_STATUS_SUCCESS;
}

// For backward it keeps the gates and the states of each layer and step.
EXPORT cudnnStatus_t cudnnGetRNNTempSpaceSizes(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, cudnnForwardMode_t mode,
                                               cudnnRNNDataDescriptor_t data, size_t *workspace, size_t *reserve) {
    (void)handle;
    size_t values = (size_t)data->steps * (size_t)data->batch * (size_t)rnn->hidden * (size_t)(rnn->layers * rnn->directions);
    size_t bytes = values * (size_t)(rnn->gates + 2) * element_bytes(rnn->type);
    if (workspace != NULL) *workspace = bytes;
    if (reserve != NULL) *reserve = mode == CUDNN_FWD_MODE_TRAINING ? bytes : 0;
    return CUDNN_STATUS_SUCCESS;
}

// One generator's state for each thread that the GPU can run.
EXPORT cudnnStatus_t cudnnDropoutGetStatesSize(cudnnHandle_t handle, size_t *bytes) {
    (void)handle;
    *bytes = (size_t)2 << 20;
    return CUDNN_STATUS_SUCCESS;
}
