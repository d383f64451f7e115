/* Device, ProtectionDomain, MemoryRegion, CompletionQueue. */
#include "_objects.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <time.h>

double monotonic_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}


/* -- Device -- */

static PyObject *device_close(Device *self, PyObject *unused)
{
    (void)unused;
    if (self->context) {
        if (self->num_children)
            return raise_verbs("ibv_close_device", EBUSY, NULL, "close its protection domains and completion queues first");
        if (verbs.close_device(self->context))
            return raise_verbs("ibv_close_device", errno, NULL, NULL);
        self->context = NULL;
    }
    Py_RETURN_NONE;
}

static void device_dealloc(Device *self)
{
    if (self->context)
        verbs.close_device(self->context);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *device_attributes(Device *self, PyObject *unused)
{
    (void)unused;
    struct abi_device_attr attributes;
    if (!self->context)
        return raise_closed("device");
    memset(&attributes, 0, sizeof attributes);
    int error = verbs.query_device(self->context, &attributes);
    if (error)
        return raise_verbs("ibv_query_device", error, NULL, NULL);
    return Py_BuildValue("{s:s,s:I,s:I,s:i,s:i,s:i,s:i,s:i,s:K,s:i}", "firmware", attributes.fw_ver, "vendor_id", attributes.vendor_id,
                         "vendor_part_id", attributes.vendor_part_id, "max_qp", attributes.max_qp, "max_qp_wr", attributes.max_qp_wr,
                         "max_cqe", attributes.max_cqe, "max_qp_rd_atomic", attributes.max_qp_rd_atom, "max_qp_init_rd_atomic",
                         attributes.max_qp_init_rd_atom, "max_mr_size", (unsigned long long)attributes.max_mr_size, "num_ports",
                         (int)attributes.phys_port_cnt);
}

static PyObject *device_port(Device *self, PyObject *args)
{
    unsigned char number;
    struct abi_port_attr port;
    if (!PyArg_ParseTuple(args, "b", &number))
        return NULL;
    if (!self->context)
        return raise_closed("device");
    memset(&port, 0, sizeof port);
    int error = verbs.query_port(self->context, number, &port);
    if (error)
        return raise_verbs("ibv_query_port", error, NULL, NULL);
    return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:O,s:i,s:i}", "state", port.state, "max_mtu", 128 << port.max_mtu, "active_mtu",
                         128 << port.active_mtu, "lid", (int)port.lid, "gid_table_length", port.gid_tbl_len, "is_ethernet",
                         port.link_layer == LINK_ETHERNET ? Py_True : Py_False, "active_width", (int)port.active_width,
                         "active_speed", (int)port.active_speed);
}

static PyObject *device_gid(Device *self, PyObject *args)
{
    unsigned char number;
    int index;
    union abi_gid gid;
    if (!PyArg_ParseTuple(args, "bi", &number, &index))
        return NULL;
    if (!self->context)
        return raise_closed("device");
    if (verbs.query_gid(self->context, number, index, &gid))
        return raise_verbs("ibv_query_gid", errno ? errno : EINVAL, NULL, NULL);
    return PyBytes_FromStringAndSize((const char *)gid.raw, sizeof gid.raw);
}

static PyObject *device_name(Device *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(self->name);
}

static PyMethodDef DEVICE_METHODS[] = {
    {"attributes", (PyCFunction)device_attributes, METH_NOARGS, "Returns: what the device can do, as a dict. Raises: VerbsError."},
    {"port", (PyCFunction)device_port, METH_VARARGS, "port(number): Returns: state (4 is active), MTUs in bytes, LID and so on. Raises: VerbsError."},
    {"gid", (PyCFunction)device_gid, METH_VARARGS, "gid(port, index): Returns: 16 bytes, network order. Raises: VerbsError."},
    {"close", (PyCFunction)device_close, METH_NOARGS, "Close; idempotent. Raises: VerbsError: something of it is still open."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef DEVICE_FIELDS[] = {{"name", (getter)device_name, NULL, "As /sys/class/infiniband names it.", NULL}, {NULL, NULL, NULL, NULL, NULL}};

PyTypeObject DeviceType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "rdma_comm._verbs.Device", .tp_basicsize = sizeof(Device), .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Device(name): an opened NIC. Raises: RdmaUnavailable: there is none of that name, or no RDMA here at all.",
    .tp_dealloc = (destructor)device_dealloc, .tp_methods = DEVICE_METHODS, .tp_getset = DEVICE_FIELDS,
};

/* -- ProtectionDomain -- */

static PyObject *domain_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"device", NULL};
    Device *device;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!", names, &DeviceType, &device))
        return NULL;
    if (!device->context)
        return raise_closed("device");
    struct abi_pd *pd = verbs.alloc_pd(device->context);
    if (!pd)
        return raise_verbs("ibv_alloc_pd", errno, NULL, NULL);
    ProtectionDomain *self = (ProtectionDomain *)type->tp_alloc(type, 0);
    if (!self) {
        verbs.dealloc_pd(pd);
        return NULL;
    }
    self->device = (Device *)Py_NewRef(device);
    self->device->num_children++;
    self->pd = pd;
    return (PyObject *)self;
}

static int destroy_domain(ProtectionDomain *self)
{
    int error = !self->pd ? 0 : self->num_children ? EBUSY : verbs.dealloc_pd(self->pd);
    if (self->pd && !error) {
        self->pd = NULL;
        self->device->num_children--;
    }
    return error;
}

static PyObject *domain_close(ProtectionDomain *self, PyObject *unused)
{
    (void)unused;
    int error = destroy_domain(self);
    if (error)
        return raise_verbs("ibv_dealloc_pd", error, NULL, "close its memory regions and queue pairs first");
    Py_RETURN_NONE;
}

static void domain_dealloc(ProtectionDomain *self)
{
    destroy_domain(self);
    Py_XDECREF(self->device);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef DOMAIN_METHODS[] = {
    {"close", (PyCFunction)domain_close, METH_NOARGS, "Close; idempotent. Raises: VerbsError: something of it is still open."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject ProtectionDomainType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "rdma_comm._verbs.ProtectionDomain", .tp_basicsize = sizeof(ProtectionDomain),
    .tp_flags = Py_TPFLAGS_DEFAULT, .tp_doc = "ProtectionDomain(device): what may be used together.", .tp_new = domain_new,
    .tp_dealloc = (destructor)domain_dealloc, .tp_methods = DOMAIN_METHODS,
};

/* -- MemoryRegion -- */

static struct abi_mr *register_memory(struct abi_pd *pd, uint64_t address, uint64_t length, unsigned int access, int dmabuf_fd,
                                      uint64_t dmabuf_offset, const char **verb)
{
    if (dmabuf_fd >= 0) {
        *verb = "ibv_reg_dmabuf_mr";
        errno = ENOSYS;
        return verbs.reg_dmabuf_mr ? verbs.reg_dmabuf_mr(pd, dmabuf_offset, length, address, dmabuf_fd, (int)access) : NULL;
    }
    if (access & ACCESS_RELAXED_ORDERING && verbs.reg_mr_iova2) {
        *verb = "ibv_reg_mr_iova2";
        return verbs.reg_mr_iova2(pd, (void *)(uintptr_t)address, length, address, access);
    }
    *verb = "ibv_reg_mr"; /* relaxed ordering is a permission, not a wish: without it the region is only slower */
    return verbs.reg_mr(pd, (void *)(uintptr_t)address, length, (int)(access & ~(unsigned)ACCESS_RELAXED_ORDERING));
}

static PyObject *region_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"domain", "address", "length", "access", "owner", "dmabuf_fd", "dmabuf_offset", NULL};
    ProtectionDomain *domain;
    unsigned long long address, length, dmabuf_offset = 0;
    unsigned int access;
    PyObject *owner = Py_None;
    int dmabuf_fd = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KKI|OiK", names, &ProtectionDomainType, &domain, &address, &length, &access,
                                     &owner, &dmabuf_fd, &dmabuf_offset))
        return NULL;
    if (!domain->pd)
        return raise_closed("protection domain");
    const char *verb;
    struct abi_mr *mr;
    int error;
    domain->num_children++;
    Py_BEGIN_ALLOW_THREADS /* pinning a large pool takes seconds */
    mr = register_memory(domain->pd, address, length, access, dmabuf_fd, dmabuf_offset, &verb);
    error = errno;
    Py_END_ALLOW_THREADS
    MemoryRegion *self = mr ? (MemoryRegion *)type->tp_alloc(type, 0) : NULL;
    if (!self) {
        domain->num_children--;
        if (mr) {
            verbs.dereg_mr(mr);
            return NULL;
        }
        return raise_verbs(verb, error, NULL,
                           error == ENOMEM ? "raise the limit on locked memory (ulimit -l unlimited, LimitMEMLOCK=infinity)" : NULL);
    }
    self->domain = (ProtectionDomain *)Py_NewRef(domain);
    self->owner = Py_NewRef(owner);
    self->mr = mr;
    self->address = address;
    self->length = length;
    return (PyObject *)self;
}

static int destroy_region(MemoryRegion *self)
{
    int error = self->mr ? verbs.dereg_mr(self->mr) : 0;
    if (self->mr && !error) {
        self->mr = NULL;
        self->domain->num_children--;
    }
    return error;
}

static PyObject *region_close(MemoryRegion *self, PyObject *unused)
{
    (void)unused;
    if (self->num_transfers) {
        PyErr_SetString(PyExc_RuntimeError, "a transfer is using this memory region");
        return NULL;
    }
    int error = destroy_region(self);
    if (error)
        return raise_verbs("ibv_dereg_mr", error, NULL, NULL);
    Py_CLEAR(self->owner);
    Py_RETURN_NONE;
}

static void region_dealloc(MemoryRegion *self)
{
    destroy_region(self);
    Py_XDECREF(self->owner);
    Py_XDECREF(self->domain);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *region_key(MemoryRegion *self, void *unused)
{
    (void)unused;
    return self->mr ? PyLong_FromUnsignedLong(self->mr->rkey) : raise_closed("memory region");
}

static PyObject *region_address(MemoryRegion *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->address);
}

static PyObject *region_length(MemoryRegion *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->length);
}

static PyMethodDef REGION_METHODS[] = {
    {"close", (PyCFunction)region_close, METH_NOARGS, "Deregister; idempotent. Raises: VerbsError; RuntimeError: a transfer uses it."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef REGION_FIELDS[] = {
    {"remote_key", (getter)region_key, NULL, "What a peer needs to reach it.", NULL},
    {"address", (getter)region_address, NULL, "Its first byte.", NULL},
    {"length", (getter)region_length, NULL, "In bytes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject MemoryRegionType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "rdma_comm._verbs.MemoryRegion", .tp_basicsize = sizeof(MemoryRegion),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "MemoryRegion(domain, address, length, access, owner=None, dmabuf_fd=-1, dmabuf_offset=0): registered memory.\n"
              "owner is kept alive as long as the region. Raises: VerbsError.",
    .tp_new = region_new, .tp_dealloc = (destructor)region_dealloc, .tp_methods = REGION_METHODS, .tp_getset = REGION_FIELDS,
};

/* -- CompletionQueue -- */

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"device", "depth", NULL};
    Device *device;
    int depth;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!i", names, &DeviceType, &device, &depth))
        return NULL;
    if (!device->context)
        return raise_closed("device");
    CompletionQueue *self = (CompletionQueue *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->device = (Device *)Py_NewRef(device);
    self->channel = verbs.create_comp_channel(device->context);
    if (!self->channel) {
        raise_verbs("ibv_create_comp_channel", errno, NULL, NULL);
        Py_DECREF(self);
        return NULL;
    }
    self->device->num_children++;
    self->cq = verbs.create_cq(device->context, depth, NULL, self->channel, 0);
    if (!self->cq) {
        raise_verbs("ibv_create_cq", errno, NULL, NULL);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int destroy_queue(CompletionQueue *self)
{
    int error = 0;
    if (self->num_children)
        return EBUSY;
    if (self->cq) {
        if (self->num_unacknowledged)
            verbs.ack_cq_events(self->cq, self->num_unacknowledged);
        self->num_unacknowledged = 0;
        error = verbs.destroy_cq(self->cq);
        if (error)
            return error;
        self->cq = NULL;
    }
    if (self->channel && !(error = verbs.destroy_comp_channel(self->channel))) {
        self->channel = NULL;
        self->device->num_children--;
    }
    return error;
}

/* Returns 0, or -1 with RuntimeError set. */
static int refuse_busy(const CompletionQueue *self)
{
    if (self->is_busy)
        PyErr_SetString(PyExc_RuntimeError, "somebody is waiting for completions of this queue");
    return self->is_busy ? -1 : 0;
}

static PyObject *queue_close(CompletionQueue *self, PyObject *unused)
{
    (void)unused;
    if (refuse_busy(self))
        return NULL;
    int error = destroy_queue(self);
    if (error)
        return raise_verbs("ibv_destroy_cq", error, NULL, "close the queue pairs that use it first");
    Py_RETURN_NONE;
}

static void queue_dealloc(CompletionQueue *self)
{
    destroy_queue(self);
    Py_XDECREF(self->device);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

int wait_for_completions(CompletionQueue *queue, double timeout_s)
{
    if (!queue->is_armed) {
        int error = queue->cq->context->ops.req_notify_cq(queue->cq, 0);
        if (error)
            return error;
        queue->is_armed = 1;
        return 0; /* what came before arming raises no event: the caller looks once more */
    }
    struct pollfd waited = {.fd = queue->channel->fd, .events = POLLIN};
    int count = poll(&waited, 1, timeout_s > 0 ? (int)(timeout_s * 1e3) + 1 : 0);
    if (count < 0)
        return errno == EINTR ? 0 : errno;
    if (count == 0)
        return -1;
    struct abi_cq *cq;
    void *context;
    if (verbs.get_cq_event(queue->channel, &cq, &context))
        return errno;
    queue->is_armed = 0;
    if (++queue->num_unacknowledged == 64) { /* acknowledging takes a mutex */
        verbs.ack_cq_events(queue->cq, queue->num_unacknowledged);
        queue->num_unacknowledged = 0;
    }
    return 0;
}

static PyObject *queue_poll(CompletionQueue *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"max_completions", "timeout_s", NULL};
    enum { MOST = 64 };
    struct abi_wc found[MOST];
    int most = MOST, count = 0, error = 0;
    double timeout_s = 0.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|id", names, &most, &timeout_s))
        return NULL;
    if (!self->cq)
        return raise_closed("completion queue");
    if (refuse_busy(self))
        return NULL;
    if (most < 1 || most > MOST)
        most = MOST;
    self->is_busy = 1;
    Py_BEGIN_ALLOW_THREADS
    double deadline_s = monotonic_s() + timeout_s;
    while ((count = self->cq->context->ops.poll_cq(self->cq, most, found)) == 0) {
        double left_s = deadline_s - monotonic_s();
        if (left_s <= 0 || (error = wait_for_completions(self, left_s)))
            break;
    }
    Py_END_ALLOW_THREADS
    self->is_busy = 0;
    if (count < 0 || error > 0)
        return raise_verbs("ibv_poll_cq", error > 0 ? error : EIO, NULL, NULL);
    PyObject *list = PyList_New(count);
    for (int i = 0; list && i < count; i++) {
        PyObject *imm = found[i].wc_flags & WC_FLAG_IMM ? PyLong_FromUnsignedLong(ntohl(found[i].imm_data)) : Py_NewRef(Py_None);
        PyObject *item = Py_BuildValue("(KiiINI)", (unsigned long long)found[i].wr_id, found[i].status, found[i].opcode, found[i].qp_num, imm,
                                       found[i].byte_len);
        if (item)
            PyList_SET_ITEM(list, i, item);
        else
            Py_CLEAR(list);
    }
    return list;
}

static PyMethodDef QUEUE_METHODS[] = {
    {"poll", (PyCFunction)(void (*)(void))queue_poll, METH_VARARGS | METH_KEYWORDS,
     "poll(max_completions=64, timeout_s=0.0): Returns: (wr_id, status, opcode, qp_number, immediate or None, bytes) each, none after\n"
     "timeout_s. Raises: VerbsError; RuntimeError: another thread polls it, or a transfer does."},
    {"close", (PyCFunction)queue_close, METH_NOARGS, "Close; idempotent. Raises: VerbsError: a queue pair still uses it; RuntimeError: as `poll`."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject CompletionQueueType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "rdma_comm._verbs.CompletionQueue", .tp_basicsize = sizeof(CompletionQueue),
    .tp_flags = Py_TPFLAGS_DEFAULT, .tp_doc = "CompletionQueue(device, depth): where finished work is reported.", .tp_new = queue_new,
    .tp_dealloc = (destructor)queue_dealloc, .tp_methods = QUEUE_METHODS,
};
