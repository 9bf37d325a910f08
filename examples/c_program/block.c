/* A bottleneck block of ResNet-50 on three kernels that convgen generated (see the Makefile):
 *
 *     y = relu(expand(relu(spatial(relu(reduce(x))))) + x)
 *
 * The weights are packed once; one pool of threads and one workspace serve all three layers.
 */
#define _POSIX_C_SOURCE 200112L

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "expand.h"
#include "reduce.h"
#include "spatial.h"

typedef struct {
    int (*sizes)(int, convgen_sizes *);
    int (*pack)(const convgen_pack_args *);
    int (*run)(const convgen_run_args *);
    convgen_sizes bytes;
    void *packed;
} layer;

static void *buffer(size_t size)
{
    void *memory = NULL;
    if (posix_memalign(&memory, CONVGEN_ALIGNMENT, size ? size : CONVGEN_ALIGNMENT)) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return memory;
}

static void must(int status)
{
    if (status != CONVGEN_OK) {
        fprintf(stderr, "convgen: %s\n", reduce_error(status));
        exit(1);
    }
}

/* Small random numbers. */
static float *random_tensor(size_t size)
{
    float *values = buffer(size);
    for (size_t i = 0; i < size / sizeof(float); ++i)
        values[i] = 0.1f * ((float)rand() / (float)RAND_MAX - 0.5f);
    return values;
}

static void prepare(layer *it, int threads)
{
    must(it->sizes(threads, &it->bytes));
    it->packed = buffer(it->bytes.packed);
    float *weights = random_tensor(it->bytes.weights), *bias = random_tensor(it->bytes.bias);
    must(it->pack(&(convgen_pack_args){
        .weights = weights,
        .weights_size = it->bytes.weights,
        .bias = bias,
        .bias_size = it->bytes.bias,
        .packed = it->packed,
        .packed_size = it->bytes.packed,
    }));
    free(weights);
    free(bias);
}

static void run(const layer *it, const float *src, const float *residual, float *dst, void *workspace,
                convgen_pool *pool)
{
    must(it->run(&(convgen_run_args){
        .src = src,
        .src_size = it->bytes.src,
        .packed = it->packed,
        .packed_size = it->bytes.packed,
        .residual = residual,
        .residual_size = it->bytes.residual,
        .dst = dst,
        .dst_size = it->bytes.dst,
        .workspace = workspace,
        .workspace_size = it->bytes.workspace,
        .pool = pool,
    }));
}

int main(int count, char **arguments)
{
    const int threads = count > 1 ? atoi(arguments[1]) : 1, repeats = 200;
    layer first = {.sizes = reduce_sizes, .pack = reduce_pack, .run = reduce_run};
    layer second = {.sizes = spatial_sizes, .pack = spatial_pack, .run = spatial_run};
    layer third = {.sizes = expand_sizes, .pack = expand_pack, .run = expand_run};
    layer *layers[] = {&first, &second, &third};

    size_t workspace_size = 0;
    for (int i = 0; i < 3; ++i) {
        prepare(layers[i], threads);
        if (layers[i]->bytes.workspace > workspace_size)
            workspace_size = layers[i]->bytes.workspace;
    }
    void *workspace = buffer(workspace_size);
    convgen_pool *pool = NULL;
    must(reduce_pool_create(threads, &pool));

    float *x = random_tensor(first.bytes.src), *y = buffer(third.bytes.dst);
    float *narrow = buffer(first.bytes.dst), *wide = buffer(second.bytes.dst);
    struct timespec start, end;
    for (int i = -1; i < repeats; ++i) {
        if (i == 0) /* the first run warms up */
            clock_gettime(CLOCK_MONOTONIC, &start);
        run(&first, x, NULL, narrow, workspace, pool);
        run(&second, narrow, NULL, wide, workspace, pool);
        run(&third, wide, x, y, workspace, pool);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);

    const double seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    double sum = 0;
    for (size_t i = 0; i < third.bytes.dst / sizeof(float); ++i)
        sum += y[i];
    printf("%d threads: %.1f us per block, mean output %.6f\n", threads, 1e6 * seconds / repeats,
           sum / (double)(third.bytes.dst / sizeof(float)));

    reduce_pool_destroy(pool);
    for (int i = 0; i < 3; ++i)
        free(layers[i]->packed);
    free(wide);
    free(narrow);
    free(y);
    free(x);
    free(workspace);
    return 0;
}
