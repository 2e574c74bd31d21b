// cuBLAS: what must say something; the calls that compute are generated, and count as library calls.
#include "runtime.h"

#include <string.h>

// cublas_api.h wants the half-precision types, whose own headers want a C++ library that the wheels do not bring. Nothing
// here has such arguments.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#include <cublasLt.h>
#include <cublas_api.h>

static cublasStatus_t some_handle(void *handle) {
    *(void **)handle = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

static _Thread_local cublasMath_t math_mode;

EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { return some_handle(handle); }

EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    (void)handle;
    *mode = math_mode;
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    (void)handle;
    math_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    (void)handle;
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

// Of CUDA 13.0; PyTorch chooses by it what to ask for.
EXPORT size_t cublasLtGetVersion(void) { return 130000; }

EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return some_handle(handle); }

EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *descriptor, cublasComputeType_t compute, cudaDataType_t scale) {
    (void)compute, (void)scale;
    return some_handle(descriptor);
}

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t leading) {
    (void)type, (void)rows, (void)columns, (void)leading;
    return some_handle(layout);
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) { return some_handle(preference); }

// One algorithm, which needs no workspace.
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t *results, int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    memset(results, 0, sizeof *results * (size_t)wanted);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
