// A second device whose operators run on the CPU, and whose tensors do not mix with the CPU's.
//
// It has the type MPS, which a libtorch for Linux can name and has no kernels for. A boxed fallback
// counts each operator and runs it on the CPU. A launch on a GPU is an operator that is counted
// here; a view is not counted. Copies between the devices, and operators whose result the CPU has
// to know, are what would make the CPU wait for a GPU.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr auto TYPE = c10::DeviceType::MPS;
const c10::Device DEVICE(TYPE, 0);

// What was done since the last reset.
struct Counts {
  std::mutex mutex;
  std::map<std::string, int64_t> operators;
  std::map<std::string, int64_t> waits;
  int64_t sent = 0;
};

Counts &counts() {
  static Counts *counts = new Counts;
  return *counts;
}

// Whether an operator of the device is under way on this thread: its copies are not the program's.
thread_local int depth = 0;

struct Within {
  Within() { ++depth; }
  ~Within() { --depth; }
};

void launched(const std::string &name) {
  if (depth > 0) return;
  std::lock_guard<std::mutex> lock(counts().mutex);
  ++counts().operators[name];
}

void waited(const std::string &name) {
  if (depth > 0) return;
  std::lock_guard<std::mutex> lock(counts().mutex);
  ++counts().waits[name];
}

void sent() {
  if (depth > 0) return;
  std::lock_guard<std::mutex> lock(counts().mutex);
  ++counts().sent;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void *data = nullptr;
    if (size > 0 && posix_memalign(&data, 64, size) != 0) TORCH_CHECK(false, "no memory");
    return {data, data, &free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void *to, const void *from, size_t size) const override { memcpy(to, from, size); }
};

Memory &memory() {
  static Memory *memory = new Memory;
  return *memory;
}

// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor &x) {
  if (!x.defined() || x.is_cpu()) return x;
  auto options = at::TensorOptions().dtype(x.dtype()).device(at::kCPU);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), options);
}

at::Tensor on_device(const at::Tensor &x) {
  if (!x.defined()) return x;
  at::Tensor result = at::empty_strided(x.sizes(), x.strides(), x.options().device(DEVICE));
  on_cpu(result).copy_(x);
  return result;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::MPS);
  return at::detail::empty_generic(size, &memory(), keys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::MPS);
  return at::detail::empty_strided_generic(size, stride, &memory(), keys, c10::dtype_or_default(type));
}

at::Tensor &copy_(at::Tensor &to, const at::Tensor &from, bool non_blocking) {
  if (to.is_cpu()) {
    waited("copy to the CPU");
  } else if (from.is_cpu()) {
    sent();
    // PyTorch waits for the copy to a GPU unless it is told not to.
    if (!non_blocking) waited("copy to the device");
  } else {
    launched("copy_");
  }
  Within within;
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool non_blocking) {
  at::Tensor target = to;
  return copy_(target, from, non_blocking);
}

const at::Tensor &resize_(const at::Tensor &x, at::IntArrayRef size,
                          std::optional<at::MemoryFormat> format) {
  auto *impl = x.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Contiguous) impl->empty_tensor_restride(*format);
  auto &storage = *impl->unsafe_storage().unsafeGetStorageImpl();
  const size_t wanted = (x.storage_offset() + x.numel()) * x.dtype().itemsize();
  if (wanted > storage.nbytes()) {
    c10::DataPtr data = memory().allocate(wanted);
    if (storage.nbytes() > 0) memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(wanted);
  }
  return x;
}

at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  at::Tensor target = to;
  return copy_(target, from, false);
}

at::Scalar item(const at::Tensor &x) {
  waited("item");
  Within within;
  return on_cpu(x).item();
}

at::Tensor as_strided(const at::Tensor &x, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(x, size, stride, offset);
}

at::Tensor view(const at::Tensor &x, at::IntArrayRef size) { return at::native::view(x, size); }

at::Tensor reshape_alias(const at::Tensor &x, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(x, size, stride);
}

at::Tensor unfold(const at::Tensor &x, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(x, dim, size, step);
}

// A GPU accepts a tensor of the CPU without dimensions where elements are combined, and nowhere else.
bool combines_elements(const std::string &name) {
  static const std::set<std::string> names{
      "aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::div",
      "aten::div_", "aten::eq",  "aten::ne",  "aten::lt",   "aten::le",  "aten::gt",   "aten::ge",
      "aten::pow", "aten::where", "aten::maximum", "aten::minimum", "aten::remainder"};
  return names.count(name) > 0;
}

void same_device(const std::string &name, const at::Tensor &x) {
  const bool fits = !x.defined() || !x.is_cpu() || (x.dim() == 0 && combines_elements(name));
  TORCH_CHECK(fits, name, ": expected all tensors on one device, found one on the CPU");
}

at::Tensor convolution(const at::Tensor &input, const at::Tensor &weight,
                       const std::optional<at::Tensor> &bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  for (const auto &x : {input, weight, bias.value_or(at::Tensor())}) same_device("convolution", x);
  launched("convolution");
  Within within;
  const auto on_cpu_bias = bias ? std::optional(on_cpu(*bias)) : std::nullopt;
  return on_device(at::convolution(on_cpu(input), on_cpu(weight), on_cpu_bias, stride, padding,
                                   dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor &gradient, const at::Tensor &input, const at::Tensor &weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  for (const auto &x : {gradient, input, weight}) same_device("convolution_backward", x);
  launched("convolution_backward");
  Within within;
  const std::vector<int64_t> bias{gradient.size(1)};
  auto [x, w, b] = at::convolution_backward(on_cpu(gradient), on_cpu(input), on_cpu(weight),
                                            at::IntArrayRef(bias), stride, padding, dilation,
                                            transposed, output_padding, groups, wanted);
  return {on_device(x), on_device(w), on_device(b)};
}

at::Tensor attention(const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,
                     const std::optional<at::Tensor> &mask, double dropout, bool causal,
                     std::optional<double> scale, bool grouped) {
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, mask, dropout, causal,
                                                            std::nullopt, scale, grouped));
}

// Operators whose result has a shape, or is a value, that the CPU has to know.
bool waits(const std::string &name) {
  static const std::set<std::string> names{"aten::nonzero",     "aten::masked_select", "aten::equal",
                                           "aten::_unique",     "aten::_unique2",      "aten::unique_dim",
                                           "aten::unique_consecutive"};
  return names.count(name) > 0;
}

bool is_index(const std::string &name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
}

// A GPU accepts indices of the CPU and waits for their copy, and it counts a mask.
void look_at_index(const at::Tensor &x) {
  if (!x.defined()) return;
  if (x.is_cpu()) {
    sent();
    waited("index on the CPU");
  }
  if (x.scalar_type() == at::kBool) waited("index with a mask");
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  const std::string &name = op.schema().name();
  if (depth == 0) {
    const size_t count = op.schema().arguments().size();
    for (size_t i = stack->size() - count; i < stack->size(); ++i) {
      const c10::IValue &value = (*stack)[i];
      if (value.isTensor()) {
        same_device(name, value.toTensor());
      } else if (value.isTensorList() && !is_index(name)) {
        for (const at::Tensor &x : value.toTensorVector()) same_device(name, x);
      } else if (value.isTensorList()) {
        for (const at::Tensor &x : value.toTensorVector()) look_at_index(x);
      } else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor> &x : value.toOptionalTensorVector())
          if (x) look_at_index(*x);
      }
    }
    launched(name.substr(name.find("::") + 2));
    if (waits(name)) waited(name.substr(name.find("::") + 2));
  }
  Within within;
  at::native::cpu_fallback(op, stack);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void *, const c10::Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
  bool queryStream(const c10::Stream &) const override { return true; }
  void synchronizeStream(const c10::Stream &) const override { waited("synchronize"); }
  void synchronizeEvent(void *) const override { waited("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { waited("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr &, const c10::Stream &) const override {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
};

}  // namespace

namespace at {

// libtorch refuses a process that has both this device and CUDA: the device is there from
// `accelerator_install` on, so that a program that links it can use a GPU.
static bool is_installed = false;

// libtorch looks for the hooks by this name. Without them there is no seed for the device, and
// backward finds no device.
struct MPSHooks final : MPSHooksInterface {
  // Releases of libtorch differ in whether they pass anything.
  template <class... Args>
  explicit MPSHooks(Args...) {}
  void init() const override {}
  bool isBuilt() const override { return is_installed; }
  bool isAvailable() const override { return is_installed; }
  bool hasMPS() const override { return is_installed; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  // The same numbers as on the CPU.
  const Generator &getDefaultGenerator(DeviceIndex) const override {
    return globalContext().defaultGenerator(Device(kCPU));
  }
  void deviceSynchronize() const override { waited("synchronize"); }
};

REGISTER_MPS_HOOKS(MPSHooks);

}  // namespace at

extern "C" {

// Makes the device. Called once, before anything names it.
void accelerator_install() {
  at::is_installed = true;
  c10::SetAllocator(TYPE, &memory());
  static c10::impl::DeviceGuardImplRegistrar guard(TYPE, new Guard);
  static torch::Library rest(torch::Library::IMPL, "_", c10::DispatchKey::MPS, __FILE__, __LINE__);
  rest.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  static torch::Library own(torch::Library::IMPL, "aten", c10::DispatchKey::MPS, __FILE__, __LINE__);
  own.impl("empty.memory_format", &empty);
  own.impl("empty_strided", &empty_strided);
  own.impl("copy_", &copy_);
  own.impl("_copy_from", &copy_from);
  own.impl("_copy_from_and_resize", &copy_from_and_resize);
  own.impl("resize_", &resize_);
  own.impl("_local_scalar_dense", &item);
  own.impl("as_strided", &as_strided);
  own.impl("view", &view);
  own.impl("_reshape_alias", &reshape_alias);
  own.impl("unfold", &unfold);
  own.impl("convolution_overrideable", &convolution);
  own.impl("convolution_backward_overrideable", &convolution_backward);
  own.impl("scaled_dot_product_attention", &attention);
  // One kernel on a GPU, although libtorch has a composition for devices without it.
  for (const char *name : {"native_layer_norm", "native_layer_norm_backward", "native_group_norm",
                           "native_group_norm_backward", "silu_backward"})
    own.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  static torch::Library autograd(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradMPS,
                                 __FILE__, __LINE__);
  autograd.impl("scaled_dot_product_attention", &attention);
}

void accelerator_reset() {
  std::lock_guard<std::mutex> lock(counts().mutex);
  counts().operators.clear();
  counts().waits.clear();
  counts().sent = 0;
}

// Calls `each` with every name and count. A kind of 0 is an operator, 1 a wait, 2 copies to the
// device.
void accelerator_counts(void (*each)(void *state, int kind, const char *name, int64_t count),
                        void *state) {
  std::lock_guard<std::mutex> lock(counts().mutex);
  for (const auto &[name, count] : counts().operators) each(state, 0, name.c_str(), count);
  for (const auto &[name, count] : counts().waits) each(state, 1, name.c_str(), count);
  each(state, 2, "", counts().sent);
}

}
