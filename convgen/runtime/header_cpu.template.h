/* CONVGEN_OK where this CPU can run the library, else CONVGEN_UNSUPPORTED_CPU. */
int ${name}_check_cpu(void);

/* Threads for ${name}_run(), the calling one included. */
int ${name}_pool_create(int threads, convgen_pool **pool);

/* A pool without threads of its own: calls on it are split into `threads` parts, which a loop of the program's runs. Any
 * number of calls may use it at once. */
int ${name}_pool_borrow(int threads, convgen_parallel_for loop, void *context, convgen_pool **pool);

void ${name}_pool_destroy(convgen_pool *pool);
