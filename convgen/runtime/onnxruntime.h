/* What ONNX Runtime and a library of custom operators say to each other; not installed.
 *
 * ONNX Runtime is distributed without C headers. This is the part of its C API that is needed here, by the layout of
 * include/onnxruntime/core/session/onnxruntime_c_api.h of API version 17 (ONNX Runtime 1.17), which later versions only
 * add to at the ends of structs: a library asks for the version that it knows, and older ones do not have it.
 */
#ifndef CONVGEN_ONNXRUNTIME_H
#define CONVGEN_ONNXRUNTIME_H

#include "runtime.h"

#include "network_types.h"

enum { ORT_API_VERSION = 17 };
/* Numbers of enumerations: OrtErrorCode, ONNXTensorElementDataType, OrtAllocatorType, OrtMemType. */
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum { ORT_DEVICE_ALLOCATOR = 0, ORT_MEM_DEFAULT = 0 };
/* ONNX's numbers of types. */
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7, ORT_BOOL = 9, ORT_HALF = 10, ORT_BFLOAT16 = 16 };

typedef struct OrtStatus OrtStatus; /* NULL: it went well */
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtCustomOp OrtCustomOp;
typedef void (*OrtUnused)(void);

/* Nothing but functions, so that a place is a number of pointers. */
typedef struct {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    OrtUnused unused1[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **domain);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    OrtUnused unused29[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **data);
    OrtUnused unused52[9];
    OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info, size_t *rank);
    OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *info, int64_t *shape, size_t rank);
    OrtUnused unused63[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorTypeAndShapeInfo **info);
    OrtUnused unused66[3];
    OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo **info);
    OrtUnused unused70[5];
    OrtStatus *(*AllocatorAlloc)(OrtAllocator *allocator, size_t size, void **data);
    OrtStatus *(*AllocatorFree)(OrtAllocator *allocator, void *data);
    OrtUnused unused77[13];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **value);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *shape, size_t rank,
                                          OrtValue **value);
    OrtUnused unused92[1];
    void (*ReleaseStatus)(OrtStatus *status);
    void (*ReleaseMemoryInfo)(OrtMemoryInfo *info);
    OrtUnused unused95[4];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);
    OrtUnused unused100[1];
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
    OrtUnused unused102[30];
    void (*ReleaseAllocator)(OrtAllocator *allocator);
    OrtUnused unused133[120];
    OrtStatus *(*KernelContext_GetAllocator)(const OrtKernelContext *context, const OrtMemoryInfo *info,
                                             OrtAllocator **allocator);
    OrtUnused unused254[20];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*body)(void *, size_t), size_t count,
                                            size_t batches, void *data);
} OrtApi;

#define CONVGEN_ORT_PLACE(function, place)                                                                  \
    _Static_assert(offsetof(OrtApi, function) == (place) * sizeof(OrtUnused), #function)
CONVGEN_ORT_PLACE(GetTensorMutableData, 51);
CONVGEN_ORT_PLACE(GetTensorTypeAndShape, 65);
CONVGEN_ORT_PLACE(AllocatorFree, 76);
CONVGEN_ORT_PLACE(ReleaseCustomOpDomain, 101);
CONVGEN_ORT_PLACE(ReleaseAllocator, 132);
CONVGEN_ORT_PLACE(KernelContext_GetAllocator, 253);
CONVGEN_ORT_PLACE(KernelContext_ParallelFor, 274);

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version); /* NULL where it is newer than the runtime */
    const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
    uint32_t version;
    OrtUnused CreateKernel; /* before V2 */
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op); /* NULL: the CPU's */
    int (*GetInputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    int (*GetOutputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    OrtUnused KernelCompute; /* before V2 */
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index); /* 0: required */
    int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtUnused InferOutputShapeFn; /* NULL: the model says what shapes are */
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
};

/* ---- operators --------------------------------------------------------------------------------- */

/* The most inputs, and the most outputs, of an operator. */
enum { CONVGEN_ORT_MOST_VALUES = 256, CONVGEN_ORT_MOST_AXES = 16 };

/* A network as an operator. It was made for at most 64 sizes. */
typedef struct {
    OrtCustomOp base; /* first: ONNX Runtime hands out a pointer to it */
    const char *name;
    int threads, input_count, output_count;
    const void *weights; /* linked in */
    const char *weights_end;
    /* the network's exported functions */
    int (*sizes)(int size, int threads, convgen_network_sizes *sizes);
    const convgen_value *(*inputs)(int size);
    const convgen_value *(*outputs)(int size);
    int (*open_memory)(const void *weights, size_t size, convgen_network **network);
    void (*close)(convgen_network *network);
    int (*run)(const convgen_network *network, const convgen_network_args *args);
    int (*check_cpu)(void);
    const char *(*error)(int status);
} convgen_ort_op;

/* Register operators of the domain `convgen`; what RegisterCustomOps() does. */
OrtStatus *convgen_ort_register(OrtSessionOptions *options, const OrtApiBase *base, const convgen_ort_op *const *ops,
                                int count);

const char *convgen_ort_name(const OrtCustomOp *op);
const char *convgen_ort_provider(const OrtCustomOp *op);
int convgen_ort_input_type(const OrtCustomOp *op, size_t index);
int convgen_ort_output_type(const OrtCustomOp *op, size_t index);
size_t convgen_ort_input_count(const OrtCustomOp *op);
size_t convgen_ort_output_count(const OrtCustomOp *op);
int convgen_ort_zero(const OrtCustomOp *op);
int convgen_ort_zero_of(const OrtCustomOp *op, size_t index);
int convgen_ort_one(const OrtCustomOp *op);
int convgen_ort_any_version(const OrtCustomOp *op);
OrtStatus *convgen_ort_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
OrtStatus *convgen_ort_compute(void *kernel, OrtKernelContext *context);
void convgen_ort_destroy(void *kernel);

#define CONVGEN_ORT_BASE                                                                                    \
    {                                                                                                       \
        .version = ORT_API_VERSION,                                                                         \
        .GetName = convgen_ort_name,                                                                        \
        .GetExecutionProviderType = convgen_ort_provider,                                                   \
        .GetInputType = convgen_ort_input_type,                                                             \
        .GetInputTypeCount = convgen_ort_input_count,                                                       \
        .GetOutputType = convgen_ort_output_type,                                                           \
        .GetOutputTypeCount = convgen_ort_output_count,                                                     \
        .KernelDestroy = convgen_ort_destroy,                                                               \
        .GetInputCharacteristic = convgen_ort_zero_of,                                                      \
        .GetOutputCharacteristic = convgen_ort_zero_of,                                                     \
        .GetInputMemoryType = convgen_ort_zero_of,                                                          \
        .GetVariadicInputMinArity = convgen_ort_one,                                                        \
        .GetVariadicInputHomogeneity = convgen_ort_zero,                                                    \
        .GetVariadicOutputMinArity = convgen_ort_one,                                                       \
        .GetVariadicOutputHomogeneity = convgen_ort_zero,                                                   \
        .CreateKernelV2 = convgen_ort_create,                                                               \
        .KernelComputeV2 = convgen_ort_compute,                                                             \
        .GetStartVersion = convgen_ort_one,                                                                 \
        .GetEndVersion = convgen_ort_any_version,                                                           \
    }

/* An operator that is a network: `name` leads the network's functions. */
#define CONVGEN_ORT_OP(network, op_name, thread_count, inputs_, outputs_, begin, end)                       \
    int network##_sizes(int size, int threads, convgen_network_sizes *sizes);                               \
    const convgen_value *network##_inputs(int size);                                                        \
    const convgen_value *network##_outputs(int size);                                                       \
    int network##_open_memory(const void *weights, size_t size, convgen_network **opened);                  \
    void network##_close(convgen_network *opened);                                                          \
    int network##_run(const convgen_network *opened, const convgen_network_args *args);                     \
    int network##_check_cpu(void);                                                                          \
    const char *network##_error(int status);                                                                \
    static const convgen_ort_op network = {                                                                 \
        .base = CONVGEN_ORT_BASE,                                                                           \
        .name = op_name,                                                                                    \
        .threads = thread_count,                                                                            \
        .input_count = inputs_,                                                                             \
        .output_count = outputs_,                                                                           \
        .weights = begin,                                                                                   \
        .weights_end = end,                                                                                 \
        .sizes = network##_sizes,                                                                           \
        .inputs = network##_inputs,                                                                         \
        .outputs = network##_outputs,                                                                       \
        .open_memory = network##_open_memory,                                                               \
        .close = network##_close,                                                                           \
        .run = network##_run,                                                                               \
        .check_cpu = network##_check_cpu,                                                                   \
        .error = network##_error,                                                                           \
    }

/* The exported function, by the name that ONNX Runtime looks for. */
#define CONVGEN_ORT_REGISTER(ops, count)                                                                    \
    CONVGEN_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)         \
    {                                                                                                       \
        return convgen_ort_register(options, base, ops, count);                                             \
    }

#endif
