/* Shows how the library is called and checks it against plain loops.
 *
 *     cc -std=c11 -O2 example.c -L. -l$name $libraries -Wl,-rpath,. -o example && ./example
 *
 * or, with the library in the program:
 *
 *     cc -std=c11 -O2 example.c lib$name.a $libraries -o example && ./example
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "$name.h"

/* The layer: $descriptor
 * Spatial sizes have three axes here; of those a layer lacks the size is 1. */
enum { BATCH = $n, IC = $ic, OC = $oc, GROUPS = $groups, IC_GROUP = IC / GROUPS, OC_GROUP = OC / GROUPS };
/* How many channels are neighbours in memory, of src, and of dst and residual. */
enum { IC_BLOCK = $ic_block, OC_BLOCK = $oc_block };
static const long in_size[3] = {$in_size}, out_size[3] = {$out_size}, kernel[3] = {$kernel};
static const long stride[3] = {$stride}, padding[3] = {$padding}, dilation[3] = {$dilation};

/* Every STEP-th output is checked, so that this takes seconds at most. */
enum { STEP = $step };

$element

static element $globals;

/* ---- the layer in plain loops ---------------------------------------------------------------- */

/* Where element (n, channel, at) of a tensor lies whose channels are in blocks: [n][channel / block][at][channel % block].
 * A block of NCHW is one channel, of NHWC all of them. */
static size_t offset(long n, long channels, long block, long channel, const long size[3], const long at[3])
{
    const long pixel = (at[0] * size[1] + at[1]) * size[2] + at[2], pixels = size[0] * size[1] * size[2];
    return (size_t)(((n * (channels / block) + channel / block) * pixels + pixel) * block + channel % block);
}

static double activation(double x, long oc)
{
    (void)oc;
    return $activation;
}

$loops
/* ---- helpers ---------------------------------------------------------------------------------- */

$helpers

/* A tensor of small whole numbers, the same in every run, from low to high. */
static element *tensor(size_t size, int low, int high)
{
    static unsigned state = 1;
    element *values = buffer(size);
    for (size_t i = 0; i < size / sizeof(element); ++i) {
        state = state * 1664525u + 1013904223u;
        values[i] = stored((float)(low + (int)((state >> 16) % (unsigned)(high - low + 1))));
    }
    return values;
}

$compute
int main(void)
{
    /* How large everything is$sizes_note. */
    convgen_sizes sizes;
    must("sizes", ${name}_sizes($sizes_arguments));
    src = tensor(sizes.src, $src_values);
$weights$tensors    dst_element *dst = buffer(sizes.dst);
    compute(&sizes, dst);

    /* Against the plain loops, within what rounding can explain. */
    long checked = 0;
    double worst = 0;
    for (long i = OUTPUTS - 1; i >= 0; i -= STEP, ++checked) {
        double magnitude;
        size_t at;
        const double expected = reference(i, &at, &magnitude);
        const double found = value(dst[at]);
        const double allowed = $allowed;
        const double error = fabs(found - expected);
        if (!(error <= allowed)) {
            fprintf(stderr, "element %zu of dst: expected %.9g, found %.9g\n", at, expected, found);
            return 1;
        }
        if (error > 0 && error / allowed > worst)
            worst = error / allowed;
    }
    printf("$descriptor: %ld of %ld outputs checked, largest error %.2g of what is allowed; ok\n", checked,
           OUTPUTS, worst);

    free(dst);
$free    free(src);
    return 0;
}
