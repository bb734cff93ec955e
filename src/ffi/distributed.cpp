// torch.distributed's C++ half (c10d): the key-value store between processes, and collective
// operations on tensors by gloo or NCCL. No exception leaves this file: a call returns null, or its
// message in memory that the caller frees.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "caught.h"

namespace {

using std::chrono::milliseconds;

struct Store {
  c10::intrusive_ptr<c10d::Store> store;
};

struct Group {
  c10::intrusive_ptr<c10d::Backend> backend;
};

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using OptionsPtr = c10::intrusive_ptr<c10d::Backend::Options>;

// ProcessGroupNCCL.hpp needs the headers of CUDA and of NCCL, and its library is loaded, never
// linked. Its two constructors are found by name; what they fill is larger than either object was in
// any release, and everything else goes through the base classes.
constexpr size_t NCCL_ROOM = 64 * 1024;
constexpr auto NCCL_OPTIONS = "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb";
constexpr auto NCCL_GROUP =
    "_ZN4c10d16ProcessGroupNCCLC1EN3c1013intrusive_ptrINS_5StoreENS1_6detail34intrusive_target_"
    "default_null_typeIS3_EEEEiiNS2_INS0_7OptionsENS5_IS8_EEEE";

void *nccl_symbol(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  TORCH_CHECK(found != nullptr, "this libtorch has no NCCL, or libtorch_cuda is not loaded");
  return found;
}

c10::intrusive_ptr<c10d::Backend> nccl_backend(StorePtr store, int rank, int size, milliseconds timeout) {
  auto make_options = reinterpret_cast<void (*)(void *, bool)>(nccl_symbol(NCCL_OPTIONS));
  auto make_group =
      reinterpret_cast<void (*)(void *, StorePtr, int, int, OptionsPtr)>(nccl_symbol(NCCL_GROUP));
  // Without it a timeout ends the process in place of the call.
  setenv("TORCH_NCCL_BLOCKING_WAIT", "1", 0);
  void *room = ::operator new(NCCL_ROOM);
  memset(room, 0, NCCL_ROOM);
  make_options(room, false);
  auto options = OptionsPtr::unsafe_steal_from_new(static_cast<c10d::Backend::Options *>(room));
  options->timeout = timeout;
  room = ::operator new(NCCL_ROOM);
  memset(room, 0, NCCL_ROOM);
  make_group(room, std::move(store), rank, size, std::move(options));
  return c10::intrusive_ptr<c10d::Backend>::unsafe_steal_from_new(
      static_cast<c10d::Backend *>(room));
}

c10::intrusive_ptr<c10d::Backend> gloo_backend(StorePtr store, int rank, int size,
                                               milliseconds timeout, const char *interface,
                                               const char *hostname) {
  using c10d::ProcessGroupGloo;
  auto options = ProcessGroupGloo::Options::create(timeout);
  if (interface != nullptr) {
    options->devices.push_back(ProcessGroupGloo::createDeviceForInterface(interface));
  } else if (hostname != nullptr) {
    options->devices.push_back(ProcessGroupGloo::createDeviceForHostname(hostname));
  } else {
    options->devices.push_back(ProcessGroupGloo::createDefaultDevice());
  }
  return c10::make_intrusive<ProcessGroupGloo>(store, rank, size, std::move(options));
}

}  // namespace

extern "C" {

// Connects to the store at `host`:`port`, and serves it first if `serves`. Keys get a prefix.
char *convpass_store_open(const char *host, uint16_t port, bool serves, int64_t timeout_ms,
                          const char *prefix, Store **out) {
  return caught([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serves;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
    *out = new Store{c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store))};
  });
}

// Opens a connection of its own to the same store, for another thread.
char *convpass_store_clone(const Store *store, Store **out) {
  return caught([&] { *out = new Store{store->store->clone()}; });
}

char *convpass_store_set(Store *store, const char *key, const uint8_t *value, size_t length) {
  return caught([&] { store->store->set(key, std::vector<uint8_t>(value, value + length)); });
}

// The value in memory that the caller frees; null if there is none.
char *convpass_store_get(Store *store, const char *key, uint8_t **value, size_t *length) {
  return caught([&] {
    *value = nullptr;
    if (!store->store->check({key})) return;
    const std::vector<uint8_t> found = store->store->get(key);
    *value = static_cast<uint8_t *>(malloc(found.size() + 1));
    TORCH_CHECK(*value != nullptr, "no memory for a value of the store");
    memcpy(*value, found.data(), found.size());
    *length = found.size();
  });
}

// Waits until the store has all `keys`.
char *convpass_store_wait(Store *store, const char *const *keys, size_t count,
                          int64_t timeout_ms) {
  return caught([&] {
    store->store->wait(std::vector<std::string>(keys, keys + count), milliseconds(timeout_ms));
  });
}

void convpass_store_free(Store *store) {
  free(caught([&] { delete store; }));
}

// Connects `size` processes, all of which make this call. gloo is reached by the named network
// interface, else by the address of `hostname`, else by that of this machine's name.
char *convpass_group_open(const Store *store, int rank, int size, int64_t timeout_ms,
                          bool with_nccl, const char *interface, const char *hostname,
                          Group **out) {
  return caught([&] {
    const milliseconds timeout(timeout_ms);
    *out = new Group{with_nccl
                         ? nccl_backend(store->store, rank, size, timeout)
                         : gloo_backend(store->store, rank, size, timeout, interface, hostname)};
  });
}

// Replaces `tensor` by its sum over all processes.
char *convpass_group_all_reduce(Group *group, const at::Tensor *tensor, int64_t timeout_ms) {
  return caught([&] {
    std::vector<at::Tensor> tensors{tensor->detach()};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d::ReduceOp::SUM;
    options.timeout = milliseconds(timeout_ms);
    group->backend->allreduce(tensors, options)->wait();
  });
}

// Replaces `tensor` by that of process `root`.
char *convpass_group_broadcast(Group *group, const at::Tensor *tensor, int root,
                               int64_t timeout_ms) {
  return caught([&] {
    std::vector<at::Tensor> tensors{tensor->detach()};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.rootTensor = 0;
    options.timeout = milliseconds(timeout_ms);
    group->backend->broadcast(tensors, options)->wait();
  });
}

void convpass_group_free(Group *group) {
  free(caught([&] { delete group; }));
}

}
