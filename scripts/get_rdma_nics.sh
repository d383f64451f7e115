#!/usr/bin/env bash
# Which network devices KV transfers should use, read from sysfs, and from /proc/net which interfaces have an address.
#
#   export "$(scripts/get_rdma_nics.sh gpu)"   KVCACHE_RDMA_NICS=mlx5_0,mlx5_1   RDMA devices with an active port, nearest to the GPUs first
#   export "$(scripts/get_rdma_nics.sh cpu)"   KVCACHE_SOCKET_IFNAME=bond0       the interface for sockets
#
# CUDA_VISIBLE_DEVICES (indices) says which GPUs count; SYSFS_ROOT and PROC_ROOT, for tests, where to look instead of /sys and /proc.
# Prints exactly one line.
# Exit status 1, and a sentence on stderr, when there is none; 2 when called wrongly. The order is rdma_comm/devices.py's.
set -euo pipefail
shopt -s nullglob
export LC_ALL=C

SYS=${SYSFS_ROOT:-/sys}
PROC=${PROC_ROOT:-/proc}

die() { echo "get_rdma_nics.sh: $1" >&2; exit "${2:-1}"; }
value() { if [[ -r $1 ]]; then head -n1 "$1" 2>/dev/null || true; fi; }

# The PCI addresses from the root complex down to a device, in one line; nothing for a device without PCI.
pci_path() {
  local full part path=''
  full=$(realpath -e "$1" 2>/dev/null) || return 0
  [[ $full == *"/pci"* ]] || return 0
  IFS=/ read -ra parts <<<"pci${full#*/pci}"
  for part in "${parts[@]}"; do [[ $part == *:* ]] && path+="$part "; done
  echo "$path"
}

# distance "PATH" NUMA "PATH" NUMA: hops between two devices; more under different roots, most on different NUMA nodes.
distance() {
  local -a first second
  local shared=0 hops
  read -ra first <<<"$1"
  read -ra second <<<"$3"
  while ((shared < ${#first[@]} && shared < ${#second[@]})) && [[ ${first[shared]} == "${second[shared]}" ]]; do shared=$((shared + 1)); done
  hops=$((${#first[@]} + ${#second[@]} - 2 * shared))
  if ((shared == 0)); then
    if [[ $2 == "$4" && $2 != -1 && -n $2 ]]; then hops=$((hops + 50)); else hops=$((hops + 100)); fi
  fi
  echo "$hops"
}

find_gpus() { # fills GPU_PATHS and GPU_NUMAS, in PCI order
  local device index chosen
  local -a all=() named=() indices=()
  GPU_PATHS=() GPU_NUMAS=()
  for device in "$SYS"/bus/pci/devices/*; do
    [[ $(value "$device/vendor") == 0x10de && $(value "$device/class") == 0x030[02]* ]] && all+=("$device")
  done
  chosen=${CUDA_VISIBLE_DEVICES-}
  IFS=, read -ra named <<<"${chosen//[[:space:]]/}"
  for index in "${named[@]}"; do [[ $index =~ ^[0-9]+$ ]] && indices+=("$index"); done
  ((${#indices[@]})) || indices=("${!all[@]}")
  for index in "${indices[@]}"; do
    [[ ${#index} -lt 10 && -n ${all[10#$index]-} ]] || continue # 08 is no octal number
    index=$((10#$index))
    GPU_PATHS+=("$(pci_path "${all[index]}")")
    GPU_NUMAS+=("$(value "${all[index]}/numa_node")")
  done
}

nearest() { # nearest DEVICE_DIRECTORY: distance to the nearest GPU; 0 where there is none
  local path numa index found best=''
  path=$(pci_path "$1")
  numa=$(value "$1/numa_node")
  for index in "${!GPU_PATHS[@]}"; do
    found=$(distance "$path" "$numa" "${GPU_PATHS[index]}" "${GPU_NUMAS[index]}")
    if [[ -z $best ]] || ((found < best)); then best=$found; fi
  done
  echo "${best:-0}"
}

gpu() {
  local nic state names
  local -a lines=() inactive=()
  for nic in "$SYS"/class/infiniband/*; do
    state=$(cat /dev/null "$nic"/ports/*/state 2>/dev/null || true) # a device without ports: not stdin
    if [[ $'\n'$state =~ $'\n'4(:|$'\n'|$) ]]; then # 4: ACTIVE; 5: ACTIVE_DEFER carries nothing for now
      lines+=("$(printf '%06d %s' "$(nearest "$nic/device")" "${nic##*/}")")
    else
      inactive+=("${nic##*/}")
    fi
  done
  if ((${#lines[@]} == 0)); then
    ((${#inactive[@]} == 0)) || die "no RDMA device has an active port (${inactive[*]}); are the cables in and the interfaces up?"
    die "there is no RDMA device in $SYS/class/infiniband; is the NIC's driver loaded (mlx5_ib, ...)?"
  fi
  names=$(printf '%s\n' "${lines[@]}" | sort | cut -d' ' -f2 | paste -sd,)
  echo "KVCACHE_RDMA_NICS=$names"
}

# Interfaces that share a PCI bridge with a GPU carry its RDMA traffic; sockets leave them alone if they can.
near_gpu() {
  local path
  path=$(pci_path "$1/device")
  [[ -n $path ]] || return 1
  (($(nearest "$1/device") <= 4)) && ((${#GPU_PATHS[@]} > 0))
}

# Fills ADDRESSED with the interfaces that peers can reach, as they have an address that is not link-local: 0 for IPv4, which
# --advertise-host's default needs, else 10. /proc/net ties no IPv4 address to an interface (fib_trie names none), but the kernel makes a
# route for each.
find_addresses() {
  local name destination scope
  declare -gA ADDRESSED=()
  while read -r name destination _; do
    # 0000FEA9: 169.254.0.0, as a little-endian number
    if [[ $destination =~ ^[0-9A-F]{8}$ && $destination != 0000FEA9 ]]; then ADDRESSED[$name]=0; fi
  done < <(cat "$PROC/net/route" 2>/dev/null || true)
  while read -r _ _ _ scope _ name; do
    if [[ $scope == 00 ]]; then : "${ADDRESSED[$name]:=10}"; fi # 20: link-local
  done < <(cat "$PROC/net/if_inet6" 2>/dev/null || true)
}

cpu() {
  local net name rank state
  local -a lines=()
  find_addresses
  for net in "$SYS"/class/net/*; do
    name=${net##*/}
    state=$(value "$net/operstate") # unknown: of drivers that do not say; the kernel asks to treat it as up
    [[ $name != lo && $(value "$net/type") == 1 && $state == @(up|unknown) ]] || continue
    [[ ! -d $net/bridge && ! -e $net/tun_flags && ! -e $net/master ]] || continue
    if [[ -d $net/bonding ]]; then rank=0
    elif [[ ! -e $net/device ]]; then rank=3
    elif near_gpu "$net"; then rank=2
    else rank=1; fi
    [[ $state == up ]] || rank=$((rank + 4))
    rank=$((rank + ${ADDRESSED[$name]-20}))
    lines+=("$(printf '%02d %06d %s' "$rank" "$(value "$net/ifindex")" "$name")")
  done
  ((${#lines[@]})) || die "no network interface in $SYS/class/net is up (loopback, bridges and tunnels do not count)"
  echo "KVCACHE_SOCKET_IFNAME=$(printf '%s\n' "${lines[@]}" | sort | head -n1 | cut -d' ' -f3)"
}

case ${1-} in
  -h | --help)
    echo "usage: get_rdma_nics.sh cpu|gpu"
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0" # the text at the head of this file
    exit 0
    ;;
  gpu | cpu) ;;
  *) die "usage: get_rdma_nics.sh cpu|gpu" 2 ;;
esac
[[ $# == 1 ]] || die "usage: get_rdma_nics.sh cpu|gpu" 2
find_gpus
"$1"
