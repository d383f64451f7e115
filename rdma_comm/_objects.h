/* The extension's objects: one structure each. A child holds its parents, so they live at least as long, and is counted by them: nothing
 * is closed under what hangs on it. Not every library refuses that: ibv_close_device(3) frees what its queues go on using.
 * What runs without the GIL marks what it uses, with the GIL; `close` refuses what is marked. */
#ifndef RDMA_COMM_OBJECTS_H
#define RDMA_COMM_OBJECTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_abi.h"

typedef struct {
    PyObject_HEAD
    struct abi_context *context; /* NULL when closed */
    int num_children;            /* protection domains and completion queues */
    char name[64];
} Device;

typedef struct {
    PyObject_HEAD
    Device *device;
    struct abi_pd *pd;
    int num_children; /* memory regions, also those that are being registered, and queue pairs */
} ProtectionDomain;

typedef struct {
    PyObject_HEAD
    ProtectionDomain *domain;
    struct abi_mr *mr;
    PyObject *owner; /* of the memory */
    uint64_t address; /* as peers and scatter lists name it: the memory's own, also where a dmabuf was registered */
    uint64_t length;
    int num_transfers; /* that use it */
} MemoryRegion;

typedef struct {
    PyObject_HEAD
    Device *device;
    struct abi_comp_channel *channel;
    struct abi_cq *cq;
    unsigned int num_unacknowledged;
    int is_armed;
    int num_children; /* queue pairs */
    int is_busy;      /* somebody polls it without the GIL */
} CompletionQueue;

typedef struct {
    PyObject_HEAD
    ProtectionDomain *domain;
    CompletionQueue *send_cq, *recv_cq;
    struct abi_qp *qp;
    uint32_t max_send_wr;
    int is_connected; /* has left the reset state */
    int is_busy;      /* somebody uses it without the GIL */
    int is_connecting, is_stopped; /* `connect` is under way; it has been told to end */
    char peer[128];
} QueuePair;

extern PyTypeObject DeviceType, ProtectionDomainType, MemoryRegionType, CompletionQueueType, QueuePairType;

/* Raise rdma_comm.errors.VerbsError / CompletionFailed. Return NULL. */
PyObject *raise_verbs(const char *verb, int error, const char *peer, const char *hint);
PyObject *raise_completion(const struct abi_wc *completion, const char *peer);
PyObject *raise_closed(const char *what);

/* Wait until the queue may hold completions; call it without the GIL. Returns 0, or -1 after timeout_s, or an errno. */
int wait_for_completions(CompletionQueue *queue, double timeout_s);

double monotonic_s(void);

/* Keep a queue pair to ourselves, and its send queue, until `release_pair`. Returns 0, or -1 with ValueError or RuntimeError set. */
int claim_pair(QueuePair *pair);
void release_pair(QueuePair *pair);

/* Move a queue pair to the error state: what is posted comes back flushed, what arrives is refused. */
int fail_queue_pair(QueuePair *pair);

/* Destroy a queue pair and throw away what it left in its send queue: when this returns 0 nothing of it lands any more, and no completion
 * of it is taken for another's. Idempotent; call it with the GIL, by which others are kept from the pair. Returns an errno. */
int end_queue_pair(QueuePair *pair);

PyObject *transfer(PyObject *module, PyObject *args, PyObject *kwargs);
extern const char transfer_doc[];

#endif
