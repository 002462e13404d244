// Stands in for the CUDA runtime under a library that nvcc compiled: launches are handed to Python, with the kernel's
// name and its arguments as they are.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

struct Dimensions {
  unsigned x, y, z;
};

namespace {
using Launched = void (*)(const char* kernel, const unsigned* grid, unsigned threads, size_t shared, void** arguments);
Launched launched = nullptr;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}
struct {
  Dimensions grid, block;
  size_t shared;
  void* stream;
} configured;
}  // namespace

extern "C" {
void ptx_on_launch(Launched f) { launched = f; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
  names()[host] = device;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "invalid argument"; }
int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  std::memset(to, value, bytes);
  return 0;
}
// In clusters of `cluster` blocks along x.
int ptx_launch(const void* kernel, Dimensions grid, Dimensions block, void** arguments, size_t shared,
               unsigned cluster) {
  const unsigned sizes[] = {grid.x, grid.y, grid.z, cluster};
  launched(names()[kernel].c_str(), sizes, block.x * block.y * block.z, shared, arguments);
  return 0;
}
int cudaLaunchKernel(const void* kernel, Dimensions grid, Dimensions block, void** arguments, size_t shared, void*) {
  return ptx_launch(kernel, grid, block, arguments, shared, 1);
}

// What `kernel<<<...>>>(...)` is made of.
unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* shared, void** stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared, *stream = configured.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dimensions grid, Dimensions block, void** arguments, size_t shared,
                       void* s) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, s);
}
}
