/* Runs the network `net` of one input and one output on threads of this program's own, as often as they are told, and
 * compares: own_threads FOLDER THREADS RUNS. Then it waits for its standard input to end, with the weights open. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net.h"

static void require(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

static void *contents(const char *folder, const char *name, size_t size)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    void *data = aligned_alloc(64, (size + 63) / 64 * 64);
    require(file != NULL && data != NULL && fread(data, 1, size, file) == size, path);
    fclose(file);
    return data;
}

/* ---- this program's own loop ---- */

typedef struct {
    int threads, loops;
    atomic_int elsewhere; /* iterations on other threads than the one that calls */
} crew;

typedef struct {
    void (*body)(void *, int);
    void *data;
    int count;
    atomic_int next, elsewhere;
} loop;

static void work(loop *l, int elsewhere)
{
    for (int i; (i = atomic_fetch_add(&l->next, 1)) < l->count;) {
        l->body(l->data, i);
        atomic_fetch_add(&l->elsewhere, elsewhere);
    }
}

static void *other(void *l)
{
    work(l, 1);
    return NULL;
}

static void parallel_for(void *context, int count, void (*body)(void *data, int i), void *data)
{
    crew *c = context;
    loop l = {.body = body, .data = data, .count = count};
    pthread_t threads[64];
    for (int i = 0; i < c->threads - 1; ++i)
        require(pthread_create(&threads[i], NULL, other, &l) == 0, "pthread_create");
    if (c->threads == 1)
        work(&l, 0);
    for (int i = 0; i < c->threads - 1; ++i)
        pthread_join(threads[i], NULL);
    c->loops += 1;
    atomic_fetch_add(&c->elsewhere, atomic_load(&l.elsewhere));
}

int main(int count, char **arguments)
{
    require(count == 4, "expected FOLDER THREADS RUNS");
    crew c = {.threads = atoi(arguments[2])};
    convgen_network *network;
    char path[4096];
    snprintf(path, sizeof path, "%s/net.weights", arguments[1]);
    require(net_open(path, &network) == CONVGEN_OK, "net_open");
    const convgen_value *in = &net_inputs(0)[0], *out = &net_outputs(0)[0];
    const void *input = contents(arguments[1], "example.input0", in->bytes);
    const void *expected = contents(arguments[1], "example.output0", out->bytes);
    void *output = malloc(out->bytes);

    convgen_network_sizes sizes;
    convgen_pool *pool;
    require(net_sizes(0, c.threads, &sizes) == CONVGEN_OK, "net_sizes");
    void *workspace = aligned_alloc(64, sizes.workspace + 64);
    require(net_pool_borrow(c.threads, parallel_for, &c, &pool) == CONVGEN_OK, "net_pool_borrow");
    for (int run = 0; run < atoi(arguments[3]); ++run) {
        memset(output, 0xff, out->bytes);
        const int status = net_run(network, &(convgen_network_args){.inputs = &input,
                                                                    .input_sizes = &in->bytes,
                                                                    .outputs = &output,
                                                                    .output_sizes = &out->bytes,
                                                                    .workspace = workspace,
                                                                    .workspace_size = sizes.workspace,
                                                                    .pool = pool});
        require(status == CONVGEN_OK, net_error(status));
        require(memcmp(output, expected, out->bytes) == 0, "other numbers than expected");
    }
    net_pool_destroy(pool);
    printf("%d loops, %d parts on other threads\n", c.loops, atomic_load(&c.elsewhere));
    fflush(stdout);
    while (getchar() != EOF)
        continue;
    net_close(network);
    return 0;
}
