// Kernels as an extension of somebody's has them: they take tensors from Python and run past PyTorch's dispatcher.
// Without <torch/extension.h>, whose templates take half a minute to compile.
#include <ATen/core/TensorBody.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>

static float* of(PyObject* tensor, int64_t* count) {
    const at::Tensor& unpacked = THPVariable_Unpack(tensor);
    *count = unpacked.numel();
    return unpacked.mutable_data_ptr<float>();
}

// squash(x, out): out = tanh(x)
static PyObject* squash(PyObject*, PyObject* args) {
    HANDLE_TH_ERRORS
    PyObject *x, *out;
    if (!PyArg_ParseTuple(args, "OO", &x, &out)) return nullptr;
    int64_t count;
    const float* from = of(x, &count);
    float* to = of(out, &count);
    for (int64_t i = 0; i < count; i++) to[i] = std::tanh(from[i]);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

// halve(x): x /= 2, which nothing tells of
static PyObject* halve(PyObject*, PyObject* x) {
    HANDLE_TH_ERRORS
    int64_t count;
    float* at = of(x, &count);
    for (int64_t i = 0; i < count; i++) at[i] *= 0.5f;
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

static PyMethodDef methods[] = {
    {"squash", squash, METH_VARARGS, nullptr}, {"halve", halve, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tightfit_test_kernels", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_tightfit_test_kernels() { return PyModule_Create(&definition); }
