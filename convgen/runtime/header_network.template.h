/* $name: a network.
 *
$values
 *   (dense, row-major)
 *   weights   $weights bytes, in $name.weights
 *
 * $isa
 * $made
 */
#ifndef CONVGEN_NETWORK_${name}_H
#define CONVGEN_NETWORK_${name}_H

$types

$network_types

$constants

#ifdef __cplusplus
extern "C" {
#endif

/* How many inputs and outputs there are, and bytes of the weights and of the workspace of calls on `threads` threads
 * (1 for calls without a pool), at one of the sizes that the network was made for: 0 where there is one. */
int ${name}_sizes(int size, int threads, convgen_network_sizes *sizes);

/* The inputs and outputs at a size, as many as ${name}_sizes() tells; NULL where there is no such size. */
const convgen_value *${name}_inputs(int size);
const convgen_value *${name}_outputs(int size);

/* The size at which the inputs have these shapes, an array for each; CONVGEN_NO_SUCH_SIZE where there is none. */
int ${name}_find_size(const int64_t *const *shapes, int *size);

/* A network with its weights, read from a file that is mapped and stays so, or from memory, aligned to $alignment bytes, that
 * stays the caller's: several networks may share it. Weights that are another library's, or damaged, are refused. All
 * sizes have the same weights. */
int ${name}_open(const char *path, convgen_network **network);
int ${name}_open_memory(const void *weights, size_t size, convgen_network **network);
void ${name}_close(convgen_network *network);

/* Computes the outputs. They must not overlap inputs, weights, workspace or each other. Any number of threads may run
 * one network at once, each with its own outputs and workspace. Results do not depend on the number of threads. A call
 * takes at most $stack KiB of a thread's stack, of its own threads' and of a pool's. */
int ${name}_run(const convgen_network *network, const convgen_network_args *args);

$cpu

$end
