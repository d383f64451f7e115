/* The part of libibverbs' binary interface (IBVERBS_1.1, unchanged since rdma-core 1) that this package uses.
 *
 * The library is opened at run time, and its structures are declared here, so that building needs no RDMA headers and importing no
 * RDMA library. tests/rdma/test_abi.py holds every size and offset against <infiniband/verbs.h> where that is installed. */
#ifndef RDMA_COMM_ABI_H
#define RDMA_COMM_ABI_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { ACCESS_LOCAL_WRITE = 1, ACCESS_REMOTE_WRITE = 2, ACCESS_REMOTE_READ = 4, ACCESS_RELAXED_ORDERING = 1 << 20 };
enum { QP_TYPE_RC = 2 };
enum { STATE_RESET = 0, STATE_INIT = 1, STATE_RTR = 2, STATE_RTS = 3, STATE_ERR = 6 };
enum { OP_WRITE = 0, OP_WRITE_IMM = 1, OP_READ = 4 };
enum { SEND_SIGNALED = 2 };
enum { WC_SUCCESS = 0, WC_FLUSHED = 5, WC_NUM_STATUSES = 24 };
enum { WC_FLAG_IMM = 2 };
enum { LINK_ETHERNET = 2 };
enum {
    MASK_STATE = 1 << 0, MASK_ACCESS = 1 << 3, MASK_PKEY = 1 << 4, MASK_PORT = 1 << 5, MASK_AV = 1 << 7, MASK_MTU = 1 << 8,
    MASK_TIMEOUT = 1 << 9, MASK_RETRY = 1 << 10, MASK_RNR_RETRY = 1 << 11, MASK_RQ_PSN = 1 << 12, MASK_RD_ATOMIC = 1 << 13,
    MASK_RNR_TIMER = 1 << 15, MASK_SQ_PSN = 1 << 16, MASK_DEST_RD_ATOMIC = 1 << 17, MASK_DEST_QPN = 1 << 20
};

struct abi_context;
struct abi_pd;
struct abi_cq;
struct abi_qp;
struct abi_send_wr;
struct abi_recv_wr;
struct abi_wc;

struct abi_device {
    void *ops[2];
    int node_type, transport_type;
    char name[64], dev_name[64], dev_path[256], ibdev_path[256];
};

/* The library's table of fast calls; the entries between those we use are kept as opaque pointers. */
struct abi_context_ops {
    void *before_poll[11];
    int (*poll_cq)(struct abi_cq *, int, struct abi_wc *);
    int (*req_notify_cq)(struct abi_cq *, int);
    void *before_post[12];
    int (*post_send)(struct abi_qp *, struct abi_send_wr *, struct abi_send_wr **);
    int (*post_recv)(struct abi_qp *, struct abi_recv_wr *, struct abi_recv_wr **);
    void *after_post[5];
};

struct abi_context {
    struct abi_device *device;
    struct abi_context_ops ops;
    int cmd_fd, async_fd, num_comp_vectors;
    pthread_mutex_t mutex;
    void *abi_compat;
};

struct abi_device_attr {
    char fw_ver[64];
    uint64_t node_guid, sys_image_guid, max_mr_size, page_size_cap;
    uint32_t vendor_id, vendor_part_id, hw_ver;
    int max_qp, max_qp_wr;
    unsigned int device_cap_flags;
    int max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd;
    int max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom, atomic_cap;
    int max_ee, max_rdd, max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach;
    int max_total_mcast_qp_attach, max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge;
    uint16_t max_pkeys;
    uint8_t local_ca_ack_delay, phys_port_cnt;
};

struct abi_port_attr {
    int state, max_mtu, active_mtu, gid_tbl_len;
    uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr;
    uint16_t pkey_tbl_len, lid, sm_lid;
    uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer, flags;
    uint16_t port_cap_flags2;
};

struct abi_pd {
    struct abi_context *context;
    uint32_t handle;
};

struct abi_mr {
    struct abi_context *context;
    struct abi_pd *pd;
    void *addr;
    size_t length;
    uint32_t handle, lkey, rkey;
};

struct abi_comp_channel {
    struct abi_context *context;
    int fd, refcnt;
};

struct abi_cq {
    struct abi_context *context;
    struct abi_comp_channel *channel;
    void *cq_context;
    uint32_t handle;
    int cqe;
};

struct abi_qp_cap {
    uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
};

struct abi_qp_init_attr {
    void *qp_context;
    struct abi_cq *send_cq, *recv_cq;
    void *srq;
    struct abi_qp_cap cap;
    int qp_type, sq_sig_all;
};

union abi_gid {
    uint8_t raw[16];
    struct { uint64_t subnet_prefix, interface_id; } global;
};

struct abi_ah_attr {
    struct {
        union abi_gid dgid;
        uint32_t flow_label;
        uint8_t sgid_index, hop_limit, traffic_class;
    } grh;
    uint16_t dlid;
    uint8_t sl, src_path_bits, static_rate, is_global, port_num;
};

struct abi_qp_attr {
    int qp_state, cur_qp_state, path_mtu, path_mig_state;
    uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
    unsigned int qp_access_flags;
    struct abi_qp_cap cap;
    struct abi_ah_attr ah_attr, alt_ah_attr;
    uint16_t pkey_index, alt_pkey_index;
    uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt;
    uint8_t rnr_retry, alt_port_num, alt_timeout;
    uint32_t rate_limit;
};

struct abi_qp {
    struct abi_context *context;
    void *qp_context;
    struct abi_pd *pd;
    struct abi_cq *send_cq, *recv_cq;
    void *srq;
    uint32_t handle, qp_num;
    int state, qp_type;
};

struct abi_sge {
    uint64_t addr;
    uint32_t length, lkey;
};

struct abi_send_wr {
    uint64_t wr_id;
    struct abi_send_wr *next;
    struct abi_sge *sg_list;
    int num_sge, opcode;
    unsigned int send_flags;
    uint32_t imm_data; /* network order */
    uint64_t remote_addr;
    uint32_t rkey;
    uint64_t other_kinds[9]; /* of atomics, datagrams, memory windows */
};

struct abi_recv_wr {
    uint64_t wr_id;
    struct abi_recv_wr *next;
    struct abi_sge *sg_list;
    int num_sge;
};

struct abi_wc {
    uint64_t wr_id;
    int status, opcode;
    uint32_t vendor_err, byte_len, imm_data, qp_num, src_qp;
    unsigned int wc_flags;
    uint16_t pkey_index, slid;
    uint8_t sl, dlid_path_bits;
};

/* Every function of the library that we call, found by name when the first device is asked for. */
struct verbs_library {
    struct abi_device **(*get_device_list)(int *);
    void (*free_device_list)(struct abi_device **);
    struct abi_context *(*open_device)(struct abi_device *);
    int (*close_device)(struct abi_context *);
    int (*query_device)(struct abi_context *, struct abi_device_attr *);
    int (*query_port)(struct abi_context *, uint8_t, struct abi_port_attr *);
    int (*query_gid)(struct abi_context *, uint8_t, int, union abi_gid *);
    struct abi_pd *(*alloc_pd)(struct abi_context *);
    int (*dealloc_pd)(struct abi_pd *);
    struct abi_mr *(*reg_mr)(struct abi_pd *, void *, size_t, int);
    struct abi_mr *(*reg_mr_iova2)(struct abi_pd *, void *, size_t, uint64_t, unsigned int);             /* may be missing */
    struct abi_mr *(*reg_dmabuf_mr)(struct abi_pd *, uint64_t, size_t, uint64_t, int, int);              /* may be missing */
    int (*dereg_mr)(struct abi_mr *);
    struct abi_comp_channel *(*create_comp_channel)(struct abi_context *);
    int (*destroy_comp_channel)(struct abi_comp_channel *);
    struct abi_cq *(*create_cq)(struct abi_context *, int, void *, struct abi_comp_channel *, int);
    int (*destroy_cq)(struct abi_cq *);
    int (*get_cq_event)(struct abi_comp_channel *, struct abi_cq **, void **);
    void (*ack_cq_events)(struct abi_cq *, unsigned int);
    struct abi_qp *(*create_qp)(struct abi_pd *, struct abi_qp_init_attr *);
    int (*modify_qp)(struct abi_qp *, struct abi_qp_attr *, int);
    int (*destroy_qp)(struct abi_qp *);
    const char *(*wc_status_str)(int);
};

extern struct verbs_library verbs;

#endif
