/* $name: $descriptor
 *
 * $meaning
 *
$tensors
 *
 * Runs on NVIDIA GPUs: $devices.
 * Needs the CUDA driver (libcuda.so.1, opened when it is first needed; the environment variable
 * CONVGEN_CUDA_DRIVER may name another) and nothing else of CUDA.
 * Made by convgen; example.c beside this file shows every call.
 */
#ifndef CONVGEN_KERNEL_${name}_H
#define CONVGEN_KERNEL_${name}_H

$types

$cuda_types

/* Bytes and elements of every buffer, for those that are static. A workspace may be of 0 bytes, and C has no such arrays:
 * workspace[${name}_WORKSPACE_BYTES + 1], as more is welcome. */
$constants

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of every buffer. */
int ${name}_sizes(convgen_sizes *sizes);

/* Rearranges the weights for ${name}_run(), once. All pointers are to the CPU's memory, and neither a
 * driver nor a device is needed. The caller copies the packed buffer, whole, to device memory. */
int ${name}_pack(const convgen_pack_args *args);

/* The same without the checksum that ${name}_verify_packed() compares, which therefore refuses the buffer: for weights
 * that change from call to call, as in training, and are stored nowhere. */
int ${name}_repack(const convgen_pack_args *args);

/* Whether a packed buffer in the CPU's memory is this library's and unchanged to the last bit: for one
 * that was stored. ${name}_run() does not look into what device memory holds. */
int ${name}_verify_packed(const void *packed, size_t size);

/* Loads the code for the current context's device: all that is ever allocated, by the driver. Nothing
 * happens where it is loaded. Any number of threads may call at once. */
int ${name}_load(void);

/* Puts the computation of dst on a stream of the current context, and returns. Allocates nothing and
 * waits for nothing, but for the first run in a context where ${name}_load() was not called. Failures
 * on the device show where the stream is waited for.
 * Buffers must not overlap dst or workspace. Any number of threads may call at once, with the same
 * workspace for calls that follow each other on one stream, else each with its own. */
int ${name}_run(const convgen_cuda_run_args *args);

/* Undoes ${name}_load() for the current context, when all runs in it are done. Called before a context
 * is destroyed; what is not unloaded lasts as long as its context. */
int ${name}_unload(void);

/* The driver's own name of the last error it reported to this library on this thread. */
const char *${name}_driver_error(void);

$end
