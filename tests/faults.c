/* A disk that fails: LD_PRELOAD puts these calls before those of the C library, so that Python, HDF5
   and Rust meet them alike. `faults_arm` is called through ctypes in the process that shall fail.

   Calls that write below a folder, logs aside, are counted. The one with the number `at`, and all
   after it, answer with an errno; or it sends the process a signal, and goes on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static long at, *counter;
static int answer, without_locks;

void faults_arm(const char *folder, long number, int what, int no_locks, const char *counted) {
  int fd = open(counted, O_RDWR);
  long *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  at = number, answer = what, without_locks = no_locks;
  strncpy(below, folder, sizeof below - 1);
  counter = shared == MAP_FAILED ? NULL : shared;
}

static int fails(const char *path) {
  if (!counter || strncmp(path, below, strlen(below)) || strstr(path, "/logs/")) return 0;
  long number = __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST);
  if (!at || number < at || (answer < 0 && number > at)) return 0;
  if (answer < 0) {
    kill(getpid(), -answer);
    return 0;
  }
  errno = answer;
  return 1;
}

static int fd_fails(int fd) {
  char link[64], path[PATH_MAX];
  if (!counter) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FD(type, name, parameters, arguments) \
  type name parameters { return fd_fails(fd) ? -1 : REAL(name) arguments; }

ON_FD(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(int, ftruncate, (int fd, off_t n), (fd, n))
ON_FD(int, ftruncate64, (int fd, off64_t n), (fd, n))
ON_FD(int, fsync, (int fd), (fd))
ON_FD(int, fdatasync, (int fd), (fd))

extern ssize_t sendfile(int, int, off_t *, size_t);
extern ssize_t sendfile64(int, int, off64_t *, size_t);
ON_FD(ssize_t, sendfile, (int fd, int in, off_t *o, size_t n), (fd, in, o, n))
ON_FD(ssize_t, sendfile64, (int fd, int in, off64_t *o, size_t n), (fd, in, o, n))

int posix_fallocate(int fd, off_t o, off_t n) {
  return fd_fails(fd) ? errno : REAL(posix_fallocate)(fd, o, n);
}
int posix_fallocate64(int fd, off64_t o, off64_t n) {
  return fd_fails(fd) ? errno : REAL(posix_fallocate64)(fd, o, n);
}
int rename(const char *from, const char *to) { return fails(to) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) {
  static int (*real)(const char *, mode_t);
  if (!real) real = dlsym(RTLD_NEXT, "mkdir");
  return fails(path) ? -1 : real(path, mode);
}
int flock(int fd, int operation) {
  if (!without_locks) return REAL(flock)(fd, operation);
  errno = ENOLCK;
  return -1;
}

#define OPEN(name)                                     \
  int name(const char *path, int flags, ...) {         \
    va_list more;                                      \
    va_start(more, flags);                             \
    mode_t mode = va_arg(more, mode_t);                \
    va_end(more);                                      \
    if (flags & O_CREAT && fails(path)) return -1;     \
    return REAL(name)(path, flags, mode);              \
  }
OPEN(open)
OPEN(open64)
