/* Preloaded into a process: kills it at its n-th change below a folder.

   A change is a write, of which half is done; or a flush, a rename, a removal, a truncation or a
   new folder, before it is done. `arm` begins to count. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static atomic_long left;

void arm(const char *place, long changes) {
    snprintf(folder, sizeof folder, "%s/", place);
    left = changes;
}

static int below(const char *path) { return strncmp(path, folder, strlen(folder)) == 0; }

static int of_file(int file) {
    char name[64], path[4096];
    if (left <= 0) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t size = readlink(name, path, sizeof path - 2);
    if (size < 0) return 0;
    path[size] = '/', path[size + 1] = 0; /* a folder that is flushed may be the folder itself */
    return below(path);
}

static int of_path(int at, const char *path) { return path[0] == '/' ? below(path) : of_file(at); }

static int due(int ours) { return ours && atomic_fetch_sub(&left, 1) == 1; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
/* `parameters` of a function, the `arguments` to pass on, whether they are `ours`, and what is
   done of it before the end */
#define KILLS(type, name, parameters, arguments, ours, half) \
    type name parameters {                                   \
        if (due(ours)) {                                     \
            half;                                            \
            die();                                           \
        }                                                    \
        return REAL(name) arguments;                         \
    }

#define WRITE (int file, const void *data, size_t size)
#define PLACED (int file, const void *data, size_t size, off_t at)
KILLS(ssize_t, write, WRITE, (file, data, size), of_file(file), REAL(write)(file, data, size / 2))
KILLS(ssize_t, pwrite, PLACED, (file, data, size, at), of_file(file),
      REAL(pwrite)(file, data, size / 2, at))
KILLS(ssize_t, pwrite64, PLACED, (file, data, size, at), of_file(file),
      REAL(pwrite64)(file, data, size / 2, at))
KILLS(ssize_t, sendfile, (int out, int in, off_t *at, size_t size), (out, in, at, size),
      of_file(out), REAL(sendfile)(out, in, at, size / 2))
KILLS(ssize_t, sendfile64, (int out, int in, off_t *at, size_t size), (out, in, at, size),
      of_file(out), REAL(sendfile64)(out, in, at, size / 2))
KILLS(int, fsync, (int file), (file), of_file(file), )
KILLS(int, fdatasync, (int file), (file), of_file(file), )
KILLS(int, ftruncate, (int file, off_t size), (file, size), of_file(file), )
KILLS(int, ftruncate64, (int file, off_t size), (file, size), of_file(file), )
KILLS(int, rename, (const char *from, const char *to), (from, to), of_path(-1, to), )
KILLS(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to),
      of_path(b, to), )
KILLS(int, mkdir, (const char *path, mode_t mode), (path, mode), of_path(-1, path), )
KILLS(int, unlink, (const char *path), (path), of_path(-1, path), )
KILLS(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), of_path(at, path), )
KILLS(int, rmdir, (const char *path), (path), of_path(-1, path), )
