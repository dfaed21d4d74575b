/* A pretend libcuda.so.1, to stage on a machine without a GPU what a real driver would answer.
 *
 *   PRETEND_DRIVER   the CUDA version that the driver supports: 12080 is 12.8
 *   PRETEND_INIT     the status of cuInit: 0, 100 no device, 803 driver mismatch, 999 unknown
 *
 * CuPy's CUDA runtime looks every entry point up by cuGetProcAddress. Those it needs in order to count devices are
 * here; all others answer 801, not supported, so nothing beyond the count can be staged.
 *
 *   gcc -shared -fPIC -o libcuda.so.1 pretend_cuda.c
 */

#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 801 };

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuDriverGetVersion(int *version) {
    *version = setting("PRETEND_DRIVER", 13000);
    return SUCCESS;
}

int cuInit(unsigned flags) { return setting("PRETEND_INIT", SUCCESS); }

int cuDeviceGetCount(int *count) {
    *count = 0;
    return SUCCESS;
}

int cuGetExportTable(const void **table, const void *id) {
    *table = 0;
    return NOT_SUPPORTED;
}

int cuGetErrorString(int status, const char **text) {
    *text = "pretended";
    return SUCCESS;
}

int cuGetErrorName(int status, const char **text) { return cuGetErrorString(status, text); }

static int not_supported(void) { return NOT_SUPPORTED; }

int cuGetProcAddress_v2(const char *name, void **entry, int version, unsigned long long flags, int *found) {
    if (!strcmp(name, "cuDriverGetVersion")) *entry = cuDriverGetVersion;
    else if (!strcmp(name, "cuInit")) *entry = cuInit;
    else if (!strcmp(name, "cuDeviceGetCount")) *entry = cuDeviceGetCount;
    else if (!strcmp(name, "cuGetExportTable")) *entry = cuGetExportTable;
    else if (!strncmp(name, "cuGetProcAddress", 16)) *entry = cuGetProcAddress_v2;
    else *entry = not_supported;
    if (found) *found = 0;
    return SUCCESS;
}

int cuGetProcAddress(const char *name, void **entry, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, entry, version, flags, 0);
}
