// Loaded before `upcycle` (LD_PRELOAD) by the tests of the batch scripts, so that a tiny training lasts long enough for Slurm to act on it
// and a tiny checkpoint long enough to be hit, on fast machines as on slow ones. Nothing that is computed or written changes.
//
//   SLOW_STEPS=MS    every wait for messages takes so many milliseconds more; a step has some 57 of them on 8 ranks, a save few
//   SLOW_WRITES=MS   every write of tensors takes so many milliseconds more
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>

static void wait_for(const char* name) {
  const char* value = getenv(name);
  const long milliseconds = value ? atol(value) : 0;
  if (milliseconds <= 0) return;
  const struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  nanosleep(&time, 0);
}

int MPI_Waitall(int count, void* requests, void* statuses) {
  static int (*real)(int, void*, void*);
  if (!real) real = (int (*)(int, void*, void*))dlsym(RTLD_NEXT, "MPI_Waitall");
  wait_for("SLOW_STEPS");
  return real(count, requests, statuses);
}

ssize_t pwrite(int file, const void* bytes, size_t size, off_t at) {
  static ssize_t (*real)(int, const void*, size_t, off_t);
  if (!real) real = (ssize_t (*)(int, const void*, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
  wait_for("SLOW_WRITES");
  return real(file, bytes, size, at);
}

ssize_t pwrite64(int file, const void* bytes, size_t size, off_t at) { return pwrite(file, bytes, size, at); }
