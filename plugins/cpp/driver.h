// The CUDA driver API, as far as a launcher needs it. The library is opened at run time, so that this plugin compiles
// without a CUDA toolkit, and builds engines on machines without a driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace lynx {

struct Device {
    int64_t sm;
    int64_t multiprocessors;
    uint64_t context;  // the context's id, which no other context of the process gets
};

// A kernel launch. Each argument lies in a word of 8 bytes: pointers, null pointers, and T in the lower half of one.
struct Launch {
    void* function;
    unsigned programs;
    unsigned threads;
    unsigned shared;
    bool programmatic;  // it may start while the launch before it runs
    bool cluster;       // its programs are one thread block cluster
    std::vector<uint64_t> words;
    std::vector<void*> addresses;  // of the words, as cuLaunchKernelEx takes them
};

// The GPU of the current context. All functions here throw std::runtime_error with CUDA's name of the error.
Device currentDevice();

// The cubin's function in the current context; loaded once in each, and never unloaded, as it goes with its context.
void* loadFunction(Cubin const& cubin, Device const& device);

// Launches on a stream, without waiting.
void launch(Launch& launch, void* stream);

}  // namespace lynx
