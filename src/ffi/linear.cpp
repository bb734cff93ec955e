// Linear layers on a CPU by oneDNN, and with weights and activations in int8. libtorch registers these
// operators by their names alone. No exception leaves this file: a call returns null, or its message in
// memory that the caller frees.

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "caught.h"

namespace {

using Pointwise = at::Tensor(const at::Tensor &, const at::Tensor &,
                             const std::optional<at::Tensor> &, std::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// Throws if this libtorch lacks the operator, or has it with other arguments.
const c10::TypedOperatorHandle<Pointwise> &pointwise() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                                 .typed<Pointwise>();
  return handle;
}

// A weight of `quantized::linear_dynamic`, which has its own order of the values.
struct Packed {
  c10::IValue weight;
};

// Drops warnings: that packed weights are deprecated is nothing to a user of this crate.
struct Unwarned : c10::WarningHandler {
  void process(const c10::Warning &) override {}
};

// What an operator returns for these arguments.
c10::IValue called(const char *name, std::vector<c10::IValue> arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(arguments);
  return arguments.at(0);
}

}  // namespace

extern "C" {

// Whether this libtorch can compute linear layers by oneDNN.
bool convpass_has_onednn() {
  try {
    pointwise();
    return at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn();
  } catch (...) {
    return false;
  }
}

// output = x weight^T + bias in f32. `bias` may be null.
char *convpass_onednn_linear(const at::Tensor *x, const at::Tensor *weight, const at::Tensor *bias,
                             at::Tensor *output) {
  return caught([&] {
    std::optional<at::Tensor> added;
    if (bias != nullptr) added = *bias;
    *output = pointwise().call(*x, *weight, added, "none", c10::List<std::optional<at::Scalar>>(), "");
  });
}

// Packs an int8 weight whose rows have these factors.
char *convpass_int8_pack(const at::Tensor *weight, const at::Tensor *scale, Packed **packed) {
  return caught([&] {
    Unwarned unwarned;
    c10::WarningUtils::WarningHandlerGuard guard(&unwarned);
    const auto zeros = at::zeros({weight->size(0)}, at::kLong);
    const auto rows = at::_make_per_channel_quantized_tensor(*weight, scale->to(at::kDouble), zeros, 0);
    *packed = new Packed{called("quantized::linear_prepack", {rows, c10::IValue()})};
  });
}

// output = x weight^T in f32, with x rounded to 8 bits.
char *convpass_int8_linear(const Packed *packed, const at::Tensor *x, at::Tensor *output) {
  return caught([&] {
    const bool reduce_range = false;
    *output = called("quantized::linear_dynamic", {*x, packed->weight, reduce_range}).toTensor();
  });
}

void convpass_int8_drop(Packed *packed) { delete packed; }

}
