/* A libcuda.so.1 that launches nothing: it prints what it is told to. Images are those of tests/fake_kernels.py. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(char const* name, int otherwise) {
    char const* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuCtxGetId(void* context, unsigned long long* id) { *id = (unsigned long long)(uintptr_t)context; return 0; }

int cuDeviceGetAttribute(int* value, int kind, int device) {
    int sm = number("FAKE_SM", 90);
    (void)device;
    *value = kind == 75 ? sm / 10 : kind == 76 ? sm % 10 : number("FAKE_MULTIPROCESSORS", 132);
    return 0;
}

/* The image is the caller's again afterwards, and has to lie where any object may. */
int cuModuleLoadData(void** module, void const* image) {
    if ((uintptr_t)image % 16) return 1;
    *module = strdup(image);
    return number("FAKE_ERROR", 0);
}

int cuModuleGetFunction(void** function, void* module, char const* name) {
    printf("load %s\n", name);
    *function = module;
    return 0;
}

int cuFuncSetAttribute(void* function, int kind, int value) {
    printf("attribute %d %d %d\n", atoi(function), kind, value);
    return 0;
}

/* CUlaunchConfig; an attribute is an id, padding and a union of 64 bytes. */
struct config {
    unsigned gx, gy, gz, bx, by, bz, shared;
    void* stream;
    int (*attributes)[18];
    unsigned count;
};

int cuLaunchKernelEx(struct config const* config, void* function, void** parameters, void** extra) {
    int image, count;
    if (sscanf(function, "%d %d", &image, &count) != 2 || extra || config->count > 2) return 1;
    if (config->gy != 1 || config->gz != 1 || config->by != 1 || config->bz != 1) return 1;
    printf("launch %d %u %u %u %llu", image, config->gx, config->bx, config->shared,
           (unsigned long long)(uintptr_t)config->stream);
    for (int i = 0; i < count; ++i) printf(" %llu", (unsigned long long)*(uint64_t*)parameters[i]);
    for (unsigned i = 0; i < config->count; ++i) {
        int const* attribute = config->attributes[i];
        printf(" attribute %d %d", attribute[0], attribute[2]);
        if (attribute[0] == 4) printf(" %d %d", attribute[3], attribute[4]);
    }
    printf("\n");
    return 0;
}

int cuGetErrorName(int error, char const** name) { (void)error; *name = "CUDA_ERROR_FAKE"; return 0; }

/* How cuda-python finds the functions; one that is not here is only missed if it is called. */
int cuGetProcAddress_v2(char const* symbol, void** function, int version, uint64_t flags, int* status) {
    (void)version, (void)flags;
    *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), symbol);
    if (status) *status = *function ? 0 : 1;
    return 0;
}
