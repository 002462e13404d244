// The part of the stand-in that compute capability 9.0 needs: launches in clusters, and descriptors of tensors, which
// hold what the machine reads (tests/gpu_on_cpu/ptx/tensor_maps.py) in place of what the driver makes of it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

extern "C" int ptx_launch(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, unsigned cluster);

namespace {

struct Map {
  char mark[8];
  uint64_t data;
  uint32_t size[4];
  uint64_t stride[4];  // in bytes
  int16_t lower[2], upper[2];
  uint16_t box[4];  // im2col: channels, pixels
  uint8_t im2col, swizzle, fill, rank, tf32, bytes;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// What the driver would refuse, or the machine does not know, is refused.
CUresult encode(CUtensorMap* to, CUtensorMapDataType type, unsigned rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* steps, CUtensorMapInterleave interleave, Map map) {
  bool known = (rank == 2 || rank == 4) && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
               interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
  map.tf32 = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  const bool words = map.tf32 || type == CU_TENSOR_MAP_DATA_TYPE_UINT32 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  known = known && (words || type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                    type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  map.bytes = words ? 4 : 2;
  map.rank = static_cast<uint8_t>(rank);
  for (unsigned i = 0; known && i < rank; ++i) {
    known = sizes[i] > 0 && sizes[i] <= UINT32_MAX && steps[i] == 1 && (i == 0 || strides[i - 1] % 16 == 0);
    map.size[i] = static_cast<uint32_t>(sizes[i]);
    map.stride[i] = i == 0 ? map.bytes : strides[i - 1];
  }
  if (!known) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map.mark, "ptx map", 8);
  map.data = reinterpret_cast<uintptr_t>(data);
  memcpy(to, &map, sizeof(map));
  return CUDA_SUCCESS;
}

CUresult encode_tiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  Map map{};
  for (unsigned i = 0; i < 4 && i < rank; ++i) {
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.fill = static_cast<uint8_t>(fill);
  return encode(to, type, rank, data, sizes, strides, steps, interleave, map);
}

CUresult encode_im2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const int* lower, const int* upper, cuuint32_t channels,
                       cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (rank != 4 || channels == 0 || channels > 256 || pixels == 0 || pixels > 1024) return CUDA_ERROR_INVALID_VALUE;
  Map map{};
  for (int i = 0; i < 2; ++i) {
    if (lower[i] < -128 || lower[i] > 127 || upper[i] < -128 || upper[i] > 127) return CUDA_ERROR_INVALID_VALUE;
    map.lower[i] = static_cast<int16_t>(lower[i]);
    map.upper[i] = static_cast<int16_t>(upper[i]);
  }
  map.box[0] = static_cast<uint16_t>(channels);
  map.box[1] = static_cast<uint16_t>(pixels);
  map.im2col = 1;
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.fill = static_cast<uint8_t>(fill);
  return encode(to, type, rank, data, sizes, strides, steps, interleave, map);
}

}  // namespace

extern "C" {
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = nullptr;
  if (strcmp(name, "cuTensorMapEncodeTiled") == 0) *found = reinterpret_cast<void*>(&encode_tiled);
  if (strcmp(name, "cuTensorMapEncodeIm2col") == 0) *found = reinterpret_cast<void*>(&encode_im2col);
  if (result != nullptr) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *found ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  dim3 cluster{1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) return cudaErrorNotSupported;
    const auto& dimensions = config->attrs[i].val.clusterDim;
    cluster = {dimensions.x, dimensions.y, dimensions.z};
  }
  if (cluster.y != 1 || cluster.z != 1 || config->gridDim.x % cluster.x != 0) return cudaErrorInvalidConfiguration;
  return static_cast<cudaError_t>(
      ptx_launch(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, cluster.x));
}
}
