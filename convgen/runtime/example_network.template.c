/* Shows how the library is called: runs the network on the input that lies beside this file, and compares.
 *
 *     cc -std=c11 -O2 example.c -L. -l$name -lm -lpthread -Wl,-rpath,. -o example && ./example
 *
 * or, with the library in the program:
 *
 *     cc -std=c11 -O2 example.c lib$name.a -lm -lpthread -o example && ./example
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "$name.h"

enum { INPUTS = $inputs, OUTPUTS = $outputs };

static void must(const char *what, int status)
{
    if (status != CONVGEN_OK) {
        fprintf(stderr, "%s: %s\n", what, ${name}_error(status));
        exit(1);
    }
}

static void *buffer(size_t size)
{
    void *memory = aligned_alloc(CONVGEN_ALIGNMENT, (size / CONVGEN_ALIGNMENT + 1) * CONVGEN_ALIGNMENT);
    if (memory == NULL) {
        fprintf(stderr, "out of memory (%zu bytes)\n", size);
        exit(1);
    }
    return memory;
}

/* The numbers in a file beside this one, such as example.input0. */
static float *numbers(const char *kind, int number, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "example.%s%d", kind, number);
    FILE *file = fopen(path, "rb");
    float *values = buffer(size);
    if (file == NULL || fread(values, 1, size, file) != size) {
        fprintf(stderr, "%s: cannot be read\n", path);
        exit(1);
    }
    fclose(file);
    return values;
}

int main(void)
{
    must("check_cpu", ${name}_check_cpu());
    convgen_network *network;
    must("open", ${name}_open("$name.weights", &network));

    const void *inputs[INPUTS + 1];
    size_t input_sizes[INPUTS + 1], output_sizes[OUTPUTS];
    void *outputs[OUTPUTS];
    float *expected[OUTPUTS];
    for (int i = 0; i < INPUTS; ++i) {
        input_sizes[i] = ${name}_inputs()[i].bytes;
        inputs[i] = numbers("input", i, input_sizes[i]);
    }
    for (int i = 0; i < OUTPUTS; ++i) {
        output_sizes[i] = ${name}_outputs()[i].bytes;
        outputs[i] = buffer(output_sizes[i]);
        expected[i] = numbers("output", i, output_sizes[i]);
    }

    /* On the thread that calls, then on two. One pool serves all libraries of a program. */
    for (int threads = 1; threads <= 2; ++threads) {
        convgen_network_sizes sizes;
        must("sizes", ${name}_sizes(threads, &sizes));
        convgen_pool *pool = NULL;
        if (threads > 1)
            must("pool_create", ${name}_pool_create(threads, &pool));
        void *workspace = buffer(sizes.workspace);
        const convgen_network_args args = {inputs,    input_sizes,     outputs, output_sizes,
                                           workspace, sizes.workspace, pool};
        for (int i = 0; i < OUTPUTS; ++i)
            memset(outputs[i], 0xff, output_sizes[i]); /* NaN: what is not written shows */
        must("run", ${name}_run(network, &args));
        free(workspace);
        if (threads > 1)
            ${name}_pool_destroy(pool);
        for (int i = 0; i < OUTPUTS; ++i)
            if (memcmp(outputs[i], expected[i], output_sizes[i]) != 0) {
                fprintf(stderr, "output %d on %d threads: other numbers than expected\n", i, threads);
                return 1;
            }
    }
    printf("$name: %d outputs as expected; ok\n", OUTPUTS);

    for (int i = 0; i < OUTPUTS; ++i) {
        free(outputs[i]);
        free(expected[i]);
    }
    for (int i = 0; i < INPUTS; ++i)
        free((void *)inputs[i]);
    ${name}_close(network);
    return 0;
}
