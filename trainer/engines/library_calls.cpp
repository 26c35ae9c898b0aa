// Linked into each compiled library: a call of it in one function, so that Python gives up the GIL once a call.
//
// AOTInductor's own functions take handles that each run consumes, and hand out tensors that somebody has to delete.
// Called from Python one by one, with the GIL held or taken back each time, they made two threads slower than one.
//
// An `AtenTensorHandle` points to an `at::Tensor`, and an `at::Tensor` is one pointer to its `TensorImpl`. So a cell that
// holds `torch.Tensor._cdata` can be read as a tensor that owns nothing.
#include <torch/csrc/inductor/aoti_runtime/interface.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>

// As `Frame` in library_calls.py has it.
struct Frame {
  AOTInductorModelHandle model;
  int64_t num_inputs;
  int64_t num_outputs;
  void** given; // cells of the inputs
  void** expected; // cells of tensors without memory, of the dtypes, shapes and strides that were compiled for
  void** results; // cells of the tensors that outputs are copied to
  AtenTensorHandle* inputs; // room for a run's handles
  AtenTensorHandle* outputs;
};

namespace {

AtenTensorHandle borrowed(void** cell) {
  return reinterpret_cast<AtenTensorHandle>(cell);
}

// Whether a tensor has the dtype, shape and strides of another: the compiled code looks at its address and nothing else.
bool fits(AtenTensorHandle tensor, AtenTensorHandle like) {
  int32_t dtype = 0, dtype_like = 0;
  int64_t dims = 0, dims_like = 0;
  int64_t *sizes = nullptr, *sizes_like = nullptr, *strides = nullptr, *strides_like = nullptr;
  if (aoti_torch_get_dtype(tensor, &dtype) || aoti_torch_get_dtype(like, &dtype_like) || dtype != dtype_like ||
      aoti_torch_get_dim(tensor, &dims) || aoti_torch_get_dim(like, &dims_like) || dims != dims_like ||
      aoti_torch_get_sizes(tensor, &sizes) || aoti_torch_get_sizes(like, &sizes_like) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_strides(like, &strides_like)) {
    return false;
  }
  for (int64_t i = 0; i < dims; i++) {
    if (sizes[i] != sizes_like[i] || (sizes[i] > 1 && strides[i] != strides_like[i])) {
      return false;
    }
  }
  return true;
}

bool on_cpu(AtenTensorHandle tensor) {
  int32_t device = -1;
  return !aoti_torch_get_device_type(tensor, &device) && device == aoti_torch_device_type_cpu();
}

bool copy(AtenTensorHandle from, AtenTensorHandle to) {
  int32_t dtype = 0;
  int64_t numel = 0;
  void *source = nullptr, *target = nullptr;
  if (!fits(from, to) || aoti_torch_get_dtype(to, &dtype) || aoti_torch_get_numel(to, &numel) ||
      aoti_torch_get_data_ptr(from, &source) || aoti_torch_get_data_ptr(to, &target)) {
    return false;
  }
  if (numel > 0) {
    std::memcpy(target, source, numel * aoti_torch_dtype_element_size(dtype));
  }
  return true;
}

// 0, and the outputs' handles; -1 when the run failed, and none.
int64_t run(Frame* frame) {
  for (int64_t i = 0; i < frame->num_inputs; i++) {
    if (aoti_torch_new_tensor_handle(borrowed(&frame->given[i]), &frame->inputs[i])) {
      while (i-- > 0) {
        aoti_torch_delete_tensor_object(frame->inputs[i]);
      }
      return -1;
    }
  }
  // The run deletes the inputs' handles, also when it fails.
  return AOTInductorModelRun(frame->model, frame->inputs, frame->outputs) ? -1 : 0;
}

} // namespace

extern "C" {

void library_release(Frame* frame);

// 0; or i when input i, counted from 1, does not fit.
int64_t library_check(const Frame* frame) {
  for (int64_t i = 0; i < frame->num_inputs; i++) {
    if (!on_cpu(borrowed(&frame->given[i])) || !fits(borrowed(&frame->given[i]), borrowed(&frame->expected[i]))) {
      return i + 1;
    }
  }
  return 0;
}

// A call with inputs that are not looked at, for who has had them checked. 0 or a status as of `library_call`. Puts where
// each output's elements are into `data`; they last until the frame's next run, or `library_release`.
int64_t library_run(Frame* frame, void** data) {
  library_release(frame);
  int64_t status = run(frame);
  for (int64_t i = 0; status == 0 && i < frame->num_outputs; i++) {
    if (!fits(frame->outputs[i], borrowed(&frame->results[i])) ||
        aoti_torch_get_data_ptr(frame->outputs[i], &data[i])) {
      status = -2;
    }
  }
  return status;
}

// Deletes what the last run has left.
void library_release(Frame* frame) {
  for (int64_t i = 0; i < frame->num_outputs; i++) {
    bool deleted = false; // a graph that returns one tensor twice may have one handle for both
    for (int64_t j = 0; j < i; j++) {
      deleted = deleted || frame->outputs[j] == frame->outputs[i];
    }
    if (!deleted && frame->outputs[i] != nullptr) {
      aoti_torch_delete_tensor_object(frame->outputs[i]);
    }
  }
  for (int64_t i = 0; i < frame->num_outputs; i++) {
    frame->outputs[i] = nullptr;
  }
}

// 0; or i when input i, counted from 1, does not fit; -1 when the run failed; -2 when an output is not what the graph's
// was.
int64_t library_call(Frame* frame) {
  int64_t status = library_check(frame);
  if (status == 0) {
    status = run(frame);
  }
  if (status == 0) {
    for (int64_t i = 0; i < frame->num_outputs; i++) {
      status = copy(frame->outputs[i], borrowed(&frame->results[i])) ? status : -2;
    }
    library_release(frame);
  }
  return status;
}

} // extern "C"
