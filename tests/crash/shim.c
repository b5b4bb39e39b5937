/* Counts what a process does to files under one folder, and ends it, or fails, at the Nth operation.
 *
 * CRASH_UNDER   the folder
 * CRASH_AT      N, from 1; without it nothing happens
 * CRASH_HOW     kill    the process ends before the operation
 *               torn    a write is done by half, any other operation whole, then the process ends
 *               EIO     the operation fails, once
 *               ENOSPC  whatever takes room on the disk fails, from the Nth operation on
 *               short   a write is done by half and says so, once
 * CRASH_COUNT   a file that gets the number of operations at the end
 * CRASH_PLAIN   renameat2 fails as on file systems that cannot exchange
 *
 * The disk's own caches play no part when a process is killed: fsync counts, but is not waited for. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum how { NOTHING, KILL, TORN, FAIL, FULL, SHORT };
/* What an operation may do. */
enum kind { PLAIN, GROWS, WRITES };
/* What is to happen instead of it. */
enum verdict { GO, REFUSE, HALF };

static atomic_long count;
static long at;
static enum how how;
static const char *under;
static atomic_bool inside[1024];

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void start(void) {
    const char *named = getenv("CRASH_HOW");
    under = getenv("CRASH_UNDER");
    at = getenv("CRASH_AT") ? atol(getenv("CRASH_AT")) : 0;
    if (!named || !at) how = NOTHING;
    else if (!strcmp(named, "kill")) how = KILL;
    else if (!strcmp(named, "torn")) how = TORN;
    else if (!strcmp(named, "EIO")) how = FAIL;
    else if (!strcmp(named, "ENOSPC")) how = FULL;
    else if (!strcmp(named, "short")) how = SHORT;
    else abort();
}

__attribute__((destructor)) static void end(void) {
    const char *path = getenv("CRASH_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%ld", atomic_load(&count));
        fclose(file);
    }
}

static bool counts(int fd) { return fd >= 0 && fd < 1024 && inside[fd]; }

static bool counts_path(int folder, const char *path) {
    if (!under || !path) return false;
    if (path[0] != '/' && folder != AT_FDCWD) return counts(folder);
    return strncmp(path, under, strlen(under)) == 0;
}

static void end_process(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static enum verdict before(enum kind kind) {
    long n = atomic_fetch_add(&count, 1) + 1;
    if (how == KILL && n == at) end_process();
    if (how == FAIL && n == at) { errno = EIO; return REFUSE; }
    if (how == FULL && n >= at && kind != PLAIN) { errno = ENOSPC; return REFUSE; }
    if ((how == SHORT || how == TORN) && n == at && kind == WRITES) return HALF;
    return GO;
}

/* The result of an operation, where the process lives on. */
static long after(long result) {
    int saved = errno;
    if (how == TORN && atomic_load(&count) == at) end_process();
    errno = saved;
    return result;
}

static int opened(int fd) {
    if (fd >= 0 && fd < 1024) inside[fd] = true;
    return (int)after(fd);
}

#define OPEN(name, signature, call, folder) \
    int name signature { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        REAL(name); \
        if (!counts_path(folder, path)) { \
            int fd = real call; \
            if (fd >= 0 && fd < 1024) inside[fd] = false; \
            return fd; \
        } \
        if (before(flags & O_CREAT ? GROWS : PLAIN) == REFUSE) return -1; \
        return opened(real call); \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)

DIR *opendir(const char *path) {
    REAL(opendir);
    if (counts_path(AT_FDCWD, path) && before(PLAIN) == REFUSE) return NULL;
    return real(path);
}

#define TRANSFER(name, signature, whole, half, kind) \
    ssize_t name signature { \
        REAL(name); \
        if (!counts(fd)) return real whole; \
        switch (before(kind)) { \
        case REFUSE: return -1; \
        case HALF: return after(real half); \
        default: return after(real whole); \
        } \
    }
#define HALF_OF(size) ((size) / 2 ? (size) / 2 : (size))
TRANSFER(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, HALF_OF(size)), WRITES)
TRANSFER(pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place),
         (fd, data, HALF_OF(size), place), WRITES)
TRANSFER(pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place),
         (fd, data, HALF_OF(size), place), WRITES)
TRANSFER(writev, (int fd, const struct iovec *parts, int number), (fd, parts, number), (fd, parts, 1), WRITES)
TRANSFER(read, (int fd, void *data, size_t size), (fd, data, size), (fd, data, size), PLAIN)
TRANSFER(pread64, (int fd, void *data, size_t size, off64_t place), (fd, data, size, place), (fd, data, size, place), PLAIN)

TRANSFER(sendfile, (int fd, int in, off_t *from, size_t size), (fd, in, from, size), (fd, in, from, HALF_OF(size)), WRITES)
TRANSFER(sendfile64, (int fd, int in, off64_t *from, size_t size), (fd, in, from, size), (fd, in, from, HALF_OF(size)),
         WRITES)
TRANSFER(copy_file_range, (int in, off64_t *from, int fd, off64_t *to, size_t size, unsigned flags),
         (in, from, fd, to, size, flags), (in, from, fd, to, HALF_OF(size), flags), WRITES)

#define SYNC(name) \
    int name(int fd) { \
        REAL(name); \
        if (!counts(fd)) return real(fd); \
        return before(PLAIN) == REFUSE ? -1 : (int)after(0); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define OPERATION(name, signature, call, counted, kind) \
    int name signature { \
        REAL(name); \
        if (!(counted)) return real call; \
        return before(kind) == REFUSE ? -1 : (int)after(real call); \
    }
OPERATION(flock, (int fd, int how_long), (fd, how_long), counts(fd), PLAIN)
OPERATION(ftruncate, (int fd, off_t size), (fd, size), counts(fd), PLAIN)
OPERATION(ftruncate64, (int fd, off64_t size), (fd, size), counts(fd), PLAIN)
OPERATION(fallocate64, (int fd, int mode, off64_t place, off64_t size), (fd, mode, place, size), counts(fd), GROWS)
OPERATION(posix_fallocate64, (int fd, off64_t place, off64_t size), (fd, place, size), counts(fd), GROWS)
OPERATION(rename, (const char *from, const char *to), (from, to), counts_path(AT_FDCWD, to), PLAIN)
OPERATION(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), counts_path(b, to), PLAIN)
OPERATION(unlink, (const char *path), (path), counts_path(AT_FDCWD, path), PLAIN)
OPERATION(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), counts_path(folder, path), PLAIN)
OPERATION(rmdir, (const char *path), (path), counts_path(AT_FDCWD, path), PLAIN)
OPERATION(mkdir, (const char *path, mode_t mode), (path, mode), counts_path(AT_FDCWD, path), GROWS)
OPERATION(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), counts_path(folder, path), GROWS)
OPERATION(link, (const char *from, const char *to), (from, to), counts_path(AT_FDCWD, to), GROWS)
OPERATION(linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags),
          counts_path(b, to), GROWS)
OPERATION(symlink, (const char *from, const char *to), (from, to), counts_path(AT_FDCWD, to), GROWS)

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    if (!counts_path(b, to)) return real(a, from, b, to, flags);
    if (before(PLAIN) == REFUSE) return -1;
    if (getenv("CRASH_PLAIN")) { errno = EINVAL; return (int)after(-1); }
    return (int)after(real(a, from, b, to, flags));
}
