// The functions that Python's tests call.
#include "emulator.h"

extern "C" {

__attribute__((visibility("default"))) int alexnet_emulator_launches() {
  return static_cast<int>(emulator::launches());
}

__attribute__((visibility("default"))) void alexnet_emulator_order(int order) {
  emulator::set_order(static_cast<emulator::Order>(order));
}
}
