/*
 * A library for LD_PRELOAD that plays a slow, full or incomplete volume. tests/support/faults.py builds and controls it.
 *
 * FAULTS names a file of rules. It is read at each call, so that faults can begin and end while a program runs:
 *
 *     CALL MILLISECONDS ERRNO WRONG PATTERN
 *
 * The first rule for the call whose pattern (fnmatch) matches the path applies. The call waits so long (-1: until the
 * rule is gone), then fails with ERRNO if that is not 0. With WRONG = 1 it succeeds, but stat reports an inode that no
 * other call reports, and statvfs reports no free space. A file descriptor is matched by what /proc/self/fd shows, and
 * by fd:NUMBER. A call that waits adds the line "+ PID CALL PATH" to the file FAULTS.log, and "- PID CALL PATH" when
 * its wait is over. Signals do not end a wait: a process in such a call is as deaf as one in an uninterruptible wait.
 * A process whose command line contains the text FAULTS_SPARE has no faults.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define POLL_MS 5
#define RULES_BYTES 8192

struct rule {
    long wait_ms;
    int number;
    int wrong;
};

/* Call the next library's function of this name. */
#define REAL(result, name, ...) ((result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

static int spared(void) {
    static int answer = -1;
    char line[4096], *spare = getenv("FAULTS_SPARE");
    if (answer >= 0) return answer;
    int file = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    long size = file < 0 ? 0 : syscall(SYS_read, file, line, sizeof line);
    if (file >= 0) syscall(SYS_close, file);
    return answer = size > 0 && spare && *spare && memmem(line, (size_t)size, spare, strlen(spare));
}

static const char *control(void) {
    const char *path = getenv("FAULTS");
    return path && *path && !spared() ? path : NULL;
}

static void describe(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
}

/* Find the rule for a call. Of a call for a descriptor, path is empty at first. */
static int find(const char *call, char *path, int fd, struct rule *found) {
    char text[RULES_BYTES], name[32], pattern[PATH_MAX], number[32], *rest, *line;
    const char *file = control();
    if (!file) return 0;
    int rules = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC);
    if (rules < 0) return 0;
    long size = syscall(SYS_read, rules, text, sizeof text - 1);
    syscall(SYS_close, rules);
    if (size <= 0) return 0;
    text[size] = 0;
    snprintf(number, sizeof number, "fd:%d", fd);
    for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (sscanf(line, "%31s %ld %d %d %4095[^\n]", name, &found->wait_ms, &found->number, &found->wrong, pattern) != 5) continue;
        if (strcmp(name, call)) continue;
        if (fd >= 0 && !*path) describe(fd, path);
        if (!fnmatch(pattern, path, 0) || (fd >= 0 && !fnmatch(pattern, number, 0))) return 1;
    }
    return 0;
}

static void note(char sign, const char *call, const char *path) {
    char file[PATH_MAX], line[PATH_MAX + 64];
    snprintf(file, sizeof file, "%s.log", control());
    int size = snprintf(line, sizeof line, "%c %d %s %s\n", sign, (int)getpid(), call, path);
    int log = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log < 0) return;
    syscall(SYS_write, log, line, size);
    syscall(SYS_close, log);
}

/* Wait and fail as the rules say. Returns the errno of the call: 0 if it must be done. */
static int meet(const char *call, const char *given, int fd, int *wrong) {
    char path[PATH_MAX] = "";
    struct rule rule;
    struct timespec pause = {0, POLL_MS * 1000000L};
    int before = errno;
    long waited = 0;
    if (given) snprintf(path, sizeof path, "%s", given);
    int applies = find(call, path, fd, &rule);
    if (applies && rule.wait_ms) {
        struct rule first = rule;
        note('+', call, path);
        while (applies && (rule.wait_ms < 0 || waited < rule.wait_ms)) {
            syscall(SYS_nanosleep, &pause, NULL);
            waited += POLL_MS;
            applies = find(call, path, fd, &rule);
        }
        note('-', call, path);
        rule = first;
        applies = 1;
    }
    errno = before;
    if (wrong) *wrong = applies && rule.wrong;
    return applies ? rule.number : 0;
}

#define FAIL_AS(call, path, fd)                  \
    int failure = meet(call, path, fd, NULL);    \
    if (failure) {                               \
        errno = failure;                         \
        return -1;                               \
    }

/* Open */

static int opened(const char *name, int folder, const char *path, int flags, mode_t mode) {
    FAIL_AS("open", path, -1)
    return REAL(int, name, int, const char *, int, ...)(folder, path, flags, mode);
}
#define MODE                                                              \
    mode_t mode = 0;                                                      \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                \
        va_list list;                                                     \
        va_start(list, flags);                                            \
        mode = (mode_t)va_arg(list, int);                                 \
        va_end(list);                                                     \
    }
int open(const char *path, int flags, ...) { MODE return opened("openat", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened("openat", AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened("openat", folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened("openat", folder, path, flags | O_LARGEFILE, mode); }
DIR *opendir(const char *path) {
    int failure = meet("open", path, -1, NULL);
    errno = failure ? failure : errno;
    return failure ? NULL : REAL(DIR *, "opendir", const char *)(path);
}

/* Read and write */

ssize_t read(int fd, void *data, size_t size) { FAIL_AS("read", NULL, fd) return REAL(ssize_t, "read", int, void *, size_t)(fd, data, size); }
ssize_t write(int fd, const void *data, size_t size) { FAIL_AS("write", NULL, fd) return REAL(ssize_t, "write", int, const void *, size_t)(fd, data, size); }
ssize_t writev(int fd, const struct iovec *parts, int many) { FAIL_AS("write", NULL, fd) return REAL(ssize_t, "writev", int, const struct iovec *, int)(fd, parts, many); }
#define PWRITE(name, offset) \
    ssize_t name(int fd, const void *data, size_t size, offset at) { FAIL_AS("write", NULL, fd) return REAL(ssize_t, #name, int, const void *, size_t, offset)(fd, data, size, at); }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, long)

/* Look */

static unsigned long other_inode(void) {
    static unsigned long made;
    return 1000000007UL * ++made;
}
#define LOOK(call, path, fd, real)               \
    int wrong;                                   \
    int failure = meet(call, path, fd, &wrong);  \
    if (failure) {                               \
        errno = failure;                         \
        return -1;                               \
    }                                            \
    int result = real;                           \
    if (!result && wrong) about->st_ino = other_inode(); \
    return result;
#define STATS(name, type)                                                                                                           \
    int name(const char *path, struct type *about) { LOOK("stat", path, -1, REAL(int, #name, const char *, void *)(path, about)) }  \
    int l##name(const char *path, struct type *about) { LOOK("stat", path, -1, REAL(int, "l" #name, const char *, void *)(path, about)) } \
    int f##name(int fd, struct type *about) { LOOK("fstat", NULL, fd, REAL(int, "f" #name, int, void *)(fd, about)) }
#define STATS_AT(name, type)                                                                                                        \
    int name(int folder, const char *path, struct type *about, int flags) { LOOK("stat", path, -1, REAL(int, #name, int, const char *, void *, int)(folder, path, about, flags)) }
STATS(stat, stat)
STATS(stat64, stat64)
STATS_AT(fstatat, stat)
STATS_AT(fstatat64, stat64)

#define SPACE(path, fd, real)                        \
    int wrong;                                       \
    int failure = meet("statvfs", path, fd, &wrong); \
    if (failure) {                                   \
        errno = failure;                             \
        return -1;                                   \
    }                                                \
    int result = real;                               \
    if (!result && wrong) about->f_blocks = about->f_bfree = about->f_bavail = 0; \
    return result;
#define SPACES(name)                                                                                                                \
    int name(const char *path, struct name *about) { SPACE(path, -1, REAL(int, #name, const char *, void *)(path, about)) }        \
    int f##name(int fd, struct name *about) { SPACE(NULL, fd, REAL(int, "f" #name, int, void *)(fd, about)) }
SPACES(statvfs)
SPACES(statvfs64)

/* Make durable, lock, rename, remove */

int fsync(int fd) { FAIL_AS("fsync", NULL, fd) return REAL(int, "fsync", int)(fd); }
int fdatasync(int fd) { FAIL_AS("fsync", NULL, fd) return REAL(int, "fdatasync", int)(fd); }
int flock(int fd, int operation) { FAIL_AS("flock", NULL, fd) return REAL(int, "flock", int, int)(fd, operation); }
static int controlled(int fd, int command, void *argument) {
    if (command == F_SETLK || command == F_SETLKW) { FAIL_AS("fcntl", NULL, fd) }
    return REAL(int, "fcntl", int, int, ...)(fd, command, argument);
}
#define ARGUMENT                            \
    va_list list;                           \
    va_start(list, command);                \
    void *argument = va_arg(list, void *);  \
    va_end(list);
int fcntl(int fd, int command, ...) { ARGUMENT return controlled(fd, command, argument); }
int fcntl64(int fd, int command, ...) { ARGUMENT return controlled(fd, command, argument); }
int rename(const char *from, const char *to) { FAIL_AS("rename", to, -1) return REAL(int, "rename", const char *, const char *)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { FAIL_AS("rename", to, -1) return REAL(int, "renameat", int, const char *, int, const char *)(a, from, b, to); }
int link(const char *from, const char *to) { FAIL_AS("link", to, -1) return REAL(int, "link", const char *, const char *)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { FAIL_AS("link", to, -1) return REAL(int, "linkat", int, const char *, int, const char *, int)(a, from, b, to, flags); }
int symlink(const char *to, const char *path) { FAIL_AS("symlink", path, -1) return REAL(int, "symlink", const char *, const char *)(to, path); }
int symlinkat(const char *to, int folder, const char *path) { FAIL_AS("symlink", path, -1) return REAL(int, "symlinkat", const char *, int, const char *)(to, folder, path); }
int unlink(const char *path) { FAIL_AS("unlink", path, -1) return REAL(int, "unlink", const char *)(path); }
int unlinkat(int folder, const char *path, int flags) { FAIL_AS("unlink", path, -1) return REAL(int, "unlinkat", int, const char *, int)(folder, path, flags); }
int mkdir(const char *path, mode_t mode) { FAIL_AS("mkdir", path, -1) return REAL(int, "mkdir", const char *, mode_t)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { FAIL_AS("mkdir", path, -1) return REAL(int, "mkdirat", int, const char *, mode_t)(folder, path, mode); }
int ftruncate(int fd, off_t size) { FAIL_AS("truncate", NULL, fd) return REAL(int, "ftruncate", int, off_t)(fd, size); }
int ftruncate64(int fd, off_t size) { FAIL_AS("truncate", NULL, fd) return REAL(int, "ftruncate64", int, off_t)(fd, size); }
