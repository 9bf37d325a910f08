/* Shows how the library is called: runs the network on the input that lies beside this file, and compares.
 *
 *     cc -std=c11 -O2 example.c -L. -l$name $libraries -Wl,-rpath,. -o example && ./example
 *
 * or, with the library in the program:
 *
 *     cc -std=c11 -O2 example.c lib$name.a $libraries -o example && ./example
 *
 * The file of the weights may lie elsewhere: ./example PATH
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "$name.h"

enum { INPUTS = $inputs, OUTPUTS = $outputs, SIZES = $sizes };

/* How far outputs may be from the expected ones, as a fraction of the largest: 0 where these are this library's own. */
static const double tolerance = $tolerance;

$helpers

/* What a file beside this one holds. */
static void *contents(const char *path, size_t size)
{
    FILE *file = fopen(path, "rb");
    void *data = buffer(size);
    if (file == NULL || fread(data, 1, size, file) != size) {
        fprintf(stderr, "%s: cannot be read\n", path);
        exit(1);
    }
    fclose(file);
    return data;
}

/* The numbers in a file such as example.input0$label. */
static void *numbers(const char *kind, int number, const char *label, size_t size)
{
    char path[300];
    snprintf(path, sizeof path, "example.%s%d%s%s", kind, number, *label ? "." : "", label);
    return contents(path, size);
}

/* A number that is stored as one of the types of convgen_value; returns what follows it. */
static const char *next(const char *at, const char *dtype, double *number)
{
    float single;
    int32_t whole;
    int64_t longer;
    uint16_t half;
    if (strcmp(dtype, "f32") == 0) {
        memcpy(&single, at, sizeof single);
        *number = single;
        return at + sizeof single;
    }
    if (strcmp(dtype, "i32") == 0) {
        memcpy(&whole, at, sizeof whole);
        *number = whole;
        return at + sizeof whole;
    }
    if (strcmp(dtype, "i64") == 0) {
        memcpy(&longer, at, sizeof longer);
        *number = (double)longer;
        return at + sizeof longer;
    }
    if (strstr(dtype, "16") == NULL) {
        *number = strcmp(dtype, "i8") == 0 ? (double)(signed char)*at : (double)(unsigned char)*at;
        return at + 1;
    }
    memcpy(&half, at, sizeof half);
    const int digits = dtype[0] == 'b' ? 7 : 10; /* of the fraction */
    const int largest = (1 << (15 - digits)) - 1, exponent = half >> digits & largest;
    const double fraction = half & ((1 << digits) - 1), sign = half >> 15 ? -1 : 1;
    if (exponent == largest)
        *number = fraction != 0 ? NAN : sign * INFINITY;
    else
        *number = sign * ldexp(fraction + (exponent != 0 ? 1 << digits : 0),
                               (exponent != 0 ? exponent : 1) - largest / 2 - digits);
    return at + sizeof half;
}

/* Whether outputs are as expected. */
static int as_expected(const char *found, const char *expected, const convgen_value *value)
{
    if (memcmp(found, expected, value->bytes) == 0)
        return 1;
    double largest = 0, error = 0;
    for (const char *end = found + value->bytes; found < end;) {
        double one, other;
        found = next(found, value->dtype, &one);
        expected = next(expected, value->dtype, &other);
        const double apart = fabs(one - other);
        if (!(apart <= error) && !(isnan(one) && isnan(other)))
            error = apart;
        largest = fmax(largest, fabs(other));
    }
    return error <= tolerance * largest && tolerance > 0;
}

$calls

/* Runs the network at one of its sizes, whose files are labelled so. */
static void check(int size, const char *label)
{
    const void *inputs[INPUTS + 1];
    size_t input_sizes[INPUTS + 1], output_sizes[OUTPUTS];
    void *outputs[OUTPUTS];
    void *expected[OUTPUTS];
    for (int i = 0; i < INPUTS; ++i) {
        input_sizes[i] = ${name}_inputs(size)[i].bytes;
        inputs[i] = numbers("input", i, label, input_sizes[i]);
    }
    for (int i = 0; i < OUTPUTS; ++i) {
        output_sizes[i] = ${name}_outputs(size)[i].bytes;
        outputs[i] = buffer(output_sizes[i]);
        expected[i] = numbers("output", i, label, output_sizes[i]);
    }

    for (int run = 1; run <= RUNS; ++run) {
        for (int i = 0; i < OUTPUTS; ++i)
            memset(outputs[i], 0xff, output_sizes[i]); /* NaN: what is not written shows */
        compute(run, size, inputs, input_sizes, outputs, output_sizes);
        for (int i = 0; i < OUTPUTS; ++i)
            if (!as_expected(outputs[i], expected[i], &${name}_outputs(size)[i])) {
                fprintf(stderr, "size %d, output %d, run %d: other numbers than expected\n", size, i, run);
                exit(1);
            }
    }

    for (int i = 0; i < OUTPUTS; ++i) {
        free(outputs[i]);
        free(expected[i]);
    }
    for (int i = 0; i < INPUTS; ++i)
        free((void *)inputs[i]);
}

int main(int count, char **arguments)
{
    open_network(count > 1 ? arguments[1] : "$name.weights");
    static const char *const labels[SIZES] = {$labels};
    for (int size = 0; size < SIZES; ++size)
        check(size, labels[size]);
    printf("$name: %d outputs as expected; ok\n", OUTPUTS * SIZES);
    close_network();
    return 0;
}
