/* $name: a network.
 *
$values
 *   (f32, dense, row-major)
 *   weights   $weights bytes, in $name.weights
 *   workspace $fixed + threads * $share bytes, aligned to $alignment
 *
 * $isa
 * Made by convgen; example.c beside this file shows every call.
 */
#ifndef CONVGEN_NETWORK_${name}_H
#define CONVGEN_NETWORK_${name}_H

$types

$network_types

#ifdef __cplusplus
extern "C" {
#endif

/* How many inputs and outputs there are, and bytes of the weights and of the workspace of calls on `threads` threads
 * (1 for calls without a pool). */
int ${name}_sizes(int threads, convgen_network_sizes *sizes);

/* The inputs and outputs, as many as ${name}_sizes() tells. */
const convgen_value *${name}_inputs(void);
const convgen_value *${name}_outputs(void);

/* A network with its weights, read from a file that is mapped and stays so, or from memory, aligned to $alignment bytes, that
 * stays the caller's. Weights that are another library's, or damaged, are refused. */
int ${name}_open(const char *path, convgen_network **network);
int ${name}_open_memory(const void *weights, size_t size, convgen_network **network);
void ${name}_close(convgen_network *network);

/* Computes the outputs. They must not overlap inputs, weights, workspace or each other. Any number of threads may run
 * one network at once, each with its own outputs and workspace. Results do not depend on the number of threads. A call
 * takes at most $stack KiB of a thread's stack, of its own threads' and of a pool's. */
int ${name}_run(const convgen_network *network, const convgen_network_args *args);

/* CONVGEN_OK where this CPU can run the library, else CONVGEN_UNSUPPORTED_CPU. */
int ${name}_check_cpu(void);

/* Threads for ${name}_run(), the calling one included. */
int ${name}_pool_create(int threads, convgen_pool **pool);

/* A pool without threads of its own: calls on it are split into `threads` parts, which a loop of the program's runs. Any
 * number of calls may use it at once. */
int ${name}_pool_borrow(int threads, convgen_parallel_for loop, void *context, convgen_pool **pool);

void ${name}_pool_destroy(convgen_pool *pool);

/* What this library is, and what a status means. */
const char *${name}_version(void);
const char *${name}_error(int status);

#ifdef __cplusplus
}
#endif

#endif
