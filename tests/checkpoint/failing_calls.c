/* Preloaded by tests: system calls that fail as on other machines and full disks. Each is chosen by a variable:
 *
 *   FAIL_FLOCK=ERRNO              flock
 *   FAIL_DIRECTORY_FSYNC=ERRNO    fsync of a directory
 *   FULL=DIRECTORY:MARKER         once the file MARKER exists, writes to files below DIRECTORY find no room
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(const char *variable)
{
    const char *number = getenv(variable);
    if (number != NULL)
        errno = atoi(number);
    return number != NULL;
}

int flock(int fd, int operation)
{
    int (*real)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return fails("FAIL_FLOCK") ? -1 : real(fd, operation);
}

int fsync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    struct stat found;
    if (fstat(fd, &found) == 0 && S_ISDIR(found.st_mode) && fails("FAIL_DIRECTORY_FSYNC"))
        return -1;
    return real(fd);
}

ssize_t write(int fd, const void *content, size_t size)
{
    ssize_t (*real)(int, const void *, size_t) = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    const char *full = getenv("FULL"), *marker = full == NULL ? NULL : strchr(full, ':');
    char link[64], path[4096];
    if (marker != NULL && access(marker + 1, F_OK) == 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length > marker - full && strncmp(path, full, marker - full) == 0) {
            errno = ENOSPC;
            return -1;
        }
    }
    return real(fd, content, size);
}
