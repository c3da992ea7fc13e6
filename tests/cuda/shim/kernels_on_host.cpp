// Runs one call of a CUDA kernel's host build: reads a case from a file, writes the results to another.
//   kernels_on_host CASE RESULTS
//   kernels_on_host plan BATCH HEIGHT WIDTH CHANNELS MAX_OFFSET    prints columns, halo rows, halo columns
// CASE: a Header, then each input as a 64-bit byte count (-1: absent) and its bytes, in the order of Inputs.
// RESULTS: each output likewise; those not asked for are absent. Every array lies in a heap block of exactly its
// size, and outputs hold NaN before the call.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "backward_launch.cuh"
#include "forward_kernel.cuh"

namespace {

using stable_sam::SamplingShape;

struct Header {
  int64_t is_backward;
  int64_t element_bytes;
  int64_t is_bfloat16;
  int64_t grad_mask;
  int64_t misalignment;  // bytes between a 16-byte boundary and the start of each array
  int64_t backwards;     // order of the threads
  int64_t without_halo;  // as if the halo of a tile were too large for shared memory
  int64_t features_batch;
  int64_t identity_batch;
  SamplingShape shape;
};

// A heap block of exactly `bytes`, beginning `misalignment` bytes after a 16-byte boundary.
class Array {
 public:
  Array() = default;
  Array(int64_t bytes, int64_t misalignment) : bytes_(bytes), present_(true) {
    if (bytes == 0) return;
    block_ = static_cast<char*>(std::malloc(static_cast<size_t>(bytes + misalignment)));
    data_ = block_ + misalignment;
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(present_, other.present_);
    return *this;
  }
  ~Array() { std::free(block_); }

  static Array read(std::ifstream& file, int64_t misalignment) {
    int64_t bytes = -1;
    file.read(reinterpret_cast<char*>(&bytes), sizeof(bytes));
    if (!file) throw std::runtime_error("the case ends early");
    if (bytes < 0) return {};
    Array array(bytes, misalignment);
    if (bytes > 0) file.read(array.data_, bytes);
    return array;
  }

  void write(std::ofstream& file) const {
    const int64_t count = present_ ? bytes_ : -1;
    file.write(reinterpret_cast<const char*>(&count), sizeof(count));
    if (count > 0) file.write(data_, count);
  }

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  const void* data() const { return data_; }

 private:
  char* block_ = nullptr;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  bool present_ = false;
};

struct Inputs {
  Array grad_output, features, offsets, identity, alpha, amplitude;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("the launch was refused");
}

template <typename T, int Width>
std::vector<Array> forward(const Header& header, const Inputs& inputs) {
  const SamplingShape& shape = header.shape;
  std::vector<Array> outputs;
  outputs.emplace_back(shape.batch * shape.height * shape.width * shape.channels * header.element_bytes,
                       header.misalignment);
  if (outputs[0].data() == nullptr) return outputs;
  stable_sam::ForwardArguments<T> arguments{};
  arguments.features = inputs.features.as<T>();
  arguments.offsets = inputs.offsets.as<T>();
  arguments.identity = inputs.identity.as<T>();
  arguments.alpha = inputs.alpha.as<T>();
  arguments.amplitude = inputs.amplitude.as<T>();
  arguments.output = outputs[0].as<T>();
  arguments.shape = shape;
  check(stable_sam::launch_forward<T, Width>(arguments, nullptr));
  return outputs;
}

template <typename T, int Width>
std::vector<Array> backward(const Header& header, const Inputs& inputs) {
  const SamplingShape& shape = header.shape;
  const int64_t pixels = shape.height * shape.width;
  const int64_t elements[] = {header.features_batch * pixels * shape.channels, shape.batch * 2 * pixels,
                              header.identity_batch * pixels * shape.channels, shape.batch * 2,
                              shape.batch * pixels * shape.amplitude_channels};
  std::vector<Array> outputs(5);
  for (int i = 0; i < 5; ++i) {
    if (header.grad_mask >> i & 1) outputs[i] = Array(elements[i] * header.element_bytes, header.misalignment);
  }
  const Array partials(stable_sam::alpha_partials_size(shape, Width) * 4, 0);

  stable_sam::BackwardArguments<T> arguments{};
  arguments.grad_output = inputs.grad_output.as<T>();
  arguments.features = inputs.features.as<T>();
  arguments.offsets = inputs.offsets.as<T>();
  arguments.identity = inputs.identity.as<T>();
  arguments.alpha = inputs.alpha.as<T>();
  arguments.amplitude = inputs.amplitude.as<T>();
  arguments.grad_features = outputs[0].as<T>();
  arguments.grad_offsets = outputs[1].as<T>();
  arguments.grad_identity = outputs[2].as<T>();
  arguments.grad_alpha = outputs[3].as<T>();
  arguments.grad_amplitude = outputs[4].as<T>();
  arguments.alpha_partials = arguments.grad_alpha != nullptr ? partials.as<float>() : nullptr;
  arguments.shape = shape;
  if (header.without_halo == 0) {
    check(stable_sam::launch_backward<T, Width>(arguments, nullptr));
    return outputs;
  }
  arguments.plan = stable_sam::plan_tiles(shape, Width);
  arguments.window = stable_sam::plan_window(shape, arguments.plan);
  arguments.window.halo_rows = 0;
  check(stable_sam::launch_all<T, Width, false>(arguments, nullptr));
  return outputs;
}

template <typename T>
std::vector<Array> run(const Header& header, const Inputs& inputs) {
  bool vectors = true;
  for (const Array* array : {&inputs.features, &inputs.identity}) {
    vectors = vectors && stable_sam::allows_vectors(array->data(), header.shape.channels * header.element_bytes);
  }
  if (vectors) {
    constexpr int kWidth = stable_sam::kVectorWidth<T>;
    return header.is_backward ? backward<T, kWidth>(header, inputs) : forward<T, kWidth>(header, inputs);
  }
  return header.is_backward ? backward<T, 1>(header, inputs) : forward<T, 1>(header, inputs);
}

int print_plan(char** words) {
  SamplingShape shape{};
  shape.batch = std::atoll(words[0]);
  shape.height = std::atoll(words[1]);
  shape.width = std::atoll(words[2]);
  shape.channels = std::atoll(words[3]);
  shape.max_offset = std::atof(words[4]);
  const stable_sam::TilePlan plan = stable_sam::plan_tiles(shape, 1);
  const stable_sam::GatherWindow window = stable_sam::plan_window(shape, plan);
  std::printf("%d %d %d\n", plan.columns, window.halo_rows, window.halo_columns);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 7 && std::strcmp(words[1], "plan") == 0) return print_plan(words + 2);
  if (count != 3) return 2;
  std::ifstream file(words[1], std::ios::binary);
  Header header;
  file.read(reinterpret_cast<char*>(&header), sizeof(header));
  Inputs inputs;
  for (Array* array :
       {&inputs.grad_output, &inputs.features, &inputs.offsets, &inputs.identity, &inputs.alpha, &inputs.amplitude}) {
    *array = Array::read(file, header.misalignment);
  }
  shim::run_backwards(header.backwards != 0);
#if defined(ONLY_FLOAT)
  const std::vector<Array> outputs = run<float>(header, inputs);
#else
  const std::vector<Array> outputs = header.element_bytes == 4 ? run<float>(header, inputs)
                                     : header.is_bfloat16      ? run<__nv_bfloat16>(header, inputs)
                                                               : run<__half>(header, inputs);
#endif
  std::ofstream results(words[2], std::ios::binary);
  for (const Array& output : outputs) output.write(results);
  return results ? 0 : 1;
}
