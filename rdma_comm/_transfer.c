/* transfer(): scattered blocks over all rails (NICs) at once, without the GIL.
 *
 * Blocks are posted as chains of up to CHAIN requests, of which the last is signalled: a reliable connection completes in order, so
 * one completion stands for its chain. A rail takes the next chain whenever it has room, so a faster one takes more, and no send
 * queue is ever overrun. What a failed rail had posted is posted again by the others: reads and writes of a block may be repeated.
 * Before `transfer` returns the queue pair of each failed rail is destroyed: a NIC may answer late, or never, for a pair in the error
 * state, but ibv_destroy_qp(3) returns when it touches no memory for it any more. So blocks are free when their transfer has ended. */
#include "_objects.h"

#include <errno.h>

enum { CHAIN = 32, MAX_RAILS = 16, SPINS = 200 };
static const int64_t CHAIN_BYTES = 256 << 10;

struct chain {
    uint32_t count;
    uint32_t blocks[CHAIN];
};

struct rail {
    QueuePair *pair;
    MemoryRegion *region;
    uint64_t remote_base, remote_length;
    uint32_t remote_key;
    struct chain *ring; /* posted and not completed, oldest first */
    uint32_t ring_size, num_posted;
    uint64_t first; /* number of the oldest chain in the ring */
    uint64_t num_bytes;
    int is_dead;
    int post_error;      /* errno, when posting failed or nothing completed ... */
    struct abi_wc fault; /* ... else the completion that failed */
};

struct job {
    int opcode;
    struct rail rails[MAX_RAILS];
    int num_rails;
    const int64_t *local, *remote, *sizes; /* offsets and bytes of each block */
    uint32_t num_blocks, next, num_done;
    uint32_t *again; /* blocks that a dead rail did not finish */
    uint32_t num_again;
    double timeout_s;
    int is_stalled;
};

static int take_block(struct job *job, uint32_t *block)
{
    if (job->num_again)
        *block = job->again[--job->num_again];
    else if (job->next < job->num_blocks)
        *block = job->next++;
    else
        return 0;
    return 1;
}

static uint64_t newest_chain(const struct rail *rail)
{
    return rail->first + rail->num_posted - 1;
}

/* Take a rail out of service and give what it had posted to the others. What is under way may still land until `end_dead_rails`, the same
 * bytes in the same place. */
static void kill_rail(struct job *job, struct rail *rail)
{
    fail_queue_pair(rail->pair);
    for (uint32_t i = 0; i < rail->num_posted; i++) {
        struct chain *chain = &rail->ring[(rail->first + i) % rail->ring_size];
        for (uint32_t k = 0; k < chain->count; k++)
            job->again[job->num_again++] = chain->blocks[k];
    }
    rail->num_posted = 0;
    rail->is_dead = 1;
}

/* Post one chain: so many blocks that a completion is rare, and so few bytes that several rails share a small job.
 * Returns whether there was anything to post. */
static int post_chain(struct job *job, struct rail *rail)
{
    struct abi_send_wr requests[CHAIN], *bad = NULL;
    struct abi_sge pieces[CHAIN];
    struct chain *chain = &rail->ring[(rail->first + rail->num_posted) % rail->ring_size];
    chain->count = 0;
    uint32_t block;
    int64_t num_bytes = 0;
    while (chain->count < CHAIN && num_bytes < CHAIN_BYTES && take_block(job, &block)) {
        uint32_t i = chain->count++;
        num_bytes += job->sizes[block];
        chain->blocks[i] = block;
        pieces[i] = (struct abi_sge){
            .addr = rail->region->address + (uint64_t)job->local[block], .length = (uint32_t)job->sizes[block], .lkey = rail->region->mr->lkey};
        requests[i] = (struct abi_send_wr){
            .wr_id = UINT64_MAX, .sg_list = &pieces[i], .num_sge = 1, .opcode = job->opcode,
            .remote_addr = rail->remote_base + (uint64_t)job->remote[block], .rkey = rail->remote_key};
        if (i)
            requests[i - 1].next = &requests[i];
    }
    if (!chain->count)
        return 0;
    rail->num_posted++;
    requests[chain->count - 1].send_flags = SEND_SIGNALED;
    requests[chain->count - 1].wr_id = newest_chain(rail);
    rail->post_error = rail->pair->qp->context->ops.post_send(rail->pair->qp, requests, &bad);
    if (rail->post_error)
        kill_rail(job, rail);
    return 1;
}

/* Take what has completed. Returns how many completions there were. */
static int reap(struct job *job, struct rail *rail)
{
    struct abi_wc done[16];
    int count = rail->pair->qp->context->ops.poll_cq(rail->pair->send_cq->cq, 16, done);
    if (count < 0) {
        rail->post_error = EIO;
        kill_rail(job, rail);
        return 1;
    }
    for (int i = 0; i < count; i++) {
        if (done[i].status != WC_SUCCESS) {
            rail->fault = done[i];
            kill_rail(job, rail);
            return count;
        }
        struct chain *chain = &rail->ring[rail->first % rail->ring_size];
        for (uint32_t k = 0; k < chain->count; k++)
            rail->num_bytes += (uint64_t)job->sizes[chain->blocks[k]];
        job->num_done += chain->count;
        rail->first++;
        rail->num_posted--;
    }
    return count;
}

/* Nothing has completed for a while: sleep until something may have. Returns 0, or -1 when no time is left. */
static int pause_for(struct job *job, double left_s)
{
    for (int i = 0; i < job->num_rails; i++) {
        struct rail *rail = &job->rails[i];
        if (rail->is_dead || !rail->num_posted)
            continue;
        /* With several rails none may be waited for alone for long. */
        double wait_s = job->num_rails > 1 && left_s > 0.001 ? 0.001 : left_s;
        int error = wait_for_completions(rail->pair->send_cq, wait_s);
        if (error > 0) {
            rail->post_error = error;
            kill_rail(job, rail);
        }
        return left_s > 0 ? 0 : -1;
    }
    return 0;
}

static void run(struct job *job)
{
    double progress_s = monotonic_s();
    int num_idle = 0;
    while (job->num_done < job->num_blocks) {
        int num_alive = 0, num_events = 0;
        for (int i = 0; i < job->num_rails; i++) {
            struct rail *rail = &job->rails[i];
            if (rail->is_dead)
                continue;
            num_events += reap(job, rail);
            if (!rail->is_dead && rail->num_posted < rail->ring_size)
                num_events += post_chain(job, rail); /* one each in turn: that is the striping */
            num_alive += !rail->is_dead;
        }
        if (!num_alive)
            return;
        if (num_events) {
            progress_s = monotonic_s();
            num_idle = 0;
        } else if (++num_idle > SPINS && pause_for(job, job->timeout_s - (monotonic_s() - progress_s)) < 0) {
            job->is_stalled = 1;
            for (int i = 0; i < job->num_rails; i++)
                if (!job->rails[i].is_dead) {
                    job->rails[i].post_error = ETIMEDOUT;
                    kill_rail(job, &job->rails[i]);
                }
            return;
        }
    }
}

/* -- from and to Python -- */

static int check_blocks(const struct job *job)
{
    for (uint32_t i = 0; i < job->num_blocks; i++) {
        int64_t size = job->sizes[i];
        int is_good = size > 0 && size <= 1 << 30 && job->local[i] >= 0 && job->remote[i] >= 0;
        for (int k = 0; is_good && k < job->num_rails; k++) {
            const struct rail *rail = &job->rails[k];
            is_good = (uint64_t)job->local[i] + (uint64_t)size <= rail->region->length && (uint64_t)job->remote[i] + (uint64_t)size <= rail->remote_length;
        }
        if (!is_good) {
            PyErr_Format(PyExc_ValueError, "block %u (local offset %lld, remote offset %lld, %lld bytes) is outside a region", i,
                         (long long)job->local[i], (long long)job->remote[i], (long long)size);
            return -1;
        }
    }
    return 0;
}

static int read_rails(struct job *job, PyObject *rails)
{
    Py_ssize_t count = PyTuple_Check(rails) ? PyTuple_GET_SIZE(rails) : 0;
    if (count < 1 || count > MAX_RAILS) {
        PyErr_Format(PyExc_ValueError, "rails must be a tuple of 1 to %d rails", MAX_RAILS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        struct rail *rail = &job->rails[i];
        unsigned long long base, length;
        unsigned int key;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(rails, i), "O!O!KKI", &QueuePairType, &rail->pair, &MemoryRegionType, &rail->region, &base, &length, &key))
            return -1;
        if (!rail->region->mr) {
            raise_closed("memory region");
            return -1;
        }
        if (claim_pair(rail->pair))
            return -1;
        rail->region->num_transfers++;
        job->num_rails++;
        rail->remote_base = base, rail->remote_length = length, rail->remote_key = key;
        rail->ring_size = rail->pair->max_send_wr / CHAIN;
        rail->ring = PyMem_Calloc(rail->ring_size, sizeof *rail->ring);
        if (!rail->ring_size || !rail->ring) {
            PyErr_Format(PyExc_ValueError, "max_send_wr must be at least %d", CHAIN);
            return -1;
        }
    }
    return 0;
}

static void release_rails(struct job *job)
{
    for (int i = 0; i < job->num_rails; i++) {
        release_pair(job->rails[i].pair);
        job->rails[i].region->num_transfers--;
        PyMem_Free(job->rails[i].ring);
    }
}

static PyObject *rail_result(const struct rail *rail)
{
    const char *name = "";
    if (rail->is_dead)
        name = rail->post_error ? strerror(rail->post_error) : verbs.wc_status_str(rail->fault.status);
    return Py_BuildValue("(KisI)", (unsigned long long)rail->num_bytes, rail->is_dead ? (rail->post_error ? -rail->post_error : rail->fault.status) : 0,
                         name, rail->fault.vendor_err);
}

/* Returns 0, or -1 with VerbsError set: a pair could not be destroyed, and what it had posted may still land. */
static int end_dead_rails(struct job *job)
{
    int status = 0;
    for (int i = 0; i < job->num_rails; i++) {
        QueuePair *pair = job->rails[i].pair;
        int error = job->rails[i].is_dead ? end_queue_pair(pair) : 0;
        if (error && !status) { /* one exception, the first */
            raise_verbs("ibv_destroy_qp", error, pair->peer, "what was posted to it may still land");
            status = -1;
        }
    }
    return status;
}

static PyObject *run_without_gil(struct job *job)
{
    Py_BEGIN_ALLOW_THREADS
    run(job);
    Py_END_ALLOW_THREADS
    PyObject *results = end_dead_rails(job) ? NULL : PyTuple_New(job->num_rails);
    for (int i = 0; i < job->num_rails; i++) {
        PyObject *result = results ? rail_result(&job->rails[i]) : NULL;
        if (result)
            PyTuple_SET_ITEM(results, i, result);
        else
            Py_CLEAR(results);
    }
    return results ? Py_BuildValue("(INO)", job->num_done, results, job->is_stalled ? Py_True : Py_False) : NULL;
}

const char transfer_doc[] =
    "transfer(opcode, rails, local, remote, sizes, timeout_s)\n\nMove scattered blocks over all rails at once and wait until they are there.\n\n"
    "opcode: READ or WRITE. rails: tuple of (QueuePair, MemoryRegion, remote address, remote length, remote key).\n"
    "local, remote, sizes: contiguous int64 buffers, one entry a block: offsets into both regions, bytes (at most 2**30).\n"
    "timeout_s: without any completion for so long, all rails fail.\n"
    "Returns: (blocks done, ((bytes, status, status text, vendor error) a rail, 0 for a good one, -errno when posting failed or it stalled), whether it stalled).\n"
    "All blocks are done unless every rail has failed. A failed rail's pair is closed: nothing of it lands any more.\n"
    "Raises: ValueError: a block is outside its region, or something is closed; RuntimeError: a rail is in use, or given twice; VerbsError.";

PyObject *transfer(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"opcode", "rails", "local", "remote", "sizes", "timeout_s", NULL};
    struct job job = {0};
    PyObject *rails, *result = NULL;
    Py_buffer buffers[3] = {{0}};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOy*y*y*d", names, &job.opcode, &rails, &buffers[0], &buffers[1], &buffers[2], &job.timeout_s))
        return NULL;
    Py_ssize_t length = buffers[0].len;
    if (job.opcode != OP_READ && job.opcode != OP_WRITE)
        PyErr_SetString(PyExc_ValueError, "opcode must be READ or WRITE");
    else if (length % 8 || length / 8 > INT32_MAX || buffers[1].len != length || buffers[2].len != length)
        PyErr_SetString(PyExc_ValueError, "local, remote and sizes must be int64 and equally many");
    else if (!read_rails(&job, rails)) {
        job.num_blocks = (uint32_t)(length / 8);
        job.local = buffers[0].buf, job.remote = buffers[1].buf, job.sizes = buffers[2].buf;
        job.again = PyMem_Malloc((job.num_blocks + 1) * sizeof *job.again);
        if (!job.again)
            PyErr_NoMemory();
        else if (!check_blocks(&job))
            result = run_without_gil(&job);
    }
    PyMem_Free(job.again);
    release_rails(&job);
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&buffers[i]);
    return result;
}
