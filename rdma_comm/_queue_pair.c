/* QueuePair: one reliable connection of one NIC to one of a peer. */
#include "_objects.h"

#include <arpa/inet.h>
#include <errno.h>

static PyObject *pair_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"domain", "send_cq", "recv_cq", "max_send_wr", "max_recv_wr", "peer", NULL};
    ProtectionDomain *domain;
    CompletionQueue *send_cq, *recv_cq;
    unsigned int max_send_wr, max_recv_wr;
    const char *peer = "";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!O!II|s", names, &ProtectionDomainType, &domain, &CompletionQueueType, &send_cq,
                                     &CompletionQueueType, &recv_cq, &max_send_wr, &max_recv_wr, &peer))
        return NULL;
    if (!domain->pd || !send_cq->cq || !recv_cq->cq)
        return raise_closed("protection domain or completion queue");
    struct abi_qp_init_attr wanted = {
        .send_cq = send_cq->cq, .recv_cq = recv_cq->cq, .qp_type = QP_TYPE_RC, .sq_sig_all = 0,
        .cap = {.max_send_wr = max_send_wr, .max_recv_wr = max_recv_wr, .max_send_sge = 1, .max_recv_sge = 1},
    };
    struct abi_qp *qp = verbs.create_qp(domain->pd, &wanted);
    if (!qp)
        return raise_verbs("ibv_create_qp", errno, peer, NULL);
    QueuePair *self = (QueuePair *)type->tp_alloc(type, 0);
    if (!self) {
        verbs.destroy_qp(qp);
        return NULL;
    }
    self->domain = (ProtectionDomain *)Py_NewRef(domain);
    self->send_cq = (CompletionQueue *)Py_NewRef(send_cq);
    self->recv_cq = (CompletionQueue *)Py_NewRef(recv_cq);
    self->domain->num_children++, self->send_cq->num_children++, self->recv_cq->num_children++;
    self->qp = qp;
    self->max_send_wr = max_send_wr;
    snprintf(self->peer, sizeof self->peer, "%s", peer);
    return (PyObject *)self;
}

int claim_pair(QueuePair *self)
{
    if (!self->qp) {
        raise_closed("queue pair");
        return -1;
    }
    if (self->is_busy || self->send_cq->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "another call is using this queue pair, or its send queue");
        return -1;
    }
    self->is_busy = self->send_cq->is_busy = 1;
    return 0;
}

void release_pair(QueuePair *self)
{
    self->is_busy = self->send_cq->is_busy = 0;
}

int fail_queue_pair(QueuePair *self)
{
    struct abi_qp_attr wanted = {.qp_state = STATE_ERR};
    return verbs.modify_qp(self->qp, &wanted, MASK_STATE);
}

/* Its parents may be closed from now on. */
static void forget_pair(QueuePair *self)
{
    self->domain->num_children--, self->send_cq->num_children--, self->recv_cq->num_children--;
}

int end_queue_pair(QueuePair *self)
{
    struct abi_qp *qp = self->qp;
    struct abi_wc left;
    int error, was_busy = self->is_busy;
    if (!qp)
        return 0;
    self->qp = NULL; /* from now on `fail` and others leave it alone */
    self->is_busy = 1;
    Py_BEGIN_ALLOW_THREADS /* the NIC may take its time */
    error = verbs.destroy_qp(qp);
    Py_END_ALLOW_THREADS
    self->is_busy = was_busy;
    if (error) {
        self->qp = qp;
        return error;
    }
    while (self->send_cq->cq->context->ops.poll_cq(self->send_cq->cq, 1, &left) > 0)
        ;
    forget_pair(self);
    return 0;
}

static PyObject *pair_close(QueuePair *self, PyObject *unused)
{
    (void)unused;
    if (self->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "another call is using this queue pair; call fail() and let it end");
        return NULL;
    }
    int error = end_queue_pair(self);
    return error ? raise_verbs("ibv_destroy_qp", error, self->peer, NULL) : Py_NewRef(Py_None);
}

static void pair_dealloc(QueuePair *self)
{
    if (self->qp && !verbs.destroy_qp(self->qp))
        forget_pair(self);
    Py_XDECREF(self->send_cq);
    Py_XDECREF(self->recv_cq);
    Py_XDECREF(self->domain);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *pair_fail(QueuePair *self, PyObject *unused)
{
    (void)unused;
    self->is_stopped = self->is_connecting; /* two states at once would be asked for */
    int error = self->qp && self->is_connected && !self->is_connecting ? fail_queue_pair(self) : 0;
    return error ? raise_verbs("ibv_modify_qp to ERR", error, self->peer, NULL) : Py_NewRef(Py_None);
}

/* What `connect` is told, of both ends. */
struct route {
    unsigned char port, gid_index, timeout, retry_count, rnr_retry, max_reads, max_peer_reads, traffic_class;
    unsigned int local_psn, access;
    unsigned int remote_number, remote_psn, remote_lid, mtu;
    const char *remote_gid;
    Py_ssize_t remote_gid_length;
    int is_ethernet;
};

static int to_init(QueuePair *self, const struct route *route)
{
    struct abi_qp_attr wanted = {.qp_state = STATE_INIT, .port_num = route->port, .qp_access_flags = route->access};
    return verbs.modify_qp(self->qp, &wanted, MASK_STATE | MASK_PKEY | MASK_PORT | MASK_ACCESS);
}

static int to_receive(QueuePair *self, const struct route *route)
{
    struct abi_qp_attr wanted = {
        .qp_state = STATE_RTR, .path_mtu = __builtin_ctz(route->mtu) - 7, /* 256 bytes are 1 */
        .dest_qp_num = route->remote_number, .rq_psn = route->remote_psn, .max_dest_rd_atomic = route->max_peer_reads, .min_rnr_timer = 12,
        .ah_attr = {.dlid = (uint16_t)route->remote_lid, .port_num = route->port, .is_global = (uint8_t)route->is_ethernet,
                    .grh = {.sgid_index = route->gid_index, .hop_limit = 64, .traffic_class = route->traffic_class}},
    };
    memcpy(wanted.ah_attr.grh.dgid.raw, route->remote_gid, 16);
    return verbs.modify_qp(self->qp, &wanted, MASK_STATE | MASK_AV | MASK_MTU | MASK_DEST_QPN | MASK_RQ_PSN | MASK_DEST_RD_ATOMIC | MASK_RNR_TIMER);
}

static int to_send(QueuePair *self, const struct route *route)
{
    struct abi_qp_attr wanted = {
        .qp_state = STATE_RTS, .sq_psn = route->local_psn, .timeout = route->timeout, .retry_cnt = route->retry_count,
        .rnr_retry = route->rnr_retry, .max_rd_atomic = route->max_reads,
    };
    return verbs.modify_qp(self->qp, &wanted, MASK_STATE | MASK_SQ_PSN | MASK_TIMEOUT | MASK_RETRY | MASK_RNR_RETRY | MASK_RD_ATOMIC);
}

static PyObject *pair_connect(QueuePair *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"port", "gid_index", "is_ethernet", "mtu", "access", "local_psn", "remote_number", "remote_psn", "remote_lid",
                            "remote_gid", "timeout", "retry_count", "rnr_retry", "max_reads", "max_peer_reads", "traffic_class", NULL};
    struct route route = {.timeout = 18, .retry_count = 6, .rnr_retry = 6, .max_reads = 1, .max_peer_reads = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "bbpIIIIIIy#|bbbbbb", names, &route.port, &route.gid_index, &route.is_ethernet, &route.mtu,
                                     &route.access, &route.local_psn, &route.remote_number, &route.remote_psn, &route.remote_lid,
                                     &route.remote_gid, &route.remote_gid_length, &route.timeout, &route.retry_count, &route.rnr_retry,
                                     &route.max_reads, &route.max_peer_reads, &route.traffic_class))
        return NULL;
    if (route.remote_gid_length != 16 || route.mtu < 256 || route.mtu > 4096 || route.mtu & (route.mtu - 1)) {
        PyErr_Format(PyExc_ValueError, "remote_gid has %zd bytes (16 are needed), mtu is %u (256, 512, 1024, 2048 or 4096)",
                     route.remote_gid_length, route.mtu);
        return NULL;
    }
    static const struct { int (*step)(QueuePair *, const struct route *); const char *verb; } STEPS[] = {
        {to_init, "ibv_modify_qp to INIT"}, {to_receive, "ibv_modify_qp to RTR"}, {to_send, "ibv_modify_qp to RTS"}};
    if (claim_pair(self))
        return NULL;
    int error = 0;
    size_t i;
    self->is_connecting = 1;
    for (i = 0; !error && i < sizeof STEPS / sizeof *STEPS; i++) {
        Py_BEGIN_ALLOW_THREADS /* RTR resolves the peer's address, which may take a second */
        error = STEPS[i].step(self, &route);
        Py_END_ALLOW_THREADS
        self->is_connected |= !error;
        if (!error && self->is_stopped) {
            fail_queue_pair(self);
            error = ECANCELED;
        }
    }
    self->is_connecting = self->is_stopped = 0;
    release_pair(self);
    if (error)
        return raise_verbs(STEPS[i - 1].verb, error, self->peer, i == 2 && error != ECANCELED ? "is the GID index right, and the peer's address reachable?" : NULL);
    Py_RETURN_NONE;
}

static PyObject *pair_post_receives(QueuePair *self, PyObject *args)
{
    unsigned int count;
    if (!PyArg_ParseTuple(args, "I", &count))
        return NULL;
    if (!self->qp)
        return raise_closed("queue pair");
    struct abi_recv_wr request = {0}, *bad; /* no buffer: it takes an immediate and nothing else */
    for (unsigned int i = 0; i < count; i++) {
        int error = self->qp->context->ops.post_recv(self->qp, &request, &bad);
        if (error)
            return raise_verbs("ibv_post_recv", error, self->peer, NULL);
    }
    Py_RETURN_NONE;
}

static PyObject *pair_send_immediate(QueuePair *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"value", "timeout_s", NULL};
    unsigned int value;
    double timeout_s = 10.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "I|d", names, &value, &timeout_s))
        return NULL;
    if (claim_pair(self))
        return NULL;
    struct abi_send_wr request = {.wr_id = UINT64_MAX, .opcode = OP_WRITE_IMM, .send_flags = SEND_SIGNALED, .imm_data = htonl(value)}, *bad;
    struct abi_wc done = {0};
    int error, count = 0;
    Py_BEGIN_ALLOW_THREADS
    double deadline_s = monotonic_s() + timeout_s;
    error = self->qp->context->ops.post_send(self->qp, &request, &bad);
    while (!error && (count = self->qp->context->ops.poll_cq(self->send_cq->cq, 1, &done)) == 0) {
        double left_s = deadline_s - monotonic_s();
        error = left_s <= 0 ? ETIMEDOUT : wait_for_completions(self->send_cq, left_s);
        error = error < 0 ? ETIMEDOUT : error;
    }
    Py_END_ALLOW_THREADS
    int is_done = !error && count > 0 && done.status == WC_SUCCESS;
    if (!is_done)
        end_queue_pair(self); /* a completion that came late would be taken for another request's */
    release_pair(self);
    if (is_done)
        Py_RETURN_NONE;
    if (error || count < 0)
        return raise_verbs("ibv_post_send of an immediate", error ? error : EIO, self->peer, NULL);
    return raise_completion(&done, self->peer);
}

static PyObject *pair_number(QueuePair *self, void *unused)
{
    (void)unused;
    return self->qp ? PyLong_FromUnsignedLong(self->qp->qp_num) : raise_closed("queue pair");
}

static PyMethodDef METHODS[] = {
    {"connect", (PyCFunction)(void (*)(void))pair_connect, METH_VARARGS | METH_KEYWORDS,
     "connect(port, gid_index, is_ethernet, mtu, access, local_psn, remote_number, remote_psn, remote_lid, remote_gid, timeout=18,\n"
     "retry_count=6, rnr_retry=6, max_reads=1, max_peer_reads=1, traffic_class=0): ready to send and receive. timeout is 4.096 us * 2^timeout;\n"
     "a retry_count of 7 waits for ever on soft-RoCE. Raises: VerbsError; ValueError; RuntimeError: another call uses it."},
    {"post_receives", (PyCFunction)pair_post_receives, METH_VARARGS, "post_receives(count): take so many immediates. Raises: VerbsError."},
    {"send_immediate", (PyCFunction)(void (*)(void))pair_send_immediate, METH_VARARGS | METH_KEYWORDS,
     "send_immediate(value, timeout_s=10.0): a write of no bytes that raises `value` at the peer behind everything written before.\n"
     "Raises: VerbsError, CompletionFailed: the pair is closed by then; RuntimeError: another call uses it."},
    {"fail", (PyCFunction)pair_fail, METH_NOARGS, "Stop: nothing of it lands any more, a transfer in progress ends, and so does `connect`. From any thread. Raises: VerbsError."},
    {"close", (PyCFunction)pair_close, METH_NOARGS, "Destroy; idempotent. Raises: VerbsError; RuntimeError: another call uses it."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef FIELDS[] = {{"number", (getter)pair_number, NULL, "What the peer must be told.", NULL}, {NULL, NULL, NULL, NULL, NULL}};

PyTypeObject QueuePairType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "rdma_comm._verbs.QueuePair", .tp_basicsize = sizeof(QueuePair), .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "QueuePair(domain, send_cq, recv_cq, max_send_wr, max_recv_wr, peer=''): one end of a reliable connection.\n"
              "send_cq serves this pair alone.",
    .tp_new = pair_new, .tp_dealloc = (destructor)pair_dealloc, .tp_methods = METHODS, .tp_getset = FIELDS,
};
