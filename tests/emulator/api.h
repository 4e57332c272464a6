// What the C functions of the emulated library share: each runs one X_launch on host memory and
// returns nullptr, or what went wrong.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "emulator/fibers.h"

#define EMULATED extern "C" __attribute__((visibility("default"))) const char*

namespace emulate {

template <class Run>
const char* guarded(uint64_t seed, Run run) {
  static std::string message;
  settings.seed = seed;
  try {
    run();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace emulate
