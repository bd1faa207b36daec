/* A libcuda.so.1 whose device memory is the host's: copies are done at once, or put into the graph that is captured.
   Sizes and pitches are honoured as the driver would; a stream, context or graph that was never made is an error. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID = 1, OUT_OF_MEMORY = 2, NOT_CAPTURED = 901 };
#define CONTEXT ((void*)0xc0)
#define STREAM ((void*)0x57)

typedef struct { unsigned char *to, *from; size_t width, to_pitch, from_pitch, rows; int value; } Op;
typedef struct { Op ops[64]; int count; } Graph;

static Graph* capturing;
static size_t allowed = (size_t)1 << 30;
static int current, live;

static void perform(Op op) {
    for (size_t row = 0; row < op.rows; ++row) {
        unsigned char* to = op.to + row * op.to_pitch;
        if (op.from) memmove(to, op.from + row * op.from_pitch, op.width);
        else memset(to, op.value, op.width);
    }
}

static int queue(Op op, void* stream) {
    if (stream != STREAM || !current) return INVALID;
    if (capturing) capturing->ops[capturing->count++] = op;
    else perform(op);
    return 0;
}

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int ordinal) { *device = 0; return ordinal ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = CONTEXT; return device; }
int cuDevicePrimaryCtxRelease(int device) { printf("live %d\n", live); return device; }
int cuCtxSetCurrent(void* context) { current = context == CONTEXT; return current ? 0 : INVALID; }
int cuStreamCreate(void** stream, unsigned flags) { *stream = STREAM; return flags == 1 ? 0 : INVALID; }
int cuStreamDestroy(void* stream) { return stream == STREAM ? 0 : INVALID; }
int cuStreamSynchronize(void* stream) { return stream == STREAM && !capturing ? 0 : INVALID; }
int cuMemGetInfo(size_t* free_, size_t* total) { *free_ = allowed; *total = (size_t)1 << 30; return 0; }

int cuMemAlloc(uint64_t* address, size_t size) {
    if (size > allowed) return OUT_OF_MEMORY;
    allowed -= size;
    ++live;
    *address = (uint64_t)(uintptr_t)aligned_alloc(256, (size + 255) / 256 * 256);
    return 0;
}
int cuMemFree(uint64_t address) { free((void*)(uintptr_t)address); --live; return 0; }
int cuMemHostAlloc(void** address, size_t size, unsigned flags) { *address = malloc(size); ++live; return flags; }
int cuMemFreeHost(void* address) { free(address); --live; return 0; }

int cuMemcpyHtoDAsync(uint64_t to, void* from, size_t size, void* stream) {
    return queue((Op){(void*)(uintptr_t)to, from, size, 0, 0, 1, 0}, stream);
}
int cuMemcpyDtoHAsync(void* to, uint64_t from, size_t size, void* stream) {
    return queue((Op){to, (void*)(uintptr_t)from, size, 0, 0, 1, 0}, stream);
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void* stream) {
    return queue((Op){(void*)(uintptr_t)to, NULL, size, 0, 0, 1, value}, stream);
}

typedef struct {
    size_t from_x, from_y; int from_type; void* from_host; uint64_t from; void* from_array; size_t from_pitch;
    size_t to_x, to_y; int to_type; void* to_host; uint64_t to; void* to_array; size_t to_pitch;
    size_t width, height;
} Copy2D;  /* as CUDA_MEMCPY2D of cuda.h */

int cuMemcpy2DAsync(Copy2D const* c, void* stream) {
    if (c->from_type != 2 || c->to_type != 2 || c->width > c->from_pitch || c->width > c->to_pitch) return INVALID;
    return queue((Op){(void*)(uintptr_t)c->to, (void*)(uintptr_t)c->from, c->width, c->to_pitch, c->from_pitch,
                      c->height, 0}, stream);
}

int cuStreamBeginCapture(void* stream, int mode) {
    if (stream != STREAM || mode != 1 || capturing) return INVALID;
    capturing = calloc(1, sizeof(Graph));
    ++live;
    return 0;
}
int cuStreamEndCapture(void* stream, void** graph) {
    if (stream != STREAM || !capturing) return INVALID;
    *graph = capturing;
    capturing = NULL;
    return getenv("FAKE_REFUSE_CAPTURE") ? NOT_CAPTURED : 0;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    *executable = memcpy(malloc(sizeof(Graph)), graph, sizeof(Graph));
    ++live;
    return (int)flags;
}
int cuGraphDestroy(void* graph) { free(graph); --live; return 0; }
int cuGraphExecDestroy(void* executable) { free(executable); --live; return 0; }
int cuGraphLaunch(void* executable, void* stream) {
    Graph* graph = executable;
    for (int i = 0; i < graph->count; ++i) queue(graph->ops[i], stream);
    return 0;
}

int cuEventCreate(void** event, unsigned flags) { *event = malloc(8); ++live; return flags; }
int cuEventDestroy(void* event) { free(event); --live; return 0; }
int cuEventRecord(void* event, void* stream) { (void)event; return stream == STREAM ? 0 : INVALID; }
int cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
    *milliseconds = 250;
    return begin != end ? 0 : INVALID;
}

int cuGetErrorName(int error, char const** name) { (void)error; *name = "CUDA_ERROR_FAKE"; return 0; }

/* How cuda-python finds the functions; one that is not here is only missed if it is called. */
int cuGetProcAddress_v2(char const* symbol, void** function, int version, uint64_t flags, int* status) {
    (void)version, (void)flags;
    *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), symbol);
    if (status) *status = *function ? 0 : 1;
    return 0;
}
