static const long OUTPUTS = $outputs;

/* One gradient, of a weight or, after them, of a bias: element i of dst. *magnitude becomes the sum of absolute values,
 * which rounding errors grow with. */
static double reference(long i, size_t *place, double *magnitude)
{
    const long taps = kernel[0] * kernel[1] * kernel[2], weights = OC * IC_GROUP * taps;
    const long tap[3] = {i % taps / kernel[2] / kernel[1], i / kernel[2] % kernel[1], i % kernel[2]};
    const long outer = i / taps / $inner, inner = i / taps % $inner;
    const long ic = $ic_of, oc = i < weights ? $oc_of : i - weights;
    const long *pixels = i < weights ? $pixels : out_size;
    double sum = 0, absolute = 0;
    *place = (size_t)i;
    for (long n = 0; n < BATCH; ++n)
        for (long d = 0; d < pixels[0]; ++d)
            for (long h = 0; h < pixels[1]; ++h)
                for (long w = 0; w < pixels[2]; ++w) {
                    const long near[3] = {d, h, w};
                    long far[3];
                    int inside = 1;
                    for (int axis = 0; axis < 3; ++axis) {
                        far[axis] = near[axis] * stride[axis] + tap[axis] * dilation[axis] - padding[axis];
                        inside = inside && far[axis] >= 0 && far[axis] < $far_size[axis];
                    }
                    double product;
                    if (i >= weights)
                        product = value(residual[offset(n, OC, OC_BLOCK, oc, out_size, near)]);
                    else if (inside)
                        product = value(src[offset(n, IC, IC_BLOCK, ic, in_size, $in)]) *
                                  value(residual[offset(n, OC, OC_BLOCK, oc, out_size, $out)]);
                    else
                        continue;
                    sum += product;
                    absolute += fabs(product);
                }
    *magnitude = absolute;
    return activation(sum, oc);
}
