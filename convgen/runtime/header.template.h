/* $name: $descriptor
 *
 * $meaning
 *
$tensors
 *
 * $isa
 * Made by convgen; example.c beside this file shows every call.
 */
#ifndef CONVGEN_KERNEL_${name}_H
#define CONVGEN_KERNEL_${name}_H

$types

/* Bytes and elements of every buffer, for those that are static. A workspace may be of 0 bytes, and C has no such arrays:
 * workspace[${name}_WORKSPACE_BYTES(1) + 1], as more is welcome. */
$constants

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of every buffer, for calls on `threads` threads (1 for calls without a pool). */
int ${name}_sizes(int threads, convgen_sizes *sizes);

/* Rearranges the weights for ${name}_run(), once. The packed buffer stays the caller's. */
int ${name}_pack(const convgen_pack_args *args);

/* The same without the checksum that ${name}_verify_packed() compares, which therefore refuses the buffer: for weights
 * that change from call to call, as in training, and are stored nowhere. */
int ${name}_repack(const convgen_pack_args *args);

/* Computes dst. Buffers must not overlap dst or workspace. Any number of threads may call at once,
 * each with its own dst and workspace. Results do not depend on the number of threads. A call takes at
 * most $stack KiB of a thread's stack, of its own threads' and of a pool's; ${name}_pack(), too. */
int ${name}_run(const convgen_run_args *args);

/* Whether a packed buffer is this library's and unchanged to the last bit: for one that was stored.
 * ${name}_run() looks at its first 64 bytes only. */
int ${name}_verify_packed(const void *packed, size_t size);

$cpu

$end
