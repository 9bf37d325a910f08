/* For programs that check a library of another machine's: buffers between pages that may not be touched, and files. */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "$name.h"

/* The exit status where the emulated CPU lacks instructions. */
enum { UNSUPPORTED = 3 };

static void must(const char *what, int status)
{
    if (status != CONVGEN_OK) {
        fprintf(stderr, "%s: %s\n", what, ${name}_error(status));
        exit(status == CONVGEN_UNSUPPORTED_CPU ? UNSUPPORTED : 1);
    }
}

static void require(int condition, const char *what)
{
    if (!condition) {
        perror(what);
        exit(1);
    }
}

typedef struct {
    char *data; /* NULL where there is none */
    size_t size;
    char *pages; /* those that may be touched */
    size_t room;
} buffer;

/* `size` bytes between two pages that may not be touched, flush with the one at the end or at the start. */
static buffer guarded(size_t size, int at_end, int fill)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = size == 0 ? page : (size + page - 1) / page * page;
    char *whole = mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(whole != MAP_FAILED, "mmap");
    require(mprotect(whole + page, room, PROT_READ | PROT_WRITE) == 0, "mprotect");
    buffer b = {whole + page + (at_end ? room - size : 0), size, whole + page, room};
    memset(b.data, fill, size);
    return b;
}

static void seal(buffer b) { require(mprotect(b.pages, b.room, PROT_READ) == 0, "mprotect"); }

static void release(buffer b)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    munmap(b.pages - page, b.room + 2 * page);
}

/* A file's bytes, read-only. */
static buffer filled(const char *path, size_t size, int at_end)
{
    buffer b = guarded(size, at_end, 0);
    FILE *file = fopen(path, "rb");
    require(file != NULL && fread(b.data, 1, size, file) == size, path);
    fclose(file);
    seal(b);
    return b;
}

static void keep(const char *path, buffer b)
{
    FILE *file = fopen(path, "wb");
    require(file != NULL && fwrite(b.data, 1, b.size, file) == b.size && fclose(file) == 0, path);
}
