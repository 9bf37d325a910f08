static void must(const char *what, int status)
{
    if (status != CONVGEN_OK) {
        fprintf(stderr, "%s: %s\n", what, ${name}_error(status));
        exit(1);
    }
}

static void *buffer(size_t size)
{
    void *memory = aligned_alloc(CONVGEN_ALIGNMENT, (size / CONVGEN_ALIGNMENT + 1) * CONVGEN_ALIGNMENT);
    if (memory == NULL) {
        fprintf(stderr, "out of memory (%zu bytes)\n", size);
        exit(1);
    }
    return memory;
}
