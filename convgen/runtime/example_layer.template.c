static const long OUTPUTS = $outputs;

/* One output, *place its element of dst. *magnitude becomes the sum of absolute values, which rounding errors grow with. */
static double reference(long i, size_t *place, double *magnitude)
{
    const long pixels = out_size[0] * out_size[1] * out_size[2], n = i / pixels / OC, oc = i / pixels % OC;
    const long out[3] = {i % pixels / out_size[2] / out_size[1], i / out_size[2] % out_size[1], i % out_size[2]};
    *place = offset(n, OC, OC_BLOCK, oc, out_size, out);
    double sum = 0, absolute = 0;
    for (long c = 0; c < IC_GROUP; ++c)
        for (long d = 0; d < kernel[0]; ++d)
            for (long h = 0; h < kernel[1]; ++h)
                for (long w = 0; w < kernel[2]; ++w) {
                    const long tap[3] = {d, h, w}, ic = oc / OC_GROUP * IC_GROUP + c;
                    long in[3];
                    int inside = 1;
                    for (int axis = 0; axis < 3; ++axis) {
$position
                        inside = inside && in[axis] >= 0 && in[axis] < in_size[axis];
                    }
                    if (!inside)
                        continue;
                    const long weight = $weight;
                    const double x = value(src[offset(n, IC, IC_BLOCK, ic, in_size, in)])$src_zero;
                    const double y = value(weights[((weight * kernel[0] + $tap_d) * kernel[1] + $tap_h) * kernel[2] + $tap_w])$weights_zero;
                    const double product = x * y;
                    sum += product;
                    absolute += fabs(product);
                }
$epilogue    *magnitude = absolute;
    return activation(sum, oc);
}
