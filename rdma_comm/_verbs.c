/* rdma_comm._verbs: opens libibverbs at run time and makes the module. The objects are in _objects.c and _queue_pair.c, the
 * striped transfer in _transfer.c. */
#include "_objects.h"

#include <dlfcn.h>
#include <errno.h>

struct verbs_library verbs;
static int is_loaded;
static PyObject *unavailable_error, *verbs_error, *completion_error;

PyObject *raise_verbs(const char *verb, int error, const char *peer, const char *hint)
{
    PyObject *value = PyObject_CallFunction(verbs_error, "siss", verb, error, peer ? peer : "", hint ? hint : "");
    if (value) {
        PyErr_SetObject(verbs_error, value);
        Py_DECREF(value);
    }
    return NULL;
}

PyObject *raise_completion(const struct abi_wc *completion, const char *peer)
{
    const char *name = verbs.wc_status_str ? verbs.wc_status_str(completion->status) : "failed";
    PyObject *value =
        PyObject_CallFunction(completion_error, "isIs", completion->status, name, completion->vendor_err, peer ? peer : "");
    if (value) {
        PyErr_SetObject(completion_error, value);
        Py_DECREF(value);
    }
    return NULL;
}

PyObject *raise_closed(const char *what)
{
    PyErr_Format(PyExc_ValueError, "this %s is closed", what);
    return NULL;
}

static const struct {
    const char *name;
    size_t offset;
    int is_optional;
} SYMBOLS[] = {
#define SYMBOL(name) {"ibv_" #name, offsetof(struct verbs_library, name), 0}
    SYMBOL(get_device_list), SYMBOL(free_device_list), SYMBOL(open_device), SYMBOL(close_device), SYMBOL(query_device),
    SYMBOL(query_port), SYMBOL(query_gid), SYMBOL(alloc_pd), SYMBOL(dealloc_pd), SYMBOL(reg_mr), SYMBOL(dereg_mr),
    SYMBOL(create_comp_channel), SYMBOL(destroy_comp_channel), SYMBOL(create_cq), SYMBOL(destroy_cq), SYMBOL(get_cq_event),
    SYMBOL(ack_cq_events), SYMBOL(create_qp), SYMBOL(modify_qp), SYMBOL(destroy_qp), SYMBOL(wc_status_str),
    {"ibv_reg_mr_iova2", offsetof(struct verbs_library, reg_mr_iova2), 1},
    {"ibv_reg_dmabuf_mr", offsetof(struct verbs_library, reg_dmabuf_mr), 1},
};

/* Returns 0, or -1 with RdmaUnavailable set. */
static int load_library(void)
{
    if (is_loaded)
        return 0;
    void *handle = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!handle) {
        PyErr_Format(unavailable_error, "libibverbs cannot be opened (%s); on Debian or Ubuntu: apt-get install libibverbs1 ibverbs-providers",
                     dlerror());
        return -1;
    }
    for (size_t i = 0; i < sizeof SYMBOLS / sizeof *SYMBOLS; i++) {
        void *symbol = dlsym(handle, SYMBOLS[i].name);
        if (!symbol && !SYMBOLS[i].is_optional) {
            PyErr_Format(unavailable_error, "libibverbs.so.1 has no %s; it is too old", SYMBOLS[i].name);
            return -1;
        }
        memcpy((char *)&verbs + SYMBOLS[i].offset, &symbol, sizeof symbol);
    }
    is_loaded = 1;
    return 0;
}

/* Returns the library's device list, or NULL with an exception. */
static struct abi_device **device_list(int *count)
{
    if (load_library())
        return NULL;
    *count = 0;
    struct abi_device **devices = verbs.get_device_list(count);
    if (!devices) {
        int error = errno;
        if (error == ENOSYS)
            PyErr_SetString(unavailable_error,
                            "the kernel has no RDMA support loaded (ib_uverbs); load the NIC's driver, or rdma_rxe for soft-RoCE");
        else
            raise_verbs("ibv_get_device_list", error, NULL, NULL);
    }
    return devices;
}

static PyObject *device_names(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    int count;
    struct abi_device **devices = device_list(&count);
    if (!devices)
        return NULL;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(devices[i]->name);
        if (!name || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    verbs.free_device_list(devices);
    return names;
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", NULL};
    const char *name;
    int count;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s", names, &name))
        return NULL;
    struct abi_device **devices = device_list(&count);
    if (!devices)
        return NULL;
    struct abi_context *context = NULL;
    int index = 0, error = 0;
    while (index < count && strcmp(devices[index]->name, name))
        index++;
    if (index < count) {
        context = verbs.open_device(devices[index]);
        error = errno;
    }
    verbs.free_device_list(devices);
    if (index == count) {
        PyErr_Format(unavailable_error, "there is no RDMA device %.64s here (of %d)", name, count);
        return NULL;
    }
    if (!context)
        return raise_verbs("ibv_open_device", error, NULL, "may this user open /dev/infiniband/uverbs*?");
    Device *self = (Device *)type->tp_alloc(type, 0);
    if (!self) {
        verbs.close_device(context);
        return NULL;
    }
    self->context = context;
    snprintf(self->name, sizeof self->name, "%s", name);
    return (PyObject *)self;
}

static PyMethodDef FUNCTIONS[] = {
    {"device_names", device_names, METH_NOARGS, "Returns: names of the RDMA devices. Raises: RdmaUnavailable."},
    {"transfer", (PyCFunction)(void (*)(void))transfer, METH_VARARGS | METH_KEYWORDS, transfer_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "rdma_comm._verbs", "Verbs, as thin as they can be. See docs/rdma_comm.md.", -1, FUNCTIONS,
    NULL, NULL, NULL, NULL,
};

static int import_errors(void)
{
    PyObject *errors = PyImport_ImportModule("rdma_comm.errors");
    if (!errors)
        return -1;
    unavailable_error = PyObject_GetAttrString(errors, "RdmaUnavailable");
    verbs_error = PyObject_GetAttrString(errors, "VerbsError");
    completion_error = PyObject_GetAttrString(errors, "CompletionFailed");
    Py_DECREF(errors);
    return unavailable_error && verbs_error && completion_error ? 0 : -1;
}

PyMODINIT_FUNC PyInit__verbs(void)
{
    static const struct { const char *name; int value; } CONSTANTS[] = {
        {"LOCAL_WRITE", ACCESS_LOCAL_WRITE}, {"REMOTE_WRITE", ACCESS_REMOTE_WRITE}, {"REMOTE_READ", ACCESS_REMOTE_READ},
        {"RELAXED_ORDERING", ACCESS_RELAXED_ORDERING}, {"WRITE", OP_WRITE}, {"READ", OP_READ},
    };
    DeviceType.tp_new = device_new;
    PyTypeObject *types[] = {&DeviceType, &ProtectionDomainType, &MemoryRegionType, &CompletionQueueType, &QueuePairType};
    if (import_errors())
        return NULL;
    PyObject *module = PyModule_Create(&MODULE);
    for (size_t i = 0; module && i < sizeof types / sizeof *types; i++) {
        if (PyType_Ready(types[i]) || PyModule_AddType(module, types[i]))
            Py_CLEAR(module);
    }
    for (size_t i = 0; module && i < sizeof CONSTANTS / sizeof *CONSTANTS; i++) {
        if (PyModule_AddIntConstant(module, CONSTANTS[i].name, CONSTANTS[i].value))
            Py_CLEAR(module);
    }
    return module;
}
