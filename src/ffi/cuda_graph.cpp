// CUDA graphs (at::cuda::CUDAGraph) of a libtorch_cuda that was loaded by name. No exception leaves
// this file: a call returns null, or its message in memory that the caller frees.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <dlfcn.h>

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "caught.h"

namespace {

using Pool = std::pair<unsigned long long, unsigned long long>;

// CUDAGraph.h needs the headers of CUDA, and its library is loaded, never linked. Its functions are
// found by their mangled names, which hold the types of their arguments: a release with another
// signature lacks the name, and nothing is called. The object has 344 bytes in libtorch 2.13.
constexpr size_t ROOM = 64 * 1024;
constexpr const char *NAMES[] = {
    "_ZN2at4cuda9CUDAGraphC1Eb",
    "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode",
    "_ZN2at4cuda9CUDAGraph11capture_endEv",
    "_ZN2at4cuda9CUDAGraph6replayEv",
    "_ZN2at4cuda9CUDAGraphD1Ev",
};
enum Name { CONSTRUCT, BEGIN, END, REPLAY, DESTROY };

// cudaStreamCaptureModeThreadLocal. Calls that a capture forbids stay allowed in other threads, which
// load the next batches and pin them.
constexpr unsigned THREAD_LOCAL = 1;

template <typename... Arguments>
void call(Name name, void *graph, Arguments... arguments) {
  void *found = dlsym(RTLD_DEFAULT, NAMES[name]);
  TORCH_CHECK(found != nullptr, "this libtorch has no ", NAMES[name]);
  reinterpret_cast<void (*)(void *, Arguments...)>(found)(graph, arguments...);
}

// A graph, and the stream that it is recorded on.
struct Graph {
  c10::impl::VirtualGuardImpl gpus{c10::DeviceType::CUDA};
  c10::Device gpu;
  c10::Stream side;
  // What was current before `side` and its GPU.
  c10::Device gpu_before;
  c10::Stream before;
  void *graph = nullptr;

  explicit Graph(c10::DeviceIndex index)
      : gpu(c10::DeviceType::CUDA, index),
        side(gpus.getStreamFromGlobalPool(gpu)),
        gpu_before(gpu),
        before(side) {
    void *room = ::operator new(ROOM);
    memset(room, 0, ROOM);
    try {
      call(CONSTRUCT, room, false);
    } catch (...) {
      ::operator delete(room);
      throw;
    }
    graph = room;
  }

  ~Graph() {
    // The GPU may still run the last replay.
    free(caught([&] { gpus.synchronizeStream(gpus.getStream(gpu)); }));
    free(caught([&] { call(DESTROY, graph); }));
    ::operator delete(graph);
  }

  Graph(const Graph &) = delete;
  Graph &operator=(const Graph &) = delete;
};

}  // namespace

extern "C" {

// The name of the first function that this process lacks, or null.
const char *convpass_cuda_graph_lacks() {
  for (const char *name : NAMES) {
    if (dlsym(RTLD_DEFAULT, name) == nullptr) return name;
  }
  return nullptr;
}

char *convpass_cuda_graph_new(int64_t gpu, Graph **out) {
  return caught([&] { *out = new Graph(static_cast<c10::DeviceIndex>(gpu)); });
}

// Makes the stream of the graph current, behind everything that the current one has to do.
char *convpass_cuda_graph_enter(Graph *graph) {
  return caught([&] {
    graph->before = graph->gpus.getStream(graph->gpu);
    graph->gpus.synchronizeStream(graph->before);
    graph->gpu_before = graph->gpus.exchangeDevice(graph->gpu);
    graph->gpus.exchangeStream(graph->side);
  });
}

// Makes the stream before it current again, behind everything that was done on that of the graph.
char *convpass_cuda_graph_leave(Graph *graph) {
  return caught([&] {
    graph->gpus.exchangeStream(graph->before);
    graph->gpus.exchangeDevice(graph->gpu_before);
    graph->gpus.synchronizeStream(graph->side);
  });
}

// Records from here on what is done on the stream of the graph, which has to be the current one. A
// capture cannot free memory, so what the allocator keeps for no one is freed before.
char *convpass_cuda_graph_begin(Graph *graph) {
  return caught([&] {
    graph->gpus.synchronizeStream(graph->side);
    if (auto *allocator = dynamic_cast<c10::DeviceAllocator *>(c10::GetAllocator(c10::DeviceType::CUDA))) {
      allocator->emptyCache();
    }
    call(BEGIN, graph->graph, Pool{0, 0}, THREAD_LOCAL);
  });
}

char *convpass_cuda_graph_end(Graph *graph) {
  return caught([&] { call(END, graph->graph); });
}

// Does on the current stream what was recorded.
char *convpass_cuda_graph_replay(Graph *graph) {
  return caught([&] { call(REPLAY, graph->graph); });
}

void convpass_cuda_graph_free(Graph *graph) {
  free(caught([&] { delete graph; }));
}

}
