// What a binding asks of PyTorch's CUDA side and of a test's settings. Every tensor lies on the CPU.
#include <torch/csrc/stable/c/shim.h>

#include "emulator.h"

extern "C" {

__attribute__((visibility("default"))) int alexnet_emulator_launches() {
  return static_cast<int>(emulator::launches());
}

__attribute__((visibility("default"))) void alexnet_emulator_order(int order) {
  emulator::set_order(static_cast<emulator::Order>(order));
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}
