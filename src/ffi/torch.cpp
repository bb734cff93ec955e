// What libtorch has in C++ alone: a node of the autograd graph, a loop on libtorch's own threads,
// autocast's state, and operators that tch does not bind. No exception leaves this file: a call returns null, or its message in
// memory that the caller frees.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "caught.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Gradients into `gradients`, one for each input that is wanted, for this side to delete. Non-null
// is a message, for this side to free.
using Backward = char *(*)(void *state, at::Tensor *const *saved, size_t num_saved,
                           at::Tensor *gradient, const bool *wanted, at::Tensor **gradients,
                           size_t num_inputs);

// An operation of the Rust side, which it owns until the graph lets go of it.
struct Operation : torch::CustomClassHolder {
  void *state;
  Backward backward;
  void (*drop)(void *);

  Operation(void *state, Backward backward, void (*drop)(void *))
      : state(state), backward(backward), drop(drop) {}
  ~Operation() override { drop(state); }
};

struct Forward {
  at::Tensor output;
  variable_list saved;
  c10::intrusive_ptr<Operation> operation;
};

struct Function : torch::autograd::Function<Function> {
  static at::Tensor forward(AutogradContext *ctx, at::TensorList inputs,
                            const Forward &forward) {
    ctx->save_for_backward(forward.saved);
    ctx->saved_data["operation"] = c10::IValue::make_capsule(forward.operation);
    ctx->saved_data["num_inputs"] = static_cast<int64_t>(inputs.size());
    return forward.output;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "this operation has no second derivative");
    variable_list saved = ctx->get_saved_variables();
    std::vector<at::Tensor *> pointers;
    for (at::Tensor &tensor : saved) pointers.push_back(&tensor);
    auto capsule = ctx->saved_data["operation"].toCapsule();
    auto *operation = static_cast<Operation *>(capsule.get());

    const size_t num_inputs = ctx->saved_data["num_inputs"].toInt();
    auto wanted = std::make_unique<bool[]>(num_inputs);
    for (size_t i = 0; i < num_inputs; ++i) wanted[i] = ctx->needs_input_grad(i);
    std::vector<at::Tensor *> results(num_inputs, nullptr);
    at::Tensor gradient = gradients[0];
    char *message = operation->backward(operation->state, pointers.data(), pointers.size(),
                                        &gradient, wanted.get(), results.data(), num_inputs);
    variable_list owned(num_inputs + 1);  // And nothing for `Forward`.
    for (size_t i = 0; i < num_inputs; ++i) {
      if (results[i] == nullptr) continue;
      owned[i] = std::move(*results[i]);
      delete results[i];
    }
    if (message != nullptr) {
      std::string text(message);
      free(message);
      TORCH_CHECK(false, text);
    }
    return owned;
  }
};

}  // namespace

extern "C" {

// Makes `output` the result of an operation on `inputs`. `state` is the node's from here on,
// whatever comes of it.
char *convpass_node(at::Tensor *output, at::Tensor *const *inputs, size_t num_inputs,
                    at::Tensor *const *saved, size_t num_saved, void *state, Backward backward,
                    void (*drop)(void *)) {
  auto operation = c10::make_intrusive<Operation>(state, backward, drop);
  return caught([&] {
    variable_list in, kept;
    for (size_t i = 0; i < num_inputs; ++i) in.push_back(*inputs[i]);
    for (size_t i = 0; i < num_saved; ++i) kept.push_back(*saved[i]);
    *output = Function::apply(at::TensorList(in), Forward{*output, std::move(kept), std::move(operation)});
  });
}

// Takes the gradient of a leaf away, so that the next one needs no sum.
char *convpass_clear_gradient(const at::Tensor *leaf) {
  return caught([&] { leaf->mutable_grad().reset(); });
}

// Whether `a` is `b`, and nothing was written into it since it was made.
bool convpass_untouched(const at::Tensor *a, const at::Tensor *b) {
  return a->is_same(*b) && !a->is_inference() && a->_version() == 0;
}

// The types of devices by their numbers on the side of Rust.
static const at::DeviceType DEVICES[] = {at::kCPU, at::kCUDA, at::kMPS};

// Autocast's state on a type of device, of this thread.
char *convpass_autocast_get(int type, bool *enabled, int *kind, bool *cache) {
  return caught([&] {
    const auto device = DEVICES[type];
    *enabled = at::autocast::is_autocast_enabled(device);
    *kind = static_cast<int>(at::autocast::get_autocast_dtype(device));
    *cache = at::autocast::is_autocast_cache_enabled();
  });
}

// Sets it; `deeper` by +1 enters a guarded part, by -1 leaves one, the outermost with its cache.
char *convpass_autocast_set(int type, bool enabled, int kind, bool cache, int deeper) {
  return caught([&] {
    const auto device = DEVICES[type];
    if (deeper < 0 && at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    if (deeper > 0) at::autocast::increment_nesting();
    at::autocast::set_autocast_enabled(device, enabled);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(kind));
    at::autocast::set_autocast_cache_enabled(cache);
  });
}

// out = beta * x + alpha * a b, for matrices or batches of them.
char *convpass_add_product(const at::Tensor *out, const at::Tensor *x, const at::Tensor *a,
                           const at::Tensor *b, double beta, double alpha) {
  return caught([&] {
    at::Tensor result = *out;
    if (a->dim() == 3) {
      at::baddbmm_out(result, *x, *a, *b, beta, alpha);
    } else {
      at::addmm_out(result, *x, *a, *b, beta, alpha);
    }
  });
}

// The gradients of the input and of the odd, square kernel of a convolution that keeps the size.
char *convpass_convolution_backward(const at::Tensor *gradient, const at::Tensor *input,
                                    const at::Tensor *kernel, at::Tensor *of_input,
                                    at::Tensor *of_kernel) {
  return caught([&] {
    const int64_t half = kernel->size(-1) / 2;
    auto [x, weight, bias] = at::convolution_backward(
        *gradient, *input, *kernel, c10::nullopt, {1, 1}, {half, half}, {1, 1},
        /*transposed=*/false, {0, 0}, /*groups=*/1, {true, true, false});
    *of_input = x;
    *of_kernel = weight;
  });
}

// out = a + alpha * b.
char *convpass_add_scaled(const at::Tensor *out, const at::Tensor *a, const at::Tensor *b,
                          double alpha) {
  return caught([&] {
    at::Tensor result = *out;
    at::add_out(result, *a, *b, alpha);
  });
}

// A step of AdamW over all weights at once, in place. `number` holds the number of the step.
char *convpass_fused_adamw(at::Tensor *const *weights, at::Tensor *const *gradients,
                           at::Tensor *const *means, at::Tensor *const *squares, size_t count,
                           const at::Tensor *number, double lr, double beta1, double beta2,
                           double weight_decay, double eps) {
  return caught([&] {
    const auto list = [&](at::Tensor *const *tensors) {
      std::vector<at::Tensor> list;
      for (size_t i = 0; i < count; ++i) list.push_back(*tensors[i]);
      return list;
    };
    const std::vector<at::Tensor> numbers(count, *number);
    at::NoGradGuard no_grad;
    at::_fused_adamw_(list(weights), list(gradients), list(means), list(squares), {}, numbers, lr,
                      beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    // libtorch does not count this write, and what was computed from the old weights would pass
    // for that of the new ones.
    for (const auto *tensors : {weights, means, squares})
      for (size_t i = 0; i < count; ++i) tensors[i]->unsafeGetTensorImpl()->bump_version();
  });
}

// Calls `f` with each of 0..count. A TensorIterator hands them out, because `at::parallel_for` is
// a template: compiled here it would run on another OpenMP than libtorch's.
char *convpass_for_each(int64_t count, void (*f)(void *state, int64_t index), void *state) {
  return caught([&] {
    at::Tensor indices = at::arange(count, at::kLong);
    auto iterator = at::TensorIterator::nullary_op(indices);
    iterator.for_each(
        [=](char **data, const int64_t *strides, int64_t n) {
          for (int64_t i = 0; i < n; ++i)
            f(state, *reinterpret_cast<int64_t *>(data[0] + i * strides[0]));
        },
        1);
  });
}

}
