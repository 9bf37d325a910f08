/* CONVGEN_OK where this CPU can run the library, else CONVGEN_UNSUPPORTED_CPU. */
int ${name}_check_cpu(void);

/* Threads for ${name}_run(), the calling one included. */
int ${name}_pool_create(int threads, convgen_pool **pool);
void ${name}_pool_destroy(convgen_pool *pool);
