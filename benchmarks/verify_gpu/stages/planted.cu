// A bug for each tool of compute-sanitizer: `planted TOOL` runs the one that this tool must see.
#include <cstring>

__global__ void beyond(int* data, int n) { data[n + threadIdx.x] = 1; }

__global__ void race(int* data) {
  __shared__ int shared[256];
  shared[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = shared[255 - threadIdx.x];  // no barrier between: other warps have not written yet
}

__global__ void unwritten(const int* data, int* sum) { atomicAdd(sum, data[threadIdx.x]); }

// Half of a warp and all of another one never reach the barrier.
__global__ void divergent(int* data) {
  if (threadIdx.x < 16) __syncthreads();
  data[threadIdx.x] = threadIdx.x;
}

// Exits with 0 if the kernel was started, whatever it did; with another code if not.
int main(int, char** arguments) {
  int *data, *sum;
  if (cudaMalloc(&data, 256 * sizeof(int)) || cudaMalloc(&sum, sizeof(int)) || cudaMemset(sum, 0, sizeof(int))) {
    return 1;
  }
  const char* tool = arguments[1];
  if (!std::strcmp(tool, "memcheck")) beyond<<<1, 32>>>(data, 256);
  if (!std::strcmp(tool, "racecheck")) race<<<1, 256>>>(data);
  if (!std::strcmp(tool, "initcheck")) unwritten<<<1, 256>>>(data, sum);
  if (!std::strcmp(tool, "synccheck")) divergent<<<1, 64>>>(data);
  if (cudaGetLastError()) return 1;
  cudaDeviceSynchronize();
  return 0;
}
