#include "driver.h"

#include <dlfcn.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace lynx {
namespace {

// Of cuda.h.
constexpr int kMultiprocessorCount = 16;
constexpr int kMajor = 75;
constexpr int kMinor = 76;
constexpr int kMaxDynamicSharedSize = 8;
constexpr int64_t kSharedByDefault = 48 * 1024;
constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;

// CUlaunchAttribute and CUlaunchConfig. The value is a union of 64 bytes: here an int, or three sizes, at its start.
struct LaunchAttribute {
    int id;
    int padding;
    int value[16];
};
struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attributeCount;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);

struct Driver {
    int (*ctxGetCurrent)(void**);
    int (*ctxGetDevice)(int*);
    int (*ctxGetId)(void*, unsigned long long*);
    int (*deviceGetAttribute)(int*, int, int);
    int (*moduleLoadData)(void**, void const*);
    int (*moduleGetFunction)(void**, void*, char const*);
    int (*funcSetAttribute)(void*, int, int);
    int (*launchKernel)(LaunchConfig const*, void*, void**, void**);
    int (*getErrorName)(int, char const**);
};

template <typename Function>
void find(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
        throw std::runtime_error(std::string("libcuda.so.1 has no ") + name + ": the driver is older than CUDA 12");
    }
}

Driver const& driver() {
    // An exception leaves it uninitialized, and the next call tries again.
    static Driver const found = [] {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            throw std::runtime_error("no NVIDIA driver: libcuda.so.1 can't be opened");
        }
        Driver result{};
        find(library, "cuCtxGetCurrent", result.ctxGetCurrent);
        find(library, "cuCtxGetDevice", result.ctxGetDevice);
        find(library, "cuCtxGetId", result.ctxGetId);
        find(library, "cuDeviceGetAttribute", result.deviceGetAttribute);
        find(library, "cuModuleLoadData", result.moduleLoadData);
        find(library, "cuModuleGetFunction", result.moduleGetFunction);
        find(library, "cuFuncSetAttribute", result.funcSetAttribute);
        find(library, "cuLaunchKernelEx", result.launchKernel);
        find(library, "cuGetErrorName", result.getErrorName);
        return result;
    }();
    return found;
}

void check(int error, char const* what) {
    if (error != 0) {
        char const* name = nullptr;
        driver().getErrorName(error, &name);
        throw std::runtime_error(
            std::string(what) + " failed: " + (name ? name : "unknown error") + " (" + std::to_string(error) + ")");
    }
}

int64_t attribute(int kind, int ordinal) {
    int value = 0;
    check(driver().deviceGetAttribute(&value, kind, ordinal), "cuDeviceGetAttribute");
    return value;
}

}  // namespace

Device currentDevice() {
    void* context = nullptr;
    int ordinal = 0;
    unsigned long long id = 0;
    check(driver().ctxGetCurrent(&context), "cuCtxGetCurrent");
    check(driver().ctxGetDevice(&ordinal), "cuCtxGetDevice");
    check(driver().ctxGetId(context, &id), "cuCtxGetId");
    return {10 * attribute(kMajor, ordinal) + attribute(kMinor, ordinal), attribute(kMultiprocessorCount, ordinal), id};
}

void* loadFunction(Cubin const& cubin, Device const& device) {
    // Kernels live as long as the process (kernels.h), so a cubin's address is its own.
    static std::mutex mutex;
    static std::map<std::pair<uint64_t, Cubin const*>, void*> functions;
    std::lock_guard<std::mutex> const lock(mutex);
    void*& function = functions[{device.context, &cubin}];
    if (function == nullptr) {
        void* module = nullptr;
        void* found = nullptr;
        // The image lies anywhere in the blob; the driver gets it where any object may lie.
        std::vector<std::max_align_t> image(cubin.size / sizeof(std::max_align_t) + 1);
        std::memcpy(image.data(), cubin.image, cubin.size);
        check(driver().moduleLoadData(&module, image.data()), "cuModuleLoadData");
        check(driver().moduleGetFunction(&found, module, cubin.entry.c_str()), "cuModuleGetFunction");
        if (cubin.shared > kSharedByDefault) {
            check(driver().funcSetAttribute(found, kMaxDynamicSharedSize, static_cast<int>(cubin.shared)),
                "cuFuncSetAttribute");
        }
        function = found;
    }
    return function;
}

void launch(Launch& launch, void* stream) {
    LaunchAttribute attributes[2];
    unsigned count = 0;
    if (launch.programmatic) {
        attributes[count++] = {kProgrammaticStreamSerialization, 0, {1}};
    }
    if (launch.cluster) {
        attributes[count++] = {kClusterDimension, 0, {static_cast<int>(launch.programs), 1, 1}};
    }
    LaunchConfig const config{
        {launch.programs, 1, 1}, {launch.threads, 1, 1}, launch.shared, stream, attributes, count};
    check(driver().launchKernel(&config, launch.function, launch.addresses.data(), nullptr), "cuLaunchKernelEx");
}

}  // namespace lynx
