// For LD_PRELOAD: tells of the calls that make files durable, and hurts one of them. Only files below $FILE_CALLS_UNDER count. What the C
// library calls inside itself (fopen) is not seen.
//
// $FILE_CALLS_TRACE: a file that gets a line, tab-separated, at the begin and at the end of each call of any rank, in the order in which they
// happened (a line is one write to a file opened for appending):
//   B  rank  thread  kind  path  number    number: bytes of a write, the new path of a rename, else 0
//   E  rank  thread  kind  path  result    result: what was returned, or minus the errno
//   K  rank  thread  kind  path  WHAT      it kills itself
//   S  rank  thread  start  -  pid
// kinds: create (open with O_CREAT, mkdir), reserve (fallocate, ftruncate), write, fsync, rename, remove (unlink, rmdir)
//
// $FILE_CALLS_HURT: "RANK KIND N WHAT", the N-th call (from 1) of that kind on that rank, any rank if RANK is -1:
//   before, middle, after       SIGKILL for this rank; in the middle of a write half of its bytes are there, of others it is after
//   before-all, ...             SIGKILL for all ranks
//   short                       this write and every second one after it does half of its bytes
//   <number>                    this one and all later ones of its kind fail with that errno
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE, RESERVE, WRITE, FSYNC, RENAME, REMOVE, KINDS };
static const char* const kNames[KINDS] = {"create", "reserve", "write", "fsync", "rename", "remove"};

static const char* under;
static int trace = -1, rank, hurt_kind = -1, fail_with;
static long hurt_from, counts[KINDS];
static __thread long number;   // of this thread's call, among all of its kind
static char what[32];

static void tell(char phase, const char* name, const char* path, const char* rest) {
  char line[2 * PATH_MAX + 100];
  const int length = snprintf(line, sizeof line, "%c\t%d\t%ld\t%s\t%s\t%s\n", phase, rank, syscall(SYS_gettid), name, path, rest);
  if (trace >= 0) syscall(SYS_write, trace, line, (size_t)length);
}

/// Reads the environment; again after a fork that has changed it.
__attribute__((constructor)) void file_calls_start(void) {
  const char *own = getenv("OMPI_COMM_WORLD_RANK"), *file = getenv("FILE_CALLS_TRACE"), *hurt = getenv("FILE_CALLS_HURT");
  char kind[16], pid[24];
  int on = 0;
  under = getenv("FILE_CALLS_UNDER");
  rank = own ? atoi(own) : 0;
  if (file) trace = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  snprintf(pid, sizeof pid, "%d", (int)getpid());
  tell('S', "start", "-", pid);
  if (!hurt || sscanf(hurt, "%d %15s %ld %31s", &on, kind, &hurt_from, what) != 4 || (on != -1 && on != rank)) return;
  for (int i = 0; i < KINDS; ++i) {
    if (strcmp(kind, kNames[i]) == 0) hurt_kind = i;
  }
  fail_with = atoi(what);
}

/// The path behind a descriptor, 0 when it is none of ours.
static int path_of(int file, char* path) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
  return under && strncmp(path, under, strlen(under)) == 0;
}

static int ours(const char* path) { return under && path && strncmp(path, under, strlen(under)) == 0; }

/// Every rank has told its process in the trace.
static void kill_the_others(void) {
  char text[1 << 16];
  const int file = (int)syscall(SYS_openat, AT_FDCWD, getenv("FILE_CALLS_TRACE"), O_RDONLY);
  const ssize_t length = syscall(SYS_read, file, text, sizeof text - 1);
  text[length > 0 ? length : 0] = 0;
  for (char* line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
    int pid;
    if (sscanf(line, "S\t%*d\t%*d\tstart\t-\t%d", &pid) == 1 && pid != (int)getpid()) kill(pid, SIGKILL);
  }
}

static void die(enum kind kind, const char* path) {
  tell('K', kNames[kind], path, what);
  if (strstr(what, "-all")) kill_the_others();
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/// 1: the call is to be made, 0: it fails with errno, 2: half of it is to be made.
static int begin(enum kind kind, const char* path, const char* rest) {
  number = __atomic_add_fetch(&counts[kind], 1, __ATOMIC_SEQ_CST);
  tell('B', kNames[kind], path, rest);
  if ((int)kind != hurt_kind || number < hurt_from) return 1;
  if (fail_with) {
    errno = fail_with;
    return 0;
  }
  if (strcmp(what, "short") == 0) return (number - hurt_from) % 2 == 0 ? 2 : 1;
  if (number == hurt_from && strncmp(what, "before", 6) == 0) die(kind, path);
  return number == hurt_from && strncmp(what, "middle", 6) == 0 ? 2 : 1;
}

static long end(enum kind kind, const char* path, long result) {
  const int code = errno;
  char told[24];
  snprintf(told, sizeof told, "%ld", result < 0 ? -(long)code : result);
  tell('E', kNames[kind], path, told);
  const int dies = strncmp(what, "middle", 6) == 0 || strncmp(what, "after", 5) == 0;
  if ((int)kind == hurt_kind && dies && number == hurt_from) die(kind, path);
  errno = code;
  return result;
}

#define AROUND(kind, path, rest, call)                                     \
  do {                                                                     \
    const int goes = begin(kind, path, rest);                              \
    return (int)end(kind, path, goes ? (long)(call) : -1);                 \
  } while (0)

static int open_at(int directory, const char* path, int flags, mode_t mode) {
  if (!(flags & O_CREAT) || !ours(path)) return (int)syscall(SYS_openat, directory, path, flags, mode);
  AROUND(CREATE, path, "0", syscall(SYS_openat, directory, path, flags, mode));
}

#define OPEN(name, directory, ...)                                         \
  int name(__VA_ARGS__, ...) {                                             \
    mode_t mode = 0;                                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                                   \
      va_list rest;                                                        \
      va_start(rest, flags);                                               \
      mode = va_arg(rest, mode_t);                                         \
      va_end(rest);                                                        \
    }                                                                      \
    return open_at(directory, path, flags, mode);                          \
  }
OPEN(open, AT_FDCWD, const char* path, int flags)
OPEN(open64, AT_FDCWD, const char* path, int flags)
OPEN(openat, directory, int directory, const char* path, int flags)
OPEN(openat64, directory, int directory, const char* path, int flags)
int creat(const char* path, mode_t mode) { return open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char* path, mode_t mode) { return open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }

int mkdir(const char* path, mode_t mode) {
  if (!ours(path)) return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
  AROUND(CREATE, path, "0", syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}

/// `offset` < 0: at the descriptor's own.
static ssize_t write_vector(int file, const struct iovec* parts, int count, off_t offset) {
  char path[PATH_MAX], bytes[24];
  const int counts_here = path_of(file, path);
  size_t all = 0;
  for (int i = 0; i < count; ++i) all += parts[i].iov_len;
  int goes = 1;
  if (counts_here) {
    snprintf(bytes, sizeof bytes, "%zu", all);
    goes = begin(WRITE, path, bytes);
  }
  if (goes == 0) return end(WRITE, path, -1);
  struct iovec half[count > 0 ? count : 1];
  if (goes == 2 && all > 1) {
    size_t left = all / 2;
    if (fcntl(file, F_GETFL) & O_DIRECT) left = left / 4096 * 4096;   // as the kernel does it: whole blocks
    if (left == 0) left = all;
    int used = 0;
    for (; used < count && left > 0; ++used) {
      half[used] = parts[used];
      if (half[used].iov_len > left) half[used].iov_len = left;
      left -= half[used].iov_len;
    }
    parts = half;
    count = used;
  }
  const long result = offset < 0 ? syscall(SYS_writev, file, parts, count) : syscall(SYS_pwritev, file, parts, count, (long)offset, 0L);
  return counts_here ? end(WRITE, path, result) : result;
}

static ssize_t write_one(int file, const void* bytes, size_t count, off_t offset) {
  const struct iovec part = {(void*)bytes, count};
  return write_vector(file, &part, 1, offset);
}
ssize_t write(int file, const void* bytes, size_t count) { return write_one(file, bytes, count, -1); }
ssize_t pwrite(int file, const void* bytes, size_t count, off_t offset) { return write_one(file, bytes, count, offset); }
ssize_t pwrite64(int file, const void* bytes, size_t count, off_t offset) { return write_one(file, bytes, count, offset); }
ssize_t writev(int file, const struct iovec* parts, int count) { return write_vector(file, parts, count, -1); }
ssize_t pwritev(int file, const struct iovec* parts, int count, off_t offset) { return write_vector(file, parts, count, offset); }
ssize_t pwritev64(int file, const struct iovec* parts, int count, off_t offset) { return write_vector(file, parts, count, offset); }

static int sync_file(int file, long call) {
  char path[PATH_MAX];
  if (!path_of(file, path)) return (int)syscall(call, file);
  AROUND(FSYNC, path, "0", syscall(call, file));
}
int fsync(int file) { return sync_file(file, SYS_fsync); }
int fdatasync(int file) { return sync_file(file, SYS_fdatasync); }

static int rename_at(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) {
  if (!ours(from)) return (int)syscall(SYS_renameat2, from_directory, from, to_directory, to, flags);
  AROUND(RENAME, from, to, syscall(SYS_renameat2, from_directory, from, to_directory, to, flags));
}
int rename(const char* from, const char* to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_directory, const char* from, int to_directory, const char* to) { return rename_at(from_directory, from, to_directory, to, 0); }
int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) {
  return rename_at(from_directory, from, to_directory, to, flags);
}

static int remove_at(int directory, const char* path, int flags) {
  char whole[2 * PATH_MAX];
  if (directory == AT_FDCWD || path[0] == '/') {
    snprintf(whole, sizeof whole, "%s", path);
  } else {
    char folder[PATH_MAX];
    path_of(directory, folder);
    snprintf(whole, sizeof whole, "%s/%s", folder, path);
  }
  if (!ours(whole)) return (int)syscall(SYS_unlinkat, directory, path, flags);
  AROUND(REMOVE, whole, "0", syscall(SYS_unlinkat, directory, path, flags));
}
int unlink(const char* path) { return remove_at(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return remove_at(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int directory, const char* path, int flags) { return remove_at(directory, path, flags); }
int remove(const char* path) {
  const int result = remove_at(AT_FDCWD, path, 0);
  return result < 0 && (errno == EISDIR || errno == EPERM) ? remove_at(AT_FDCWD, path, AT_REMOVEDIR) : result;
}

static int reserve(int file, int mode, off_t offset, off_t length, int truncates) {
  char path[PATH_MAX];
  if (!path_of(file, path)) return (int)(truncates ? syscall(SYS_ftruncate, file, length) : syscall(SYS_fallocate, file, mode, offset, length));
  AROUND(RESERVE, path, "0", truncates ? syscall(SYS_ftruncate, file, length) : syscall(SYS_fallocate, file, mode, offset, length));
}
int fallocate(int file, int mode, off_t offset, off_t length) { return reserve(file, mode, offset, length, 0); }
int fallocate64(int file, int mode, off_t offset, off_t length) { return reserve(file, mode, offset, length, 0); }
int ftruncate(int file, off_t length) { return reserve(file, 0, 0, length, 1); }
int ftruncate64(int file, off_t length) { return reserve(file, 0, 0, length, 1); }
