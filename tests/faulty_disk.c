/* A disk that fails, or a process that is killed, at the n-th change below one folder. Preloaded; see test_crash.py. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ONCE, FOR_GOOD, KILLED };

int fault_at, fault_count, fault_mode; /* 0: nothing fails; changes so far; one of the three above */
char fault_folder[4096];

/* path: NULL where `dir` is the open file itself. */
static int is_inside(int dir, const char *path)
{
    char link[64], place[4096] = "";
    if (!path || (path[0] != '/' && dir != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        if (readlink(link, place, sizeof place - 1) < 0)
            return 0;
        path = place;
    }
    size_t length = strlen(fault_folder);
    return !strncmp(path, fault_folder, length) && (path[length] == '/' || !path[length]);
}

static int fails(int changes, int dir, const char *path)
{
    int before = errno;
    if (!fault_at || !is_inside(dir, path)) {
        errno = before;
        return 0;
    }
    errno = before;
    int count = changes ? __sync_add_and_fetch(&fault_count, 1) : fault_count;
    if (count < fault_at || ((count > fault_at || !changes) && fault_mode != FOR_GOOD))
        return 0;
    if (fault_mode == KILLED)
        kill(getpid(), SIGKILL);
    errno = EIO;
    return 1;
}

#define CALL(type, name, parameters, arguments, changes, dir, path)  \
    type name parameters                                             \
    {                                                                \
        type(*real) parameters = dlsym(RTLD_NEXT, #name);            \
        return fails(changes, dir, path) ? (type)-1 : real arguments; \
    }

CALL(ssize_t, write, (int fd, const void *bytes, size_t count), (fd, bytes, count), 1, fd, NULL)
CALL(ssize_t, sendfile64, (int out, int in, off64_t *offset, size_t count), (out, in, offset, count), 1, out, NULL)
CALL(int, ftruncate64, (int fd, off64_t length), (fd, length), 1, fd, NULL)
CALL(int, truncate64, (const char *path, off64_t length), (path, length), 1, AT_FDCWD, path)
CALL(int, fsync, (int fd), (fd), 1, fd, NULL)
CALL(int, flock, (int fd, int how), (fd, how), 1, fd, NULL)
CALL(int, rename, (const char *from, const char *to), (from, to), 1, AT_FDCWD, from)
CALL(int, unlink, (const char *path), (path), 1, AT_FDCWD, path)
CALL(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), 1, dir, path)
CALL(int, rmdir, (const char *path), (path), 1, AT_FDCWD, path)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), 1, AT_FDCWD, path)
CALL(int, chmod, (const char *path, mode_t mode), (path, mode), 1, AT_FDCWD, path)
CALL(int, stat64, (const char *path, struct stat64 *found), (path, found), 0, AT_FDCWD, path)
CALL(int, lstat64, (const char *path, struct stat64 *found), (path, found), 0, AT_FDCWD, path)
CALL(int, fstat64, (int fd, struct stat64 *found), (fd, found), 0, fd, NULL)
CALL(int, fstatat64, (int dir, const char *path, struct stat64 *found, int flags), (dir, path, found, flags), 0, dir,
     path)
CALL(ssize_t, read, (int fd, void *bytes, size_t count), (fd, bytes, count), 0, fd, NULL)

DIR *opendir(const char *path)
{
    DIR *(*real)(const char *) = dlsym(RTLD_NEXT, "opendir");
    return fails(0, AT_FDCWD, path) ? NULL : real(path);
}

int open64(const char *path, int flags, ...)
{
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return fails((flags & (O_CREAT | O_TRUNC)) != 0, AT_FDCWD, path) ? -1 : real(path, flags, mode);
}

int close(int fd)
{
    int (*real)(int) = dlsym(RTLD_NEXT, "close");
    int is_lost = fails(0, fd, NULL);
    int result = real(fd);
    if (!is_lost)
        return result;
    errno = EIO;
    return -1;
}
