/* $name: a network.
 *
$values
 *   (dense, row-major, aligned to $tensor_alignment bytes)
 *   weights   $weights bytes, in $name.weights
 *
 * Runs on NVIDIA GPUs: $devices.
 * Needs the CUDA driver (libcuda.so.1, opened when it is first needed; the environment variable
 * CONVGEN_CUDA_DRIVER may name another) and nothing else of CUDA.
 * $made
 */
#ifndef CONVGEN_NETWORK_${name}_H
#define CONVGEN_NETWORK_${name}_H

$types

$cuda_types

$network_types

$network_cuda_types

$constants

#ifdef __cplusplus
extern "C" {
#endif

/* How many inputs and outputs there are, and bytes of the weights and of the workspace, at one of the sizes that the
 * network was made for: 0 where there is one. */
int ${name}_sizes(int size, convgen_network_sizes *sizes);

/* The inputs and outputs at a size, as many as ${name}_sizes() tells; NULL where there is no such size. */
const convgen_value *${name}_inputs(int size);
const convgen_value *${name}_outputs(int size);

/* The size at which the inputs have these shapes, an array for each; CONVGEN_DEVICE_NO_SUCH_SIZE where there is none. */
int ${name}_find_size(const int64_t *const *shapes, int *size);

/* Whether weights in the CPU's memory, aligned to $alignment bytes, are this library's and unchanged to the last bit. The
 * caller copies them, whole, to device memory; ${name}_run() does not look into what is there. */
int ${name}_verify_weights(const void *weights, size_t size);

/* Loads the code for the current context's device: all that is ever allocated, by the driver. Nothing happens where it
 * is loaded. Any number of threads may call at once. */
int ${name}_load(void);

/* Puts the computation of the outputs on a stream of the current context, and returns. Allocates nothing and waits for
 * nothing, but for the first run in a context where ${name}_load() was not called: after that it can be captured into a
 * CUDA graph. Failures on the device show where the stream is waited for.
 * Outputs must not overlap inputs, weights, workspace or each other. Any number of threads may call at once, with the
 * same workspace for calls that follow each other on one stream, else each with its own. */
int ${name}_run(const convgen_network_cuda_args *args);

/* Undoes ${name}_load() for the current context, when all runs in it are done. Called before a context is destroyed;
 * what is not unloaded lasts as long as its context. */
int ${name}_unload(void);

/* The driver's own name of the last error it reported to this library on this thread. */
const char *${name}_driver_error(void);

$end
